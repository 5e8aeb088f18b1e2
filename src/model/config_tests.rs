//! Configs: what is stated, what is not, and what is refused.

use super::*;
use serde_json::json;

fn read(config: &Value) -> Result<Config> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    Config::read(folder.path())
}

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 100, "rms_norm_eps": 1e-5, "max_position_embeddings": 512
    })
}

fn with(key: &str, value: Value) -> Value {
    let mut config = llama();
    config[key] = value;
    config
}

#[test]
fn what_is_not_stated_has_transformers_defaults() {
    let config = read(&llama()).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim), (4, 16));
    assert_eq!(config.ropes, [Rope { dim: 16, theta: 10_000.0, scaling: RopeScaling::None }]);
    assert_eq!(config.layers, [LayerTraits { window: None, rope: Some(0), scale: 0.25 }; 2]);
    assert!(!config.tie_word_embeddings && !config.qkv_bias && !config.output_bias && !config.mlp_bias);
    assert_eq!(config.bos_token_id, None);
}

#[test]
fn what_is_stated_is_kept() {
    let mut config = llama();
    config["num_key_value_heads"] = json!(2);
    config["head_dim"] = json!(32);
    config["tie_word_embeddings"] = json!(true);
    config["bos_token_id"] = json!(1);
    let config = read(&config).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim, config.tie_word_embeddings), (2, 32, true));
    assert_eq!(config.bos_token_id, Some(1));
}

fn with_all(entries: &[(&str, Value)]) -> Config {
    let mut config = llama();
    entries.iter().for_each(|(key, value)| config[*key] = value.clone());
    read(&config).unwrap()
}

fn windows(entries: &[(&str, Value)]) -> Vec<Option<usize>> {
    with_all(entries).layers.iter().map(|layer| layer.window).collect()
}

#[test]
fn windows_are_each_familys_own() {
    let (window, four) = (("sliding_window", json!(7)), ("num_hidden_layers", json!(4)));
    let family = |name: &str| ("model_type", json!(name));
    assert_eq!(windows(std::slice::from_ref(&window)), [None, None]);
    let all = |value: Value| windows(&[family("mistral"), ("sliding_window", value)]);
    assert_eq!(windows(&[family("mistral")]), [Some(4096); 2]);
    assert_eq!((all(json!(7)), all(Value::Null)), (vec![Some(7); 2], vec![None; 2]));
    let types = ("layer_types", json!(["sliding_attention", "full_attention"]));
    assert_eq!(windows(&[family("mistral"), window.clone(), types.clone()]), [Some(7), None]);

    let qwen = [family("qwen2"), window.clone(), ("max_window_layers", json!(1))];
    assert_eq!(windows(&qwen), [None, None]);
    let used = ("use_sliding_window", json!(true));
    assert_eq!(windows(&[&qwen[..], std::slice::from_ref(&used)].concat()), [None, Some(7)]);
    assert_eq!(windows(&[&qwen[..], &[used.clone(), types]].concat()), [Some(7), None]);

    assert_eq!(windows(&[family("gemma2"), window.clone(), four.clone()]), [Some(7), None, Some(7), None]);
    let gemma3 = [family("gemma3_text"), window.clone(), four.clone(), ("sliding_window_pattern", json!(3))];
    assert_eq!(windows(&gemma3), [Some(7), Some(7), None, Some(7)]);
    let turns = |config: &Config| config.layers.iter().map(|layer| layer.rope).collect::<Vec<_>>();
    assert_eq!(turns(&with_all(&gemma3)), [Some(1), Some(1), Some(0), Some(1)]);

    let smollm = [family("smollm3"), window, four, used];
    assert_eq!(windows(&smollm), [None, None, None, Some(7)]);
    assert_eq!(turns(&with_all(&smollm)), [Some(0), Some(0), Some(0), None]);
    let stated = with_all(&[&smollm[..], &[("no_rope_layers", json!([0, 1, 1, 0, 1]))]].concat());
    assert_eq!(turns(&stated), [None, Some(0), Some(0), None]);
}

#[test]
fn what_a_family_leaves_unstated_has_its_own_defaults() {
    let gemma = with_all(&[("model_type", json!("gemma2"))]);
    assert_eq!((gemma.head_dim, gemma.embedding_scale, gemma.layers[0].scale), (256, 8.0, 0.0625));
    assert_eq!((gemma.score_cap, gemma.logit_cap, gemma.tie_word_embeddings), (Some(50.0), Some(30.0), true));
    let uncapped = with_all(&[("model_type", json!("gemma2")), ("attn_logit_softcapping", Value::Null)]);
    assert_eq!((uncapped.score_cap, uncapped.logit_cap), (None, Some(30.0)));
    let gemma = with_all(&[("model_type", json!("gemma3_text")), ("rope_theta", json!(5e5))]);
    assert_eq!(gemma.ropes.iter().map(|rope| rope.theta).collect::<Vec<_>>(), [5e5, 1e4]);

    let neox = with_all(&[("model_type", json!("gpt_neox")), ("layer_norm_eps", json!(1e-5)), ("head_dim", json!(16))]);
    assert_eq!((neox.ropes[0].dim, neox.side_by_side, neox.qkv_bias, neox.mlp_bias), (4, true, true, true));
    let part = [("model_type", json!("gpt_neox")), ("layer_norm_eps", json!(1e-5)), ("rotary_pct", json!(0.5))];
    assert_eq!(with_all(&part).ropes[0].dim, 8);

    let fast = with_all(&[("hidden_act", json!("gelu_fast"))]);
    assert_eq!(fast.activation, Activation::GeluTanh);

    let gpt = json!({
        "model_type": "gpt2", "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 50,
        "layer_norm_epsilon": 1e-5, "scale_attn_by_inverse_layer_idx": true
    });
    let gpt = read(&gpt).unwrap();
    assert_eq!((gpt.intermediate_size, gpt.ropes.len(), gpt.activation), (96, 0, Activation::GeluTanh));
    assert_eq!(gpt.layers[2], LayerTraits { window: None, rope: None, scale: 1.0 / 6f64.sqrt() / 3.0 });
    assert_eq!(gpt.longest_exact().unwrap().0, 32);
    let linears: Vec<_> = gpt.linears(1).into_iter().map(|l| (l.module, l.inputs, l.outputs)).collect();
    let module = |name: &str| format!("transformer.h.1.{name}");
    let expected = [("attn.c_attn", 24, 72), ("attn.c_proj", 24, 24), ("mlp.c_fc", 24, 96), ("mlp.c_proj", 96, 24)];
    assert_eq!(linears, expected.map(|(name, inputs, outputs)| (module(name), inputs, outputs)));
    assert_eq!((gpt.modules().len(), gpt.modules()[12].clone()), (13, ("lm_head".to_string(), 24, 50)));
}

#[test]
fn bad_configs_name_the_key() {
    let rope = |value: Value| with("rope_scaling", value);
    let family = |name: &str, key: &str, value: Value| {
        let mut config = with(key, value);
        config["model_type"] = json!(name);
        config
    };
    let cases = [
        (with("model_type", json!("gemma3")), "model_type: \"gemma3\" is not read; llama, mistral, qwen2"),
        (with("model_type", Value::Null), "model_type: it is missing"),
        (with("hidden_act", json!("relu")), "hidden_act: \"relu\" is not read; silu, gelu"),
        (with("use_bidirectional_attention", json!(true)), "use_bidirectional_attention: models that look ahead"),
        (family("qwen2", "layer_types", json!(["full_attention"])), "layer_types: it tells of 1 layers, there are 2"),
        (family("qwen2", "layer_types", json!(["full_attention", "x"])), "layer_types: \"x\" is not read; full"),
        (family("smollm3", "no_rope_layers", json!([1])), "no_rope_layers: it tells of 1 of 2 layers"),
        (family("smollm3", "no_rope_layers", json!(["1", "0"])), "no_rope_layers: [\"1\",\"0\"] is not a list of 0"),
        (family("gemma2", "final_logit_softcapping", json!(-1)), "final_logit_softcapping: -1 is not a positive"),
        (family("granite", "residual_multiplier", json!(0)), "residual_multiplier: 0 is not a positive number"),
        (family("phi3", "partial_rotary_factor", json!(0.2)), "partial_rotary_factor: 3 is odd"),
        (family("phi3", "partial_rotary_factor", json!(1.5)), "partial_rotary_factor: 24 of a head's 16 coordinates"),
        (
            family("phi3", "rope_scaling", json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]})),
            "rope_scaling.short_factor: it has 1 numbers, 16 coordinates turn in pairs",
        ),
        (
            family("phi3", "rope_scaling", json!({"type": "longrope", "short_factor": [0.0]})),
            "rope_scaling.short_factor: [0.0] is not a list of positive numbers",
        ),
        (with("hidden_size", json!("64")), "hidden_size: \"64\" is not a whole number"),
        (with("hidden_size", json!(0)), "hidden_size: 0 is not a whole number from 1"),
        (with("hidden_size", json!(-4)), "hidden_size: -4 is not"),
        (with("hidden_size", json!(1u64 << 40)), "hidden_size: 1099511627776 is not"),
        (with("hidden_size", json!(66)), "hidden_size: it is no multiple"),
        (with("hidden_size", json!(12)), "head_dim: 3 is odd"),
        (with("num_hidden_layers", json!(2.5)), "num_hidden_layers: 2.5 is not"),
        (with("num_hidden_layers", json!(10_001)), "num_hidden_layers: 10001 are more than the 10000 that are read"),
        (family("qwen2", "max_window_layers", json!("1")), "max_window_layers: \"1\" is not a whole number"),
        (with("vocab_size", Value::Null), "vocab_size: it is missing"),
        (with("num_key_value_heads", json!(3)), "num_key_value_heads: 3 does not divide"),
        (with("rms_norm_eps", json!(0)), "rms_norm_eps: 0 is not a positive number"),
        (with("rms_norm_eps", json!(1e300)), "rms_norm_eps: 1e+300 is not a positive number"),
        (with("tie_word_embeddings", json!("yes")), "tie_word_embeddings: \"yes\" is not true or false"),
        (with("bos_token_id", json!([2, -1])), "bos_token_id: [2,-1] is not a token id"),
        (with("rope_theta", json!(0.5)), "rope_theta: 0.5 is not above 1"),
        (with("partial_rotary_factor", json!(0.5)), "partial_rotary_factor: heads that rotate in part"),
        (with("rope_scaling", json!([1])), "rope_scaling: [1] is not an object"),
        (rope(json!({"type": "longrope", "factor": 2})), "rope_scaling.rope_type: \"longrope\" is not read"),
        (rope(json!({"type": "linear"})), "rope_scaling.factor: it is missing"),
        (rope(json!({"type": "dynamic", "factor": 0.5})), "rope_scaling.factor: 0.5 is below 1"),
        (rope(json!({"rope_type": "llama3", "factor": 8})), "rope_scaling.low_freq_factor: it is missing"),
        (
            rope(json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})),
            "rope_scaling.high_freq_factor: it is not above",
        ),
        (with("rope_parameters", json!({"rope_type": "yarn", "factor": "4"})), "rope_parameters.factor: \"4\" is not"),
    ];
    for (config, reason) in cases {
        let error = read(&config).expect_err(reason);
        let said = error.to_string();
        assert!(said.contains(&format!("config.json: {reason}")), "said {said:?}, not {reason:?}");
        assert_eq!(error.exit_code(), 3);
    }
}

#[test]
fn frequencies_are_those_of_transformers() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("../../tests/fixtures/rope.json")).unwrap();
    for case in &cases {
        let config = read(&case["config"]).unwrap();
        let seq_len = case["seq_len"].as_u64().unwrap() as usize;
        let number = usize::from(case["of_sliding_layers"] == true);
        let (ours, factor) = config.ropes[number].inverse_frequencies(seq_len);
        let theirs = case["inverse_frequencies"].as_array().unwrap();
        assert_eq!(ours.len(), theirs.len());
        let pairs = ours.into_iter().chain([factor]).zip(theirs.iter().chain([&case["attention_factor"]]));
        for (i, (ours, theirs)) in pairs.enumerate() {
            let (ours, theirs) = (f64::from(ours), theirs.as_f64().unwrap());
            let error = ((ours - theirs) / theirs).abs();
            assert!(error <= 1e-6, "{} at {seq_len}, number {i}: {ours} for {theirs}", case["name"]);
        }
    }
    assert!(cases.len() >= 24);
}
