//! The shapes a row may have, and what is a pair.

use serde::Serialize;
use serde_json::{Map, Value};

use super::template::{Extras, Message};
use crate::{outside, recipe::Format};

/// What opens the assistant's turns in an HH dialogue.
const ASSISTANT: &str = "\n\nAssistant:";
/// What opens the human's.
const HUMAN: &str = "\n\nHuman:";

/// How the rows of a file are read: told from the recipe and the file's first row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// `prompt`, `chosen`, `rejected` as text.
    Text,
    /// `chosen` and `rejected` as text; the prompt is what they begin with in common, as in TRL.
    ImplicitText,
    /// `prompt`, `chosen`, `rejected` as lists of messages; `chosen` and `rejected` are the answer alone or the whole
    /// chat.
    Messages,
    /// `chosen` and `rejected` as whole chats; the prompt is their common turns.
    ImplicitMessages,
    /// `chosen` and `rejected` as whole HH dialogues.
    Hh,
}

/// A pair before it is tokenised.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// Answers that go on from a prompt.
    Text {
        /// What both answer.
        prompt: String,
        /// The preferred answer.
        chosen: String,
        /// The other.
        rejected: String,
    },
    /// Turns that go on from a chat.
    Messages {
        /// What both answer.
        prompt: Vec<Message>,
        /// The preferred answer.
        chosen: Vec<Message>,
        /// The other.
        rejected: Vec<Message>,
        /// What else the template is told.
        extras: Extras,
    },
}

/// Names in `chat_template_kwargs` that are no template's own: what they stand for is said in other ways.
const NOT_OF_A_TEMPLATE: [&str; 16] = [
    "messages",
    "conversation",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
];

/// Why a row that can be read is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// An answer holds nothing but white space.
    EmptyAnswer,
    /// Both answers are the same.
    IdenticalAnswers,
    /// The two sides do not answer the same prompt.
    PromptsDiffer,
    /// The prompt has no token.
    EmptyPrompt,
    /// Prompt and answer exceed `max_length`, by whatever `truncation` allows.
    TooLong,
}

impl Refusal {
    /// The reason in words.
    pub fn describe(self) -> &'static str {
        match self {
            Self::EmptyAnswer => "an answer is empty",
            Self::IdenticalAnswers => "both answers are the same",
            Self::PromptsDiffer => "the prompts of the two sides differ",
            Self::EmptyPrompt => "the prompt is empty",
            Self::TooLong => "over max_length",
        }
    }
}

/// A row as its shape reads it.
#[derive(Debug, Clone, PartialEq)]
pub enum Parsed {
    /// A pair.
    Pair(Row),
    /// No pair, for this reason.
    Refused(Refusal),
}

type Object = Map<String, Value>;

impl Shape {
    /// The shape of a file whose first row is `row`; the error says what is wrong with it.
    pub fn of(format: Format, row: &Object) -> Result<Self, String> {
        let prompt = has_prompt(row);
        let text = || if prompt { Self::Text } else { Self::ImplicitText };
        let messages = || if prompt { Self::Messages } else { Self::ImplicitMessages };
        Ok(match format {
            Format::Text => text(),
            Format::Messages => messages(),
            Format::Hh => Self::Hh,
            Format::Auto => match (row.get("chosen"), row.get("rejected")) {
                (Some(Value::Array(_)), Some(Value::Array(_))) => messages(),
                (Some(Value::String(chosen)), Some(Value::String(rejected))) => {
                    let dialogue = |text: &str| text.contains(HUMAN) && text.contains(ASSISTANT);
                    if !prompt && dialogue(chosen) && dialogue(rejected) { Self::Hh } else { text() }
                }
                _ => {
                    return Err("expected `chosen` and `rejected`, both text or both lists of {role, content}".into());
                }
            },
        })
    }

    /// Reads a row; the error says which field is missing or wrong.
    pub fn parse(self, row: &Object) -> Result<Parsed, String> {
        let pair = match self {
            Self::Text => {
                let (prompt, chosen, rejected) = (text(row, "prompt")?, text(row, "chosen")?, text(row, "rejected")?);
                Some(owned((prompt, chosen, rejected)))
            }
            Self::ImplicitText | Self::ImplicitMessages if has_prompt(row) => {
                return Err("this row has a `prompt` and the first of its file has none".into());
            }
            Self::ImplicitText => common_text(text(row, "chosen")?, text(row, "rejected")?).map(owned),
            Self::Hh => dialogue(text(row, "chosen")?, text(row, "rejected")?).map(owned),
            Self::Messages => {
                let (chosen, rejected) = (messages(row, "chosen")?, messages(row, "rejected")?);
                match row.get("prompt") {
                    // A dataset's copy of the first question, beside whole chats: they speak for themselves.
                    Some(Value::String(question)) => common_turns(chosen, rejected).filter(|pair| asks(pair, question)),
                    _ => after_prompt(messages(row, "prompt")?, chosen, rejected),
                }
            }
            Self::ImplicitMessages => common_turns(messages(row, "chosen")?, messages(row, "rejected")?),
        };
        let Some(mut pair) = pair else { return Ok(Parsed::Refused(Refusal::PromptsDiffer)) };
        if let Row::Messages { extras, .. } = &mut pair {
            *extras = extras_of(row)?;
        }
        Ok(match pair.fault() {
            Some(refusal) => Parsed::Refused(refusal),
            None => Parsed::Pair(pair),
        })
    }
}

impl Row {
    fn fault(&self) -> Option<Refusal> {
        let (empty, same) = match self {
            Self::Text { chosen, rejected, .. } => {
                (chosen.trim().is_empty() || rejected.trim().is_empty(), chosen == rejected)
            }
            Self::Messages { chosen, rejected, .. } => (silent(chosen) || silent(rejected), chosen == rejected),
        };
        if empty { Some(Refusal::EmptyAnswer) } else { same.then_some(Refusal::IdenticalAnswers) }
    }
}

fn has_prompt(row: &Object) -> bool {
    row.get("prompt").is_some_and(|prompt| !prompt.is_null())
}

fn owned((prompt, chosen, rejected): (&str, &str, &str)) -> Row {
    Row::Text { prompt: prompt.to_owned(), chosen: chosen.to_owned(), rejected: rejected.to_owned() }
}

/// The prompt is what both texts begin with, less a space at its end, which belongs to the answers; each keeps at
/// least its last character (TRL's `extract_prompt`). Nothing in common is no pair.
fn common_text<'a>(chosen: &'a str, rejected: &'a str) -> Option<(&'a str, &'a str, &'a str)> {
    let pairs = chosen.char_indices().zip(rejected.chars());
    let split = pairs.clone().find(|((_, a), b)| a != b).or(pairs.last()).map_or(0, |((at, _), _)| at);
    let differ = chosen[split..].chars().next() != rejected[split..].chars().next();
    let split = if differ && chosen[..split].ends_with(' ') { split - 1 } else { split };
    (split > 0).then(|| (&chosen[..split], &chosen[split..], &rejected[split..]))
}

/// The prompt reaches to the last turn of the assistant, as in the paper's code, and must be the same on both sides.
fn dialogue<'a>(chosen: &'a str, rejected: &'a str) -> Option<(&'a str, &'a str, &'a str)> {
    let end = |text: &str| text.rfind(ASSISTANT).map(|at| at + ASSISTANT.len());
    let (split, other) = (end(chosen)?, end(rejected)?);
    (chosen[..split] == rejected[..other]).then(|| (&chosen[..split], &chosen[split..], &rejected[split..]))
}

/// The prompt is the turns in which both chats agree; each keeps at least its last turn (TRL's `extract_prompt`).
fn common_turns(mut chosen: Vec<Message>, mut rejected: Vec<Message>) -> Option<Row> {
    let most = chosen.len().min(rejected.len()).saturating_sub(1);
    let split = chosen.iter().zip(&rejected).take(most).take_while(|(a, b)| a == b).count();
    let (after_chosen, after_rejected) = (chosen.split_off(split), rejected.split_off(split));
    let extras = Extras::default();
    (split > 0).then_some(Row::Messages { prompt: chosen, chosen: after_chosen, rejected: after_rejected, extras })
}

/// Takes the prompt's turns off answers that repeat them; one that does and one that does not is no pair.
fn after_prompt(prompt: Vec<Message>, mut chosen: Vec<Message>, mut rejected: Vec<Message>) -> Option<Row> {
    let repeats = |answer: &[Message]| !prompt.is_empty() && answer.starts_with(&prompt);
    match (repeats(&chosen), repeats(&rejected)) {
        (true, true) => {
            chosen.drain(..prompt.len());
            rejected.drain(..prompt.len());
        }
        (false, false) => {}
        _ => return None,
    }
    Some(Row::Messages { prompt, chosen, rejected, extras: Extras::default() })
}

fn asks(pair: &Row, question: &str) -> bool {
    let said = |message: &Message| message.get("content").and_then(Value::as_str) == Some(question);
    matches!(pair, Row::Messages { prompt, .. } if prompt.iter().any(said))
}

/// Whether no turn says or calls anything.
fn silent(turns: &[Message]) -> bool {
    turns.iter().all(|turn| {
        let content = match turn.get("content") {
            Some(Value::String(text)) => !text.trim().is_empty(),
            Some(Value::Array(parts)) => !parts.is_empty(),
            _ => false,
        };
        !content && turn.get("tool_calls").is_none_or(Value::is_null)
    })
}

/// TRL's columns beside the messages: `tools`, a list or its JSON as text, and `chat_template_kwargs`.
fn extras_of(row: &Object) -> Result<Extras, String> {
    let expected = "`tools` must be a list of objects, or that list as JSON text";
    let tools = match row.get("tools") {
        Some(Value::String(text)) => outside::json(text.as_bytes()).map_err(|error| format!("{expected}: {error}"))?,
        given => given.cloned().unwrap_or_default(),
    };
    let tools = match tools {
        Value::Null => None,
        Value::Array(tools) if tools.iter().all(Value::is_object) => Some(tools),
        _ => return Err(expected.into()),
    };
    let names = match row.get("chat_template_kwargs") {
        None | Some(Value::Null) => Object::new(),
        Some(Value::Object(names)) => names.clone(),
        Some(other) => return Err(format!("`chat_template_kwargs` must be an object, not {}", kind(other))),
    };
    match NOT_OF_A_TEMPLATE.iter().find(|name| names.contains_key(**name)) {
        Some(name) => Err(format!("`chat_template_kwargs.{name}` is not for a template; leave it away")),
        None => Ok(Extras { tools, names }),
    }
}

fn text<'a>(row: &'a Object, field: &str) -> Result<&'a str, String> {
    match row.get(field) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{field}` must be text, not {}", kind(other))),
        None => Err(format!("`{field}` is missing")),
    }
}

fn messages(row: &Object, field: &str) -> Result<Vec<Message>, String> {
    let turns = match row.get(field) {
        Some(Value::Array(turns)) => turns,
        Some(other) => return Err(format!("`{field}` must be a list of {{role, content}}, not {}", kind(other))),
        None => return Err(format!("`{field}` is missing")),
    };
    let message = |(index, turn): (usize, &Value)| match turn {
        Value::Object(message) if matches!(message.get("role"), Some(Value::String(_))) => match message.get("content")
        {
            None | Some(Value::Null | Value::String(_) | Value::Array(_)) => Ok(message.clone()),
            Some(other) => Err(format!("`{field}[{index}].content` must be text, not {}", kind(other))),
        },
        _ => Err(format!("`{field}[{index}]` must be an object with a text `role` and a `content`")),
    };
    turns.iter().enumerate().map(message).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
