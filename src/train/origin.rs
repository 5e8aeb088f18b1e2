//! The run that an adapter comes from, as its checkpoint tells: what the adapter was trained on, and how far.

use std::path::{Path, PathBuf};

use super::{
    base::Base,
    checkpoint::{self, STATE, State},
    folder,
};
use crate::{
    Error, Result,
    data::{TokenizedPair, dataset},
    report::Progress,
    sha256::hex,
};

/// An adapter's run.
#[derive(Debug)]
pub struct Origin {
    adapter: PathBuf,
    state: State,
    /// Whether the state is the adapter's own, or that of a checkpoint before it.
    exact: bool,
}

impl Origin {
    /// Of a checkpoint, or of the final adapter in a run's folder that still holds one. None of any other adapter:
    /// nothing tells what it was trained on.
    ///
    /// # Errors
    /// [`Error::Input`] where the checkpoint's state cannot be read.
    pub fn of(adapter: &Path) -> Result<Option<Self>> {
        let origin = |state, exact| Self { adapter: adapter.to_path_buf(), state, exact };
        if adapter.join(STATE).exists() {
            return Ok(Some(origin(checkpoint::read(adapter)?, true)));
        }
        let Some(run) = adapter.canonicalize().ok().as_deref().and_then(run_of).map(Path::to_path_buf) else {
            return Ok(None);
        };
        let last = checkpoint::steps_of(&run)?.pop();
        Ok(checkpoint::newest(&run)?.map(|state| {
            let exact = Some(state.step) == last;
            origin(state, exact)
        }))
    }

    /// Steps of the run behind the adapter, those left out included; none where the last checkpoint cannot be read.
    pub fn steps(&self) -> Option<u64> {
        self.exact.then_some(self.state.step)
    }

    /// Refuses a base that is not the one that the adapter was trained on, as `--resume` does; where it was `named` on
    /// the command line, with `option` or otherwise, it says so alone.
    ///
    /// # Errors
    /// [`Error::Recipe`] naming both and what to do; [`Error::Input`] where the base cannot be read.
    pub fn check_base(&self, base: &Base, named: bool, option: &str) -> Result<()> {
        if hex(&base.folder.fingerprint()?) == self.state.made_of.base {
            return Ok(());
        }
        let another = format!(
            "{}: not the base that {} was trained on: weights or config.json are others",
            base.path.display(),
            self.adapter.display()
        );
        if named {
            Progress::stderr().note(&format!("warning: {another}"));
            return Ok(());
        }
        Err(Error::recipe(format!("{another}; bring it back as it was, or take it all the same with {option}")))
    }

    /// Whether these are the rows that the run held out, tokenised as it did.
    pub fn held_out(&self, rows: &[TokenizedPair]) -> bool {
        hex(&dataset::fingerprint(rows)) == self.state.made_of.held_out
    }
}

/// The run whose final adapter lies at `adapter`.
fn run_of(adapter: &Path) -> Option<&Path> {
    adapter.parent().filter(|run| adapter.ends_with(folder::ADAPTER) && run.join(folder::RECIPE).exists())
}
