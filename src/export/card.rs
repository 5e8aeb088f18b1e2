//! The README of an adapter: what it was made from, how, and how to use it.

use serde::Serialize;
use serde_json::Value;

use super::adapter_config::AdapterConfig;
use crate::recipe::Recipe;

/// How an adapter was trained.
#[derive(Debug, Clone, Copy)]
pub struct Training<'a> {
    /// The recipe of its run.
    pub recipe: &'a Recipe,
    /// Steps of the run behind it, those left out included, where that is known: a checkpoint has fewer of them than
    /// its recipe names.
    pub steps: Option<u64>,
}

/// A model card with the front matter of the Hugging Face hub.
pub fn model_card(config: &AdapterConfig, training: Option<Training>) -> String {
    let base = config.base_model_name_or_path.as_deref().unwrap_or("unknown");
    // A JSON string is a YAML and a Python string, whatever a path holds.
    let quoted = Value::from(base).to_string();
    let revision = config.revision.as_deref().filter(|revision| *revision != "main");
    let revision = revision.map(|revision| format!(", revision={}", Value::from(revision))).unwrap_or_default();
    let training = training.map(section).unwrap_or_default();
    format!(
        "---
base_model: {quoted}
library_name: peft
pipeline_tag: text-generation
tags:
- dpo
- lora
---

# LoRA adapter for {base}

A LoRA adapter in PEFT's format: r {r}, alpha {alpha}{rslora}.
{training}
## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {quoted}
tokenizer = AutoTokenizer.from_pretrained(base{revision})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base{revision}), \"path/to/this/folder\")
```
",
        r = config.r,
        alpha = config.lora_alpha,
        rslora = if config.use_rslora { ", scaled by alpha/√r" } else { "" },
    )
}

/// What the run did, as a section.
fn section(Training { recipe, steps }: Training) -> String {
    let (objective, train) = (&recipe.objective, &recipe.train);
    let length = match train.max_steps {
        0 => format!("{} epochs", train.epochs),
        steps => format!("{steps} steps"),
    };
    let taken = steps.map(|steps| ("steps taken", steps.to_string()));
    let rows = [
        ("loss", name(&objective.loss)),
        ("beta", objective.beta.to_string()),
        ("label smoothing", objective.label_smoothing.to_string()),
        ("reference", name(&objective.reference)),
        ("optimizer", name(&train.optimizer)),
        (
            "learning rate",
            format!("{:e}, {}, {} warm-up steps", train.learning_rate, name(&train.lr_schedule), train.warmup_steps),
        ),
        ("pairs an optimizer step", train.batch_size.to_string()),
        ("planned length", length),
        ("longest prompt and answer", format!("{} tokens", recipe.data.max_length)),
    ];
    let rows: String = rows.iter().chain(&taken).map(|(what, value)| format!("| {what} | {value} |\n")).collect();
    format!(
        "
## Training

Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290) with dpo-lora {version}.

| | |
| --- | --- |
{rows}",
        version = env!("CARGO_PKG_VERSION"),
    )
}

/// The name of a choice as the recipe spells it.
fn name(choice: &impl Serialize) -> String {
    match serde_json::to_value(choice) {
        Ok(Value::String(name)) => name,
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_is_named_where_it_is_not_the_main_one() {
        let folder = tempfile::tempdir().unwrap();
        let config =
            r#"{"peft_type":"LORA","r":1,"lora_alpha":1,"target_modules":["x"],"base_model_name_or_path":"o/n"}"#;
        std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        let mut config = AdapterConfig::read(folder.path()).unwrap();
        assert!(model_card(&config, None).contains("AutoTokenizer.from_pretrained(base)\n"));
        config.revision = Some("main".into());
        assert!(model_card(&config, None).contains("AutoTokenizer.from_pretrained(base)\n"));
        config.revision = Some("v2".into());
        let card = model_card(&config, None);
        assert_eq!(card.matches("from_pretrained(base, revision=\"v2\")").count(), 2, "{card}");
    }
}
