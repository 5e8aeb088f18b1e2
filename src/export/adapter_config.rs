//! PEFT's `adapter_config.json`: what an adapter's matrices mean.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::targets::{Matcher, Patterns};
use crate::keys::{Keys, object_file};
use crate::recipe::{Adapter, Model, TargetModules};
use crate::{Error, Result};

/// The file's name.
pub const FILE: &str = "adapter_config.json";

/// Fields that change what an adapter computes or which layers it stands for; with any value but an empty one, the
/// adapter is more than A and B on linear layers.
const UNREAD: [&str; 16] = [
    "alora_invocation_tokens",
    "arrow_config",
    "exclude_modules",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
];

/// Ways of starting A and B that leave the base as it is. The others (PiSSA, OLoRA, …) change it.
const PLAIN_INITS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Most patterns of ranks or alphas, each of which is a regular expression: the linear layers of the largest dense
/// models are fewer than 1000.
const MAX_PATTERNS: usize = 4096;

/// What an adapter's matrices mean, with PEFT's names.
#[derive(Debug, Clone)]
pub struct AdapterConfig {
    /// The base: hub id or folder.
    pub base_model_name_or_path: Option<String>,
    /// The base's branch, tag or commit.
    pub revision: Option<String>,
    /// Rank, where no pattern says otherwise.
    pub r: usize,
    /// The update's scale is `lora_alpha / r`, where no pattern says otherwise.
    pub lora_alpha: f64,
    /// Dropout while training.
    pub lora_dropout: f64,
    /// Which linear layers are adapted.
    pub target_modules: TargetModules,
    /// Scale by `lora_alpha / sqrt(r)` instead.
    pub use_rslora: bool,
    /// Whether the base stores its linear layers transposed (GPT-2's `Conv1D`); A and B are the same either way.
    pub fan_in_fan_out: bool,
    rank_pattern: Patterns<usize>,
    alpha_pattern: Patterns<f64>,
    /// Where it was read from, for complaints.
    source: String,
}

impl AdapterConfig {
    /// The adapter that a recipe trains.
    pub fn of_recipe(model: &Model, adapter: &Adapter) -> Self {
        Self {
            base_model_name_or_path: Some(model.base.clone()),
            revision: Some(model.revision.clone()),
            r: adapter.r,
            lora_alpha: adapter.lora_alpha,
            lora_dropout: adapter.lora_dropout,
            target_modules: adapter.target_modules.clone(),
            use_rslora: adapter.use_rslora,
            fan_in_fan_out: false,
            rank_pattern: Patterns::none(),
            alpha_pattern: Patterns::none(),
            source: "adapter".into(),
        }
    }

    /// Reads an adapter folder's config. Unknown fields are ignored; those that would change what the adapter
    /// computes are refused.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the field.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let map = object_file(&path)?;
        let keys = Keys::of(&path, &map);
        match keys.text("peft_type")? {
            Some("LORA") => {}
            Some(other) => return Err(keys.bad("peft_type", &format!("{other:?} is not read; LORA is"))),
            None => return Err(keys.missing("peft_type")),
        }
        if let Some(field) = UNREAD.into_iter().find(|field| keys.raw(field).is_some_and(|value| !is_empty(value))) {
            return Err(keys.bad(field, "adapters that use it are not read; merge it into its base with PEFT first"));
        }
        if keys.text("bias")?.is_some_and(|bias| bias != "none") {
            return Err(keys.bad("bias", "adapters with trained biases are not read; \"none\" is"));
        }
        if let Some(Value::String(init)) = keys.raw("init_lora_weights")
            && !PLAIN_INITS.contains(&init.as_str())
        {
            let reason = format!("{init:?} changes the base's weights, too; convert the adapter with PEFT first");
            return Err(keys.bad("init_lora_weights", &reason));
        }
        let target_modules = |value: &Value| serde_json::from_value(value.clone()).ok();
        Ok(Self {
            base_model_name_or_path: keys.text("base_model_name_or_path")?.map(str::to_string),
            revision: keys.text("revision")?.map(str::to_string),
            r: keys.size("r")?,
            lora_alpha: keys.positive("lora_alpha")?.ok_or_else(|| keys.missing("lora_alpha"))?,
            lora_dropout: keys.number("lora_dropout")?.unwrap_or(0.0),
            target_modules: keys
                .typed("target_modules", "a text or a list of texts", target_modules)?
                .ok_or_else(|| keys.missing("target_modules"))?,
            use_rslora: keys.flag("use_rslora")?.unwrap_or(false),
            fan_in_fan_out: keys.flag("fan_in_fan_out")?.unwrap_or(false),
            rank_pattern: patterns(&keys, "rank_pattern", |keys, name| keys.size(name))?,
            alpha_pattern: patterns(&keys, "alpha_pattern", |keys, name| {
                keys.positive(name)?.ok_or_else(|| keys.missing(name))
            })?,
            source: path.display().to_string(),
        })
    }

    /// Where it was read from.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// The rank of a module's matrices.
    pub fn rank_of(&self, module: &str) -> Result<usize> {
        Ok(self.rank_pattern.of(module).map_err(|e| self.bad("rank_pattern", &e))?.unwrap_or(self.r))
    }

    /// The alpha of a module.
    pub fn alpha_of(&self, module: &str) -> Result<f64> {
        Ok(self.alpha_pattern.of(module).map_err(|e| self.bad("alpha_pattern", &e))?.unwrap_or(self.lora_alpha))
    }

    /// What `B·A` is multiplied with before it is added to a module's weight.
    pub fn scale_of(&self, module: &str) -> Result<f64> {
        let (alpha, rank) = (self.alpha_of(module)?, self.rank_of(module)? as f64);
        Ok(alpha / if self.use_rslora { rank.sqrt() } else { rank })
    }

    /// The modules among these that PEFT would adapt.
    pub(super) fn targets<'m>(&self, modules: impl Iterator<Item = &'m str>) -> Result<Vec<&'m str>> {
        let bad = |e: String| self.bad("target_modules", &e);
        let matcher = Matcher::new(&self.target_modules).map_err(bad)?;
        let mut targets = Vec::new();
        for module in modules {
            if matcher.matches(module).map_err(bad)? {
                targets.push(module);
            }
        }
        Ok(targets)
    }

    /// The file's text, its fields sorted as PEFT sorts them.
    pub fn to_text(&self) -> String {
        let ranks: Map<String, Value> = self.rank_pattern.entries().map(|(k, v)| (k.to_string(), json!(v))).collect();
        let alphas: Map<String, Value> = self.alpha_pattern.entries().map(|(k, v)| (k.to_string(), whole(v))).collect();
        let fields = json!({
            "alpha_pattern": alphas,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_to_transform": null,
            "lora_alpha": whole(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": ranks,
            "revision": self.revision,
            "target_modules": self.target_modules,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.use_rslora,
        });
        format!("{fields:#}\n")
    }

    fn bad(&self, field: &str, reason: &str) -> Error {
        Error::input(format!("{}: {field}: {reason}", self.source))
    }
}

/// PEFT types alpha as an integer: 16.0 is written as 16.
fn whole(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 { json!(number as i64) } else { json!(number) }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn patterns<T: Copy>(keys: &Keys, field: &str, take: impl Fn(&Keys, &str) -> Result<T>) -> Result<Patterns<T>> {
    let mut entries = Vec::new();
    if let Some(inner) = keys.object(field)? {
        let count = inner.names().count();
        if count > MAX_PATTERNS {
            return Err(keys.bad(field, &format!("{count} patterns, and at most {MAX_PATTERNS} are read")));
        }
        for name in inner.names() {
            entries.push((name.to_string(), take(&inner, name)?));
        }
    }
    Patterns::new(entries).map_err(|e| keys.bad(field, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<AdapterConfig> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), text).unwrap();
        AdapterConfig::read(folder.path())
    }

    /// A plain config with one field set.
    fn with(field: &str, value: Value) -> Result<AdapterConfig> {
        let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]});
        config[field] = value;
        read(&config.to_string())
    }

    #[test]
    fn scale_is_pefts() {
        assert_eq!(with("x", json!(1)).unwrap().scale_of("a.q_proj").unwrap(), 2.0);
        assert_eq!(with("use_rslora", json!(true)).unwrap().scale_of("a.q_proj").unwrap(), 4.0);
        let ranks = with("rank_pattern", json!({"q_proj": 16})).unwrap();
        assert_eq!((ranks.rank_of("a.q_proj").unwrap(), ranks.rank_of("a.k_proj").unwrap()), (16, 4));
        assert_eq!(ranks.scale_of("a.q_proj").unwrap(), 0.5);
        let alphas = with("alpha_pattern", json!({"layers.0.*q_proj": 1})).unwrap();
        assert_eq!(alphas.scale_of("model.layers.0.self_attn.q_proj").unwrap(), 0.25);
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let mut config = with("rank_pattern", json!({"q_proj": 16, "b.*": 2})).unwrap();
        config.lora_alpha = 2.5;
        config.base_model_name_or_path = Some("owner/name".into());
        (config.use_rslora, config.fan_in_fan_out) = (true, true);
        let text = config.to_text();
        assert_eq!(read(&text).unwrap().to_text(), text);
        assert!(
            text.starts_with("{\n  \"alpha_pattern\": {},\n  \"base_model_name_or_path\": \"owner/name\""),
            "{text}"
        );
        config.lora_alpha = 16.0;
        assert!(config.to_text().contains("\"lora_alpha\": 16,"));
        let fields: Map<String, Value> = serde_json::from_str(&text).unwrap();
        let names: Vec<_> = fields.keys().collect();
        assert!(names.is_sorted(), "{names:?}");
    }

    #[test]
    fn what_would_compute_something_else_is_refused() {
        let cases = [
            ("peft_type", json!("IA3"), "peft_type: \"IA3\" is not read"),
            ("use_dora", json!(true), "use_dora: adapters that use it"),
            ("bias", json!("all"), "bias: adapters with trained biases"),
            ("modules_to_save", json!(["lm_head"]), "modules_to_save: adapters"),
            ("layers_to_transform", json!([1]), "layers_to_transform: adapters"),
            ("lora_bias", json!(true), "lora_bias: adapters"),
            ("init_lora_weights", json!("pissa"), "init_lora_weights: \"pissa\" changes the base"),
            ("r", json!(0), "r: 0 is not a whole number"),
            ("r", Value::Null, "r: it is missing"),
            ("lora_alpha", json!("8"), "lora_alpha: \"8\" is not a positive number"),
            ("target_modules", json!(3), "target_modules: 3 is not a text or a list"),
            ("target_modules", Value::Null, "target_modules: it is missing"),
            ("rank_pattern", json!({"q_proj": -1}), "rank_pattern.q_proj: -1 is not"),
            ("rank_pattern", json!({"(": 1}), "rank_pattern: "),
        ];
        for (field, value, reason) in cases {
            let error = with(field, value).expect_err(reason);
            assert!(error.to_string().contains(&format!("{FILE}: {reason}")), "said {error}, not {reason}");
            assert_eq!(error.exit_code(), 3);
        }
        assert!(with("init_lora_weights", json!("gaussian")).is_ok());
        assert!(with("modules_to_save", json!([])).is_ok());
    }
}
