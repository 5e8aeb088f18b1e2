//! `dpo-lora data check`: what became of every row, and the tokens of the first ones by role.

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use serde_json::json;

use super::{args::DataCheckArgs, stdout};
use crate::data::{ChatTemplate, Dataset, Options, TokenizedPair, Tokenizer, split_eval, trained_on};
use crate::model::Config;
use crate::recipe::Recipe;
use crate::train::rows;
use crate::{Result, hub};

/// Reads the rows of a recipe as `train` would, and prints what became of them on standard output: a table, or one JSON
/// object a set of rows. The tokens of the first pairs of a set follow, prompt, chosen and rejected told by colour (on
/// a terminal, without `NO_COLOR`) or by brackets. Where nobody reads standard output any more, no further set is read.
///
/// # Errors
/// Those of [`Dataset::load`]; a length that the model does not take; a set without a usable row, once all are printed.
pub fn run(args: DataCheckArgs) -> Result<()> {
    let recipe = Recipe::load(&args.recipe, &args.set.set)?;
    let model = hub::model(&recipe.model.base, &recipe.model.revision)?;
    let (train, eval) = (rows::files(&recipe.data.train)?, rows::files(&recipe.data.eval)?);
    let config = Config::read(&model)?;
    config.check_length(recipe.data.max_length)?;
    let tokenizer = Tokenizer::open(&model)?.embedded(config.vocab_size)?;
    let template = ChatTemplate::choose(&recipe.data.chat_template, &tokenizer)?;
    let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut sets = vec![("train", &train, Options::train(&recipe.data))];
    if !eval.is_empty() {
        sets.push(("eval", &eval, Options::eval(&recipe.data)));
    }
    let (mut unusable, mut training) = (None, None::<Vec<TokenizedPair>>);
    for (name, files, options) in sets {
        if !stdout::is_read() {
            break;
        }
        let dataset = Dataset::load(files, &tokenizer, template.as_ref(), &options)?;
        let held_out = if name == "train" && eval.is_empty() { recipe.data.eval_fraction } else { 0.0 };
        let split = (held_out > 0.0).then(|| split_eval(dataset.pairs.clone(), held_out, recipe.train.seed));
        let also_trained_on = match (&split, &training) {
            (Some((kept, held_out)), _) => Some(trained_on(held_out, kept)),
            (None, Some(training)) => Some(trained_on(&dataset.pairs, training)),
            (None, None) => None,
        };
        let held_out = split.map(|(_, held_out)| held_out.len());
        let shown = &dataset.pairs[..args.show.min(dataset.pairs.len())];
        let out = if args.json {
            let pairs: Result<Vec<_>> = shown.iter().map(|pair| as_json(pair, files, &tokenizer)).collect();
            let object = json!({
                "set": name, "report": dataset.report, "held_out": held_out, "also_trained_on": also_trained_on,
                "pairs": pairs?,
            });
            format!("{object}\n")
        } else {
            let mut out = format!("{name}\n{}", dataset.report);
            if let Some(held_out) = held_out {
                out += &format!("\nheld out (eval_fraction) {held_out:>7}\n");
            }
            if let Some(rows) = also_trained_on {
                let above = if held_out.is_some() { "" } else { "\n" };
                out += &format!("{above}also trained on         {rows:>9}\n");
            }
            for pair in shown {
                out += &as_text(pair, files, &tokenizer, colour)?;
            }
            out.push('\n');
            out
        };
        stdout::write(out.as_bytes())?;
        match dataset.usable() {
            Ok(usable) => training = training.or(Some(usable.pairs)),
            Err(error) => unusable = unusable.or(Some(error)),
        }
    }
    unusable.map_or(Ok(()), Err)
}

fn roles(pair: &TokenizedPair) -> [(&'static str, &[u32], &'static str); 3] {
    [("prompt", &pair.prompt, "34"), ("chosen", &pair.chosen, "32"), ("rejected", &pair.rejected, "31")]
}

fn place(pair: &TokenizedPair, files: &[PathBuf]) -> String {
    let file = files.get(pair.origin.0 as usize).map_or_else(String::new, |file| file.display().to_string());
    format!("{file}:{}", pair.origin.1)
}

/// The tokens of an answer (or the prompt) as text; those of an answer are read after the prompt, as the model does.
fn pieces(pair: &TokenizedPair, part: &[u32], tokenizer: &Tokenizer) -> Result<Vec<String>> {
    if part == pair.prompt.as_slice() {
        return tokenizer.pieces(part);
    }
    let mut all = tokenizer.pieces(&[pair.prompt.as_slice(), part].concat())?;
    Ok(all.split_off(pair.prompt.len()))
}

fn as_json(pair: &TokenizedPair, files: &[PathBuf], tokenizer: &Tokenizer) -> Result<serde_json::Value> {
    let mut object = serde_json::Map::from_iter([("row".to_owned(), json!(place(pair, files)))]);
    for (role, ids, _) in roles(pair) {
        let pieces = pieces(pair, ids, tokenizer)?;
        object.insert(role.to_owned(), json!({"ids": ids, "tokens": pieces}));
    }
    Ok(object.into())
}

/// One token after the other, a bar between two; line ends and control characters written out, a token that ends
/// within a character as `…`, special tokens inverse.
fn as_text(pair: &TokenizedPair, files: &[PathBuf], tokenizer: &Tokenizer, colour: bool) -> Result<String> {
    let lengths = roles(pair).map(|(role, ids, _)| format!("{role} {}", ids.len())).join(", ");
    let mut out = format!("\n{}  ({lengths})\n", place(pair, files));
    for (role, ids, code) in roles(pair) {
        let token = |(id, piece): (&u32, String)| {
            let text = if piece.is_empty() { "…".to_owned() } else { written_out(&piece) };
            if colour && tokenizer.is_special(*id) { format!("\x1b[7m{text}\x1b[27m") } else { text }
        };
        let tokens: Vec<String> = ids.iter().zip(pieces(pair, ids, tokenizer)?).map(token).collect();
        let tokens = tokens.join("|");
        out += &if colour { format!("\x1b[{code}m{tokens}\x1b[0m\n") } else { format!("[{role}: {tokens}]\n") };
    }
    Ok(out)
}

fn written_out(piece: &str) -> String {
    let mut out = String::new();
    for c in piece.chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn shown(colour: bool) -> String {
        let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer/plain");
        let tokenizer = Tokenizer::open(Path::new(fixtures)).unwrap();
        let ids = |text: &str| tokenizer.encode(text, true).unwrap();
        let (prompt, chosen, rejected) = (ids("the sky\n"), ids(" blue<|im_end|>"), ids("é\u{1b}<|im_end|>"));
        let pair = TokenizedPair { prompt, chosen, rejected, origin: (0, 7) };
        as_text(&pair, &["rows.jsonl".into()], &tokenizer, colour).unwrap()
    }

    #[test]
    fn roles_are_told_by_brackets_and_control_characters_written_out() {
        assert_eq!(
            shown(false),
            "\nrows.jsonl:7  (prompt 4, chosen 3, rejected 4)\n[prompt: the| sk|y|\\n]\n[chosen:  b|lue|<|im_end|>]\n\
             [rejected: …|é|\\u{1b}|<|im_end|>]\n"
        );
    }

    #[test]
    fn or_by_colour_with_special_tokens_inverse() {
        let text = shown(true);
        assert!(text.contains("\x1b[34mthe| sk|y|\\n\x1b[0m\n"), "{text:?}");
        assert!(text.contains("\x1b[32m b|lue|\x1b[7m<|im_end|>\x1b[27m\x1b[0m\n"), "{text:?}");
    }
}
