//! The model's tokenizer: `tokenizer.json`, set up as transformers 5 sets it up.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokenizers::{AddedToken, Tokenizer as Backend};

use super::growth;
use super::tokenizer_config::{TemplateSource, TokenizerConfig, read_if_present};
use crate::confined::{self, Broken, Limits, quietly};
use crate::heap;
use crate::weights::gguf::{self, GgufFile};
use crate::weights::is_gguf;
use crate::{Error, Result};

/// Largest `tokenizer.json` in bytes; that of a vocabulary of 262,144 tokens has 33 MB.
const MAX_FILE: u64 = 256 << 20;
/// Bytes that reading one may hold: so many, and for each byte of the file. Vocabulary and merges become hash maps.
const MEMORY: usize = 64 << 20;
const MEMORY_A_BYTE: usize = 64;
const STACK: usize = 64 << 20;
/// The largest ones are read in some seconds.
const TIME: Duration = Duration::from_secs(300);

/// A tokenizer that knows which token ends a text.
pub struct Tokenizer {
    backend: Backend,
    file: PathBuf,
    special: BTreeMap<String, String>,
    eos_token: String,
    stop_ids: Vec<u32>,
    leading: Option<u32>,
    vocab_size: usize,
    /// Tokens from here on have no row in the model's embedding.
    rows: usize,
    template: Option<TemplateSource>,
    fingerprint: [u8; 32],
}

impl Tokenizer {
    /// Opens the tokenizer of a GGUF file, or of a model folder: `tokenizer.json`, and `tokenizer_config.json`,
    /// `chat_template.jinja`, `chat_template.json`, `generation_config.json` and `config.json` as far as they are
    /// there.
    ///
    /// Truncation and padding saved in `tokenizer.json` are left off: rows here are never cut unseen.
    ///
    /// # Errors
    /// [`Error::Input`] that names the file where one is missing or malformed, or no end token is known.
    pub fn open(model_folder: &Path) -> Result<Self> {
        if is_gguf(model_folder) {
            let files = gguf::tokenizer::files(GgufFile::open(model_folder)?.metadata())?;
            let config = TokenizerConfig::of_gguf(model_folder, &files)?;
            return Self::build(model_folder.to_path_buf(), files["tokenizer.json"].clone().into_bytes(), config);
        }
        let file = model_folder.join("tokenizer.json");
        let bytes = read_if_present(&file, MAX_FILE)?.ok_or_else(|| {
            Error::input(format!(
                "{}: no such file; a model folder needs tokenizer.json (save it with transformers' \
                 `AutoTokenizer.from_pretrained(…).save_pretrained(…)` where the model only brings tokenizer.model)",
                file.display()
            ))
        })?;
        Self::build(file, bytes, TokenizerConfig::read(model_folder)?)
    }

    fn build(file: PathBuf, bytes: Vec<u8>, config: TokenizerConfig) -> Result<Self> {
        let malformed = |why: String| {
            Error::input(format!("{}: not a usable tokenizer: {why}; fetch the file again", file.display()))
        };
        let limits = Limits { memory: MEMORY + MEMORY_A_BYTE * bytes.len(), stack: STACK, time: TIME };
        let mut special = config.special;
        let named = special.clone();
        // The library indexes a post-processor's tokens unchecked: a file that lies about them panics at its first
        // text, so a first text is tried here.
        let opened = confined::run(limits, move || {
            growth::check(&bytes)?;
            let mut backend = Backend::from_bytes(&bytes)?;
            prepare(&mut backend, &named)?;
            let empty = backend.encode_fast("", true)?;
            backend.encode_fast("a b", true)?;
            // without the holes that reading it left
            let backend = heap::lasting(|| backend.clone());
            Ok::<_, tokenizers::Error>((backend, empty.get_ids().first().copied(), bytes))
        });
        let (backend, first, bytes) = opened
            .map_err(|broken| {
                malformed(match broken {
                    Broken::Panic => "its parts contradict each other".to_owned(),
                    Broken::Memory => format!("to read it takes more than {} MiB", limits.memory >> 20),
                    Broken::Time => format!("to read it takes longer than {} s", TIME.as_secs()),
                    Broken::NoThread(error) => format!("there is no thread to read it in ({error})"),
                })
            })?
            .map_err(|error| malformed(error.to_string()))?;

        let eos_token = match special.get("eos_token") {
            Some(token) => token.clone(),
            None => eos_from_ids(&backend, &config.eos_ids, &file)?,
        };
        let eos_id = backend.token_to_id(&eos_token).ok_or_else(|| {
            Error::input(format!(
                "{}: the end token {eos_token:?} that tokenizer_config.json names is not in the vocabulary; \
                 fetch both files of the same model",
                file.display()
            ))
        })?;
        special.entry("eos_token".to_owned()).or_insert_with(|| eos_token.clone());
        let mut stop_ids = vec![eos_id];
        stop_ids.extend(config.eos_ids.iter().filter(|id| **id != eos_id));
        let bos_id = special.get("bos_token").and_then(|token| backend.token_to_id(token));
        let leading = first.filter(|id| Some(*id) == bos_id);
        let vocab_size = backend.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let fingerprint = fingerprint(&bytes, &special, config.template.as_ref());
        let template = config.template;
        Ok(Self {
            backend,
            file,
            special,
            eos_token,
            stop_ids,
            leading,
            vocab_size,
            rows: vocab_size,
            template,
            fingerprint,
        })
    }

    /// The tokenizer of a model whose embedding has so many rows. It may know tokens that have none, as Gemma 3's token
    /// for images in a model of text: a text with one is refused.
    ///
    /// # Errors
    /// [`Error::Input`] where that is so of the end token or of BOS.
    pub fn embedded(self, rows: usize) -> Result<Self> {
        match [self.leading, Some(self.eos_id())].into_iter().flatten().find(|id| *id as usize >= rows) {
            Some(id) => Err(self.without_row(id, rows)),
            None => Ok(Self { rows, ..self }),
        }
    }

    /// The tokens of `text`; with `add_special`, also those the tokenizer itself puts around a text (such as BOS).
    /// Special tokens written out in `text` are found either way.
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer has no token for a piece of the text, or the model no row for a token.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoded = quietly(|| self.backend.encode_fast(text, add_special)).map_err(|_| self.contradicts())?;
        let ids = encoded.map_err(|error| self.failed(&error))?.get_ids().to_vec();
        // a post-processor may put any number around a text
        match ids.iter().find(|id| **id as usize >= self.vocab_size.min(self.rows)) {
            None => Ok(ids),
            Some(id) if (*id as usize) < self.vocab_size => Err(self.without_row(*id, self.rows)),
            Some(_) => Err(self.contradicts()),
        }
    }

    /// The text of `ids`, without special tokens where `skip_special`. Bytes that are no text become U+FFFD; ids
    /// outside the vocabulary are left out.
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer's decoder refuses the tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let decoded = quietly(|| self.backend.decode(ids, skip_special)).map_err(|_| self.contradicts())?;
        decoded.map_err(|error| self.failed(&error))
    }

    /// The text that `answer` adds to that of `prompt`, special tokens left out. A decoder may take the space off a
    /// text's start (SentencePiece's do): an answer by itself would lose the one between it and its prompt.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode_after(&self, prompt: &[u32], answer: &[u32]) -> Result<String> {
        let (before, whole) = (self.decode(prompt, true)?, self.decode(&[prompt, answer].concat(), true)?);
        match whole.strip_prefix(&before) {
            Some(text) => Ok(text.to_string()),
            // a decoder that writes the prompt otherwise before an answer
            None => self.decode(answer, true),
        }
    }

    /// The text each token adds to those before it, one piece a token, special tokens written out. A token that ends
    /// within a character adds nothing; the one that completes it adds the whole character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn pieces(&self, ids: &[u32]) -> Result<Vec<String>> {
        let mut stream = self.backend.decode_stream(false);
        let step = |id: &u32| {
            let piece = quietly(|| stream.step(*id)).map_err(|_| self.contradicts())?;
            piece.map(Option::unwrap_or_default).map_err(|error| self.failed(&error))
        };
        ids.iter().map(step).collect()
    }

    /// The token that ends a text.
    pub fn eos_id(&self) -> u32 {
        self.stop_ids[0]
    }

    /// The text of the token that ends a text.
    pub fn eos_token(&self) -> &str {
        &self.eos_token
    }

    /// All tokens that end a generation, [`Tokenizer::eos_id`] first.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// BOS, where the tokenizer itself puts it before every text.
    pub fn leading_bos(&self) -> Option<u32> {
        self.leading
    }

    /// Whether `id` is marked as a special token in the vocabulary.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.backend.get_added_vocabulary();
        added.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// The largest id plus one: a model must have at least so many embeddings.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// SHA-256 of what tokens depend on: `tokenizer.json`, the special tokens and the model's own chat template.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// `bos_token`, `eos_token`, … and their text, for chat templates.
    pub(super) fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special
    }

    /// The model's own chat template.
    pub(super) fn template(&self) -> Option<&TemplateSource> {
        self.template.as_ref()
    }

    fn without_row(&self, id: u32, rows: usize) -> Error {
        let (file, token) = (self.file.display(), self.backend.id_to_token(id).unwrap_or_default());
        Error::input(format!(
            "{file}: its token {id}, {token:?}, has none of the {rows} rows of the model's embedding; leave it out of the texts, \
             or use the tokenizer that belongs to the model"
        ))
    }

    /// The library panics where a file's parts do not fit each other.
    fn contradicts(&self) -> Error {
        let file = self.file.display();
        Error::input(format!("{file}: the tokenizer's parts contradict each other; fetch the model's files again"))
    }

    fn failed(&self, error: &tokenizers::Error) -> Error {
        Error::input(format!("{}: the tokenizer failed: {error}", self.file.display()))
    }
}

/// Sets the library's tokenizer up as transformers' `TokenizersBackend` does.
fn prepare(backend: &mut Backend, special: &BTreeMap<String, String>) -> tokenizers::Result<()> {
    backend.with_truncation(None)?;
    backend.with_padding(None);
    // A named special token is found in texts even where tokenizer.json does not list it among the added ones. One
    // that the vocabulary lacks stays away: the model has no embedding for it.
    let known = special.values().filter(|token| backend.token_to_id(token).is_some());
    let absent = |token: &&String| !backend.get_added_vocabulary().get_vocab().contains_key(*token);
    let named: Vec<AddedToken> = known.filter(absent).map(|token| AddedToken::from(token.as_str(), true)).collect();
    backend.add_special_tokens(named)?;
    Ok(())
}

fn eos_from_ids(backend: &Backend, ids: &[u32], file: &Path) -> Result<String> {
    ids.first().and_then(|id| backend.id_to_token(*id)).ok_or_else(|| {
        Error::input(format!(
            "{}: no end token is known; name it as `eos_token` in tokenizer_config.json beside it \
             (or `eos_token_id` in generation_config.json)",
            file.display()
        ))
    })
}

fn fingerprint(
    tokenizer_json: &[u8],
    special: &BTreeMap<String, String>,
    template: Option<&TemplateSource>,
) -> [u8; 32] {
    let mut hash = Sha256::new();
    let rest = format!("{special:?}{:?}", template.map(|template| &template.text));
    for part in [tokenizer_json, rest.as_bytes()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
