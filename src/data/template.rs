//! Chat templates: Jinja in the dialect that transformers runs them in, on minijinja.
//!
//! A template comes with a model and is not trusted: it sees the messages and a few names, reads no file, and is
//! bounded in steps, in recursion, in its own size, in what it writes, in time and, under the program's own allocator
//! ([`confined`]), in the memory that it holds: the renderer itself lets a text be doubled at every step.
//!
//! Two things differ from transformers, on purpose: `strftime_now` always speaks of [`TODAY`], so that a run's tokens
//! do not change overnight; and a list or object that is written without `tojson` is an error, because its text would
//! be Python's own (only where `~` joins it to a text is it written in minijinja's way).

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error as Failure, ErrorKind, Output, State};
use serde_json::{Map, Value as Json};

use super::pyjson::{self, Style};
use super::tokenizer::Tokenizer;
use crate::confined::{self, Broken, Limits};
use crate::{Error, Result, outside};

/// The day that `strftime_now` tells: the one Llama 3's template falls back to, as (year, month, day).
pub const TODAY: (u32, u32, u32) = (2024, 7, 26);

/// Largest template, in bytes. Those of published models have some 20 kB at most.
pub(super) const MAX_SOURCE: u64 = 256 << 10;
/// Most bytes a template may write for one chat.
const MAX_OUTPUT: usize = 32 << 20;
/// Steps of minijinja's machine: for a chat as such, for each of its messages, and at most. The templates in
/// tests/fixtures take at most 70 a message.
const STEPS: u64 = 100_000;
const STEPS_A_MESSAGE: u64 = 5_000;
const MAX_STEPS: u64 = 1_000_000;
/// Bytes of address space (used only as far as they are touched) for the stack that a template is rendered on. A
/// value can be nested about once in six steps, and takes at most 700 bytes a level to walk.
const STACK: usize = 512 << 20;
/// Bytes that rendering a chat may hold: so many, and for each byte of the chat as many again as a list of its
/// characters takes.
const MEMORY: usize = 64 << 20;
const MEMORY_A_BYTE: usize = 64;
/// The published templates take some microseconds.
const TIME: Duration = Duration::from_secs(60);
/// Most templates and macros within each other.
const MAX_DEPTH: usize = 64;

/// A message of a chat: `role`, `content`, and whatever else the row gives.
pub type Message = Map<String, Json>;

/// What a template is told of a chat besides its messages: a row's `tools` and `chat_template_kwargs`, as TRL has them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Extras {
    /// The functions that the assistant may call, each as its JSON schema.
    pub tools: Option<Vec<Json>>,
    /// Names of the template's own, as in `enable_thinking`.
    pub names: Map<String, Json>,
}

/// A compiled chat template.
pub struct ChatTemplate {
    compiled: Arc<Compiled>,
    /// Whether the model has another one for chats with tools.
    another_for_tools: bool,
    /// What is said of every chat once a bound of memory or time was broken: each one more would leave a thread behind.
    broken: OnceLock<String>,
}

struct Compiled {
    environment: Environment<'static>,
    file: String,
    source: String,
    special: Value,
}

impl ChatTemplate {
    /// The template that a recipe's `chat_template` asks for: `auto` is the model's own (none where it has none),
    /// `none` is none, and all else is a file.
    ///
    /// # Errors
    /// [`Error::Input`] that names the template's file and line where it cannot be read or compiled.
    pub fn choose(choice: &str, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        match choice {
            "none" => Ok(None),
            "auto" => {
                let Some(own) = tokenizer.template() else { return Ok(None) };
                let compiled = Self::compile(&own.file.to_string_lossy(), &own.text, tokenizer)?;
                Ok(Some(Self { another_for_tools: own.tool_use.is_some(), ..compiled }))
            }
            file => {
                let path = Path::new(file);
                Self::compile(file, &outside::read_text(path, MAX_SOURCE)?, tokenizer).map(Some)
            }
        }
    }

    /// Compiles `source`, which errors will call `file`.
    ///
    /// # Errors
    /// [`Error::Input`] that names `file` and the line.
    pub fn compile(file: &str, source: &str, tokenizer: &Tokenizer) -> Result<Self> {
        Self::with_special_tokens(file, source, Value::from_serialize(tokenizer.special_tokens()))
    }

    fn with_special_tokens(file: &str, source: &str, special: Value) -> Result<Self> {
        if source.len() as u64 > MAX_SOURCE {
            let size = source.len();
            return Err(Error::input(format!(
                "{file}: a chat template of {size} bytes; at most {MAX_SOURCE} are read, so this is not one"
            )));
        }
        let (name, source) = (file.to_owned(), source.to_owned());
        // Constant expressions are computed when a template is compiled.
        let compiled = within(source.len(), move || Compiled::new(&name, source, special));
        let compiled = compiled.unwrap_or_else(|broken| Err(failed(file, &why(&broken))))?;
        Ok(Self { compiled: Arc::new(compiled), another_for_tools: false, broken: OnceLock::new() })
    }

    /// The text of a chat. With `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// [`Error::Input`] that names the template's file and line where it refuses the messages, fails, or exceeds its
    /// bounds.
    pub fn render(&self, messages: &[Message], extras: &Extras, add_generation_prompt: bool) -> Result<String> {
        let file = &self.compiled.file;
        if self.another_for_tools && extras.tools.is_some() {
            return Err(Error::input(format!(
                "{file}: for chats with `tools` this model has a template of its own, named tool_use; save it to a file and \
                 name that as data.chat_template"
            )));
        }
        if let Some(broken) = self.broken.get() {
            return Err(failed(file, broken));
        }
        let chat: Vec<Message> = messages.iter().map(as_transformers_passes_it).collect();
        let extras = extras.clone();
        let size = messages.iter().map(size_of).sum::<usize>()
            + size_of(&extras.names)
            + extras.tools.iter().flatten().map(size_of_value).sum::<usize>();
        let compiled = self.compiled.clone();
        within(size, move || compiled.render(chat, extras, add_generation_prompt)).unwrap_or_else(|broken| {
            let why = why(&broken);
            if matches!(broken, Broken::Memory | Broken::Time) {
                let _ = self.broken.set(why.clone());
            }
            Err(failed(file, &why))
        })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.compiled.source
    }
}

impl Compiled {
    fn new(file: &str, source: String, special: Value) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_recursion_limit(MAX_DEPTH);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(write_as_python);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_filter("trim", trim);
        environment
            .add_template_owned("chat", without_generation_marks(&source))
            .map_err(|failure| located(file, &failure))?;
        Ok(Self { environment, file: file.to_owned(), source, special })
    }

    fn render(&self, chat: Vec<Message>, extras: Extras, add_generation_prompt: bool) -> Result<String> {
        let context = minijinja::context! {
            messages => Value::from_serialize(&chat),
            tools => Value::from_serialize(&extras.tools),
            documents => Value::from(()),
            add_generation_prompt,
            ..minijinja::context! { ..Value::from_serialize(&extras.names), ..self.special.clone() }
        };
        let mut environment = self.environment.clone();
        environment.set_fuel(Some((STEPS + STEPS_A_MESSAGE * chat.len() as u64).min(MAX_STEPS)));
        let mut out = Bounded(Vec::new());
        environment
            .get_template("chat")
            .and_then(|template| template.render_captured_to(context, &mut out).map(drop))
            .map_err(|failure| located(&self.file, &failure))?;
        String::from_utf8(out.0).map_err(|_| failed(&self.file, "it writes bytes that are no text"))
    }
}

/// Runs `work` on `size` bytes of chat within the bounds, on a stack on which every expression that a source can hold,
/// and every value that the steps allow to be nested, can be walked.
fn within<T: Send + 'static>(size: usize, work: impl FnOnce() -> T + Send + 'static) -> std::result::Result<T, Broken> {
    confined::run(Limits { memory: MEMORY + MEMORY_A_BYTE * size, stack: STACK, time: TIME }, work)
}

fn why(broken: &Broken) -> String {
    match broken {
        Broken::Panic => "it makes the renderer fail".to_owned(),
        Broken::Memory => format!("it holds more than {} MiB, and more than any that was published", MEMORY >> 20),
        Broken::Time => format!("it takes longer than {} s", TIME.as_secs()),
        Broken::NoThread(error) => format!("there is no thread to render it in ({error})"),
    }
}

/// Bytes of the texts in a message, or in another object.
fn size_of(message: &Message) -> usize {
    message.iter().map(|(key, value)| key.len() + 1 + size_of_value(value)).sum()
}

fn size_of_value(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(size_of_value).sum(),
        Json::Object(object) => size_of(object),
        _ => 0,
    }
}

fn failed(place: &str, why: &str) -> Error {
    Error::input(format!("{place}: chat template: {why}; mend the template, or name another as chat_template"))
}

/// What transformers does to a message before the template sees it: fields that are null go, and a reasoning under
/// any of its three names is found under the two that templates read.
fn as_transformers_passes_it(message: &Message) -> Message {
    let mut message: Message =
        message.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())).collect();
    let reasoning = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|name| message.get(*name)).cloned();
    if let Some(reasoning) = reasoning {
        message.entry("thinking").or_insert_with(|| reasoning.clone());
        message.insert("reasoning_content".to_owned(), reasoning);
    }
    message
}

/// `{% generation %} … {% endgeneration %}` marks the assistant's tokens for a mask that is not needed here, and
/// otherwise only opens a scope: it becomes `{% with %} … {% endwith %}`, which treats whitespace the same.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        let Some(end) = tag.find("%}") else { break };
        let name = tag[..end].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(before);
        match name {
            "generation" => out.push_str(&tag[..end].replacen("generation", "with", 1)),
            "endgeneration" => out.push_str(&tag[..end].replacen("endgeneration", "endwith", 1)),
            _ => out.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    out + rest
}

/// Jinja writes Python's `None`, `True` and `False`.
fn write_as_python(out: &mut Output, state: &State, value: &Value) -> std::result::Result<(), Failure> {
    match value.kind() {
        ValueKind::None => Ok(out.write_str("None")?),
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => Err(no_text(value)),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

fn no_text(value: &Value) -> Failure {
    let message = format!("a {} is used as text; write it through `tojson`, or take its parts", value.kind());
    Failure::new(ErrorKind::BadSerialization, message)
}

/// The filter that templates put every `content` through: of a list of parts it would make text unseen.
fn trim(value: &Value, chars: Option<&str>) -> std::result::Result<String, Failure> {
    let text = value.as_str().ok_or_else(|| no_text(value))?;
    Ok(match chars {
        None => text.trim(),
        Some(chars) => text.trim_matches(|c| chars.contains(c)),
    }
    .to_owned())
}

fn raise_exception(message: &str) -> std::result::Result<Value, Failure> {
    Err(Failure::new(ErrorKind::InvalidOperation, format!("the template refuses these messages: {message}")))
}

fn tojson(value: &Value, options: Kwargs) -> std::result::Result<String, Failure> {
    let indent = match options.get::<Option<Value>>("indent")? {
        None => None,
        Some(value) if value.is_none() => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(value)?.min(80)),
        }),
    };
    let separators = match options.get::<Option<Vec<String>>>("separators")? {
        None => Style::default_separators(indent.is_some()),
        Some(given) => <[String; 2]>::try_from(given).map(Into::into).map_err(|given| {
            let message = format!("`separators` are two texts, not {}", given.len());
            Failure::new(ErrorKind::InvalidOperation, message)
        })?,
    };
    let style = Style {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        separators,
    };
    options.assert_all_used()?;
    let json = serde_json::to_value(value).map_err(|error| {
        Failure::new(ErrorKind::BadSerialization, "`tojson` of a value that is no JSON").with_source(error)
    })?;
    Ok(pyjson::dumps(&json, &style))
}

/// `datetime.now().strftime(format)`, always at [`TODAY`], a Friday, at midnight.
fn strftime_now(format: &str) -> std::result::Result<String, Failure> {
    let (year, month, day) = TODAY;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let text = match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => "July".to_owned(),
            Some('b' | 'h') => "Jul".to_owned(),
            Some('A') => "Friday".to_owned(),
            Some('a') => "Fri".to_owned(),
            Some('H' | 'M' | 'S') => "00".to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => "00:00:00".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let code = other.map_or_else(|| "%".to_owned(), |code| format!("%{code}"));
                return Err(Failure::new(ErrorKind::InvalidOperation, format!("strftime_now knows no {code:?}")));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// What a template has written so far; more than [`MAX_OUTPUT`] is refused.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other(format!("the template writes more than {MAX_OUTPUT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The failure as one sentence that names the template's file and line.
fn located(file: &str, failure: &Failure) -> Error {
    let line = failure.line().map_or_else(String::new, |line| format!(":{line}"));
    let mut why = failure.detail().map_or_else(|| failure.kind().to_string(), str::to_owned);
    if failure.kind() == ErrorKind::OutOfFuel {
        why = "it takes too many steps".to_owned();
    }
    let cause = std::error::Error::source(failure).map_or_else(String::new, |cause| format!(" ({cause})"));
    failed(&format!("{file}{line}"), &format!("{why}{cause}"))
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
