use super::*;

fn state(step: u64) -> State {
    let of = |what: &str| what.to_string();
    let made_of = MadeOf {
        settings: BTreeMap::from([(of("train.epochs"), 2.0.into()), (of("train.learning_rate"), 0.25.into())]),
        base: of("b"),
        template: of("c"),
        tokenizer: of("t"),
        start: of("s"),
        data: of("d"),
        held_out: of("h"),
    };
    State { step, epoch: 1, row: 4, num_tokens: 900, skipped: 0, metrics_bytes: 1234, made_of }
}

fn save_step(run: &Path, step: u64) -> Result<PathBuf> {
    save(run, &state(step), |folder| store::write_text(&folder.join(OPTIMIZER), &step.to_string()))
}

fn names(run: &Path) -> Vec<String> {
    let entries = fs::read_dir(run).expect("the run's folder");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn the_newest_is_found_by_number_and_comes_back_as_it_was() -> Result<()> {
    let run = tempfile::tempdir().expect("a folder");
    assert_eq!(latest(&run.path().join("none"))?.whole, None);
    assert_eq!(latest(run.path())?.whole, None);
    save_step(run.path(), 9)?;
    let path = save_step(run.path(), 10)?;
    assert_eq!(latest(run.path())?, Latest { whole: Some(path.clone()), damaged: vec![] });
    assert_eq!(open(&path)?, state(10));
    assert_eq!(fs::read_to_string(path.join(OPTIMIZER)).expect("written"), "10");
    Ok(())
}

#[test]
fn what_is_not_whole_is_passed_over_and_leftovers_go() -> Result<()> {
    let run = tempfile::tempdir().expect("a folder");
    let whole = save_step(run.path(), 2)?;
    let cut = save_step(run.path(), 4)?;
    fs::write(cut.join(OPTIMIZER), "").expect("written");
    fs::create_dir(run.path().join("checkpoint-6")).expect("made");
    fs::create_dir(run.path().join(".checkpoint-8.incomplete")).expect("made");
    let found = latest(run.path())?;
    assert_eq!((found.whole, found.damaged.len()), (Some(whole), 2));
    assert!(found.damaged[0].contains("checkpoint-6/manifest.json"), "{:?}", found.damaged);
    assert!(found.damaged[1].contains(&format!("checkpoint-4/{OPTIMIZER}")), "{:?}", found.damaged);
    assert_eq!(names(run.path()), ["checkpoint-2", "checkpoint-4", "checkpoint-6"]);
    assert!(open(&cut).expect_err("cut").to_string().contains(OPTIMIZER));
    Ok(())
}

#[test]
fn steps_are_told_in_order() -> Result<()> {
    let run = tempfile::tempdir().expect("a folder");
    for name in ["checkpoint-10", "checkpoint-9", ".checkpoint-11.incomplete", "checkpoint-x"] {
        fs::create_dir(run.path().join(name)).expect("made");
    }
    assert_eq!(steps_of(run.path())?, [9, 10]);
    Ok(())
}

#[test]
fn a_failed_save_leaves_nothing() -> Result<()> {
    let run = tempfile::tempdir().expect("a folder");
    save(run.path(), &state(3), |_| Err(Error::run("a tensor is not finite"))).expect_err("failed");
    assert_eq!(names(run.path()), [""; 0]);
    Ok(())
}

#[test]
fn the_oldest_go_first() -> Result<()> {
    let run = tempfile::tempdir().expect("a folder");
    fs::create_dir(run.path().join("adapter")).expect("made");
    for step in [5, 10, 100, 20] {
        save_step(run.path(), step)?;
    }
    prune(run.path(), 2)?;
    assert_eq!(names(run.path()), ["adapter", "checkpoint-100", "checkpoint-20"]);
    rewind(run.path(), 20)?;
    assert_eq!(names(run.path()), ["adapter", "checkpoint-20"]);
    Ok(())
}

/// The states in which a crash between two calls can leave a replacement, and which of the two is there afterwards.
#[test]
fn a_replacement_that_was_cut_short_is_made_up_for() -> Result<()> {
    let run = tempfile::tempdir().expect("a folder");
    let at = |name: &str| run.path().join(name);
    let rename = |from: &str, to: &str| fs::rename(at(from), at(to)).expect("renamed");
    let content = || fs::read_to_string(at("checkpoint-5").join(OPTIMIZER)).expect("read");
    let both = || -> Result<()> {
        save_step(run.path(), 5)?;
        fs::write(at("checkpoint-5").join("old"), "").expect("written");
        rename("checkpoint-5", "aside");
        save_step(run.path(), 5)?;
        rename("checkpoint-5", ".checkpoint-5.incomplete");
        rename("aside", ".checkpoint-5.replaced");
        Ok(())
    };
    // Both renamed aside, the new one whole: it is taken.
    both()?;
    assert_eq!(latest(run.path())?.whole, Some(at("checkpoint-5")));
    assert_eq!((names(run.path()), content()), (vec!["checkpoint-5".to_string()], "5".into()));
    assert!(!at("checkpoint-5/old").exists());
    // The new one not whole: the old one comes back.
    fs::remove_dir_all(at("checkpoint-5")).expect("removed");
    both()?;
    fs::remove_file(at(".checkpoint-5.incomplete/manifest.json")).expect("removed");
    assert_eq!(latest(run.path())?.whole, Some(at("checkpoint-5")));
    assert_eq!(names(run.path()), ["checkpoint-5"]);
    assert!(at("checkpoint-5/old").exists());
    // What was on its way out stays out.
    rename("checkpoint-5", ".checkpoint-5.removed");
    assert_eq!((latest(run.path())?.whole, names(run.path()).len()), (None, 0));
    Ok(())
}

#[test]
fn another_run_does_not_go_on_from_it() {
    let (then, path) = (state(3), Path::new("runs/hh/checkpoint-3"));
    assert!(then.check(&then.made_of, false, path).is_ok());
    let refused = |change: &dyn Fn(&mut MadeOf), extend: bool| {
        let mut now = then.made_of.clone();
        change(&mut now);
        then.check(&now, extend, path).map_err(|error| (error.exit_code(), error.to_string()))
    };
    type Change<'a> = &'a dyn Fn(&mut MadeOf);
    let parts: [(Change, &str); 8] = [
        (&|now| now.base.push('x'), "base model"),
        (&|now| now.template.push('x'), "chat template"),
        (&|now| now.tokenizer.push('x'), "tokenizer"),
        (&|now| now.start.push('x'), "start adapter"),
        (&|now| now.data.push('x'), "set of training rows"),
        (&|now| now.held_out.push('x'), "set of held-out rows"),
        (&|now| drop(now.settings.remove("train.learning_rate")), "train.learning_rate (0.25, now not set)"),
        (&|now| drop(now.settings.insert("train.seed".into(), 1.into())), "train.seed (not set, now 1)"),
    ];
    for (change, what) in parts {
        for extend in [false, true] {
            let (code, said) = refused(change, extend).expect_err(what);
            assert_eq!(code, 2);
            assert!(said.starts_with(&format!("runs/hh/checkpoint-3: made with another {what}: ")), "{said}");
        }
    }
    let longer = |now: &mut MadeOf| drop(now.settings.insert("train.epochs".into(), 3.0.into()));
    let (_, said) = refused(&longer, false).expect_err("longer");
    assert!(said.contains("another train.epochs (2.0, now 3.0) (or go on for more steps with --extend)"), "{said}");
    assert_eq!(refused(&longer, true), Ok(()));
}

/// Every call that a save and a prune make goes wrong in every way: the newest whole checkpoint is the old one or
/// the new one, no third thing, and the next save works.
#[cfg(debug_assertions)]
#[test]
fn a_save_that_fails_at_any_call_leaves_a_whole_checkpoint() -> Result<()> {
    use crate::store::disk::faults::{self, Fault};
    let save_both = |run: &Path, step: u64| -> Result<()> {
        save_step(run, step)?;
        prune(run, 1)
    };
    let whole = {
        let run = tempfile::tempdir().expect("a folder");
        save_both(run.path(), 1)?;
        faults::plan(usize::MAX, Fault::Torn);
        save_both(run.path(), 2)?;
        faults::end()
    };
    for call in ["mkdir", "create", "write", "sync", "rename", "remove"] {
        assert!(whole.iter().any(|(name, _)| *name == call), "no {call} among {whole:?}");
    }
    let kinds = [std::io::ErrorKind::StorageFull, std::io::ErrorKind::Other].map(Fault::Error);
    for fault in kinds.into_iter().chain([Fault::Torn, Fault::Crash]) {
        for at in 0..whole.len() {
            for step in [2, 1] {
                // A step of its own, or the same step with another state: a replacement.
                let run = tempfile::tempdir().expect("a folder");
                save(run.path(), &State { num_tokens: 1, ..state(1) }, |_| Ok(()))?;
                faults::plan(at, fault);
                let failed = save_both(run.path(), step);
                let calls = faults::end_without_power();
                if calls.len() <= at {
                    continue;
                }
                let place = format!("{fault:?} at call {at}, {:?}: {failed:?}", calls[at]);
                let found = latest(run.path())?;
                let kept = open(found.whole.as_deref().unwrap_or_else(|| panic!("nothing left: {place}")))?;
                let old = State { num_tokens: 1, ..state(1) };
                assert!(kept == old || kept == state(step), "{place}");
                assert!(failed.is_err() || kept == state(step), "{place}");
                assert_eq!(found.damaged, [""; 0], "{place}");
                save_both(run.path(), 3)?;
                assert_eq!(names(run.path()), ["checkpoint-3"], "{place}");
            }
        }
    }
    Ok(())
}

/// What a loss of power between two calls may undo is undone in `tests/crash.rs` for bytes; names are held here by
/// the order of the calls: each file is synced before the folder, the folder before its rename, and the rename
/// before an older checkpoint is touched.
#[cfg(debug_assertions)]
#[test]
fn a_save_syncs_before_it_relies() -> Result<()> {
    use crate::store::disk::faults::{self, Fault};
    let run = tempfile::tempdir().expect("a folder");
    save_step(run.path(), 1)?;
    faults::plan(usize::MAX, Fault::Torn);
    save_step(run.path(), 2)?;
    prune(run.path(), 1)?;
    let calls = faults::end();
    let (new, part) = (run.path().join("checkpoint-2"), run.path().join(".checkpoint-2.incomplete"));
    let last = |call: &str, path: &Path| {
        let found = calls.iter().rposition(|(name, at)| *name == call && at == path);
        found.unwrap_or_else(|| panic!("no {call} of {}: {calls:?}", path.display()))
    };
    let manifest = last("sync", &part.join(store::MANIFEST));
    for file in [OPTIMIZER, STATE] {
        let synced = last("sync", &part.join(file));
        assert!(last("rename", &part.join(file)) < synced && synced < manifest, "{calls:?}");
    }
    assert!(last("write", &part.join(store::MANIFEST)) < manifest, "{calls:?}");
    let (folder, renamed, above) = (last("sync", &part), last("rename", &new), last("sync", run.path()));
    let older = last("rename", &run.path().join(".checkpoint-1.removed"));
    assert!(manifest < folder && folder < renamed && renamed < above && above < older, "{calls:?}");
    Ok(())
}

/// A disk that garbles what it was given: seen as the save reads back, and what stood there before stays.
#[cfg(debug_assertions)]
#[test]
fn what_does_not_read_back_is_no_checkpoint_and_costs_no_other() -> Result<()> {
    use std::cell::RefCell;

    use crate::store::disk::faults::{self, Fault};
    thread_local! {
        static GARBLED: RefCell<PathBuf> = RefCell::default();
    }
    let run = tempfile::tempdir().expect("a folder");
    let save_both = |step: u64| save_step(run.path(), step).and_then(|_| prune(run.path(), 1));
    save_both(1)?;
    let part = run.path().join(".checkpoint-2.incomplete");
    faults::plan(usize::MAX, Fault::Torn);
    save_both(2)?;
    let calls = faults::end();
    // The sums are taken and written; then, as the folder is synced, the file is another one.
    let at = calls.iter().rposition(|(name, path)| *name == "sync" && *path == part).expect("the folder's sync");
    fs::remove_dir_all(run.path().join("checkpoint-2")).expect("removed");
    save_both(1)?;
    GARBLED.set(part.join(OPTIMIZER));
    faults::plan(at, Fault::Run(|| GARBLED.with_borrow(|path| fs::write(path, "3").expect("written"))));
    let error = save_both(2).expect_err("garbled");
    faults::end();
    assert!(error.to_string().contains("a checkpoint cannot be read back: "), "{error}");
    assert_eq!(latest(run.path())?.whole, Some(run.path().join("checkpoint-1")));
    Ok(())
}
