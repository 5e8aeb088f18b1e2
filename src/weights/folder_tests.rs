use super::*;
use safetensors::tensor::{Dtype, TensorView};

fn write(path: &Path, tensors: &[&str]) {
    let data = [0u8, 0, 128, 63];
    let views = tensors.iter().map(|name| (*name, TensorView::new(Dtype::F32, vec![1], &data).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Two shards, `a` and `b` in the first, `c` in the second, with this `weight_map`.
fn sharded(weight_map: &str) -> (tempfile::TempDir, Result<ModelFolder>) {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("one.safetensors"), &["a", "b"]);
    write(&folder.path().join("two.safetensors"), &["c"]);
    std::fs::write(folder.path().join(INDEX), format!(r#"{{"metadata":{{}},"weight_map":{weight_map}}}"#)).unwrap();
    let opened = ModelFolder::open(folder.path());
    (folder, opened)
}

#[test]
fn shards_are_one_model() {
    let (_folder, model) = sharded(r#"{"c":"two.safetensors","a":"one.safetensors","b":"one.safetensors"}"#);
    let model = model.unwrap();
    assert_eq!(model.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(model.total_bytes(), 12);
    let tensor = model.tensor("c").unwrap();
    assert_eq!((&*tensor.format, tensor.shape.as_slice(), tensor.to_f32()), ("f32", &[1][..], vec![1.0]));
    assert!(!model.has("d") && model.tensor("d").unwrap_err().to_string().contains("no tensor \"d\""));
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_refused() {
    let all = r#""a":"one.safetensors","b":"one.safetensors""#;
    let cases = [
        (format!(r#"{{{all},"c":"three.safetensors"}}"#), "\"three.safetensors\" that it names is missing"),
        (format!(r#"{{{all},"c":"one.safetensors"}}"#), "\"c\" is not in \"one.safetensors\""),
        (format!(r#"{{{all},"c":"two.safetensors","d":"two.safetensors"}}"#), "\"d\" is not in"),
        (r#"{"a":"one.safetensors","c":"two.safetensors"}"#.into(), "\"b\" of \"one.safetensors\" is not in the"),
        (format!(r#"{{{all},"c":"../two.safetensors"}}"#), "not the name of a file in this folder"),
        (format!(r#"{{{all},"c":"/etc/passwd"}}"#), "not the name of a file in this folder"),
        (format!(r#"{{{all},"c":".."}}"#), "not the name of a file in this folder"),
        (format!(r#"{{{all},"c":""}}"#), "not the name of a file in this folder"),
        (format!(r#"{{{all},"c":"two.safetensors","c":"one.safetensors"}}"#), "\"c\" stands twice"),
        ("{}".into(), "names no tensor"),
        (r#"{"a":1}"#.into(), "invalid type"),
        ("[]".into(), "invalid type"),
    ];
    for (weight_map, reason) in cases {
        let (_folder, opened) = sharded(&weight_map);
        let said = opened.unwrap_err().to_string();
        assert!(said.contains(reason) && said.contains(INDEX), "{weight_map}: said {said:?}, not {reason:?}");
    }
}

#[test]
fn one_tensor_in_two_shards_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("one.safetensors"), &["a", "b"]);
    write(&folder.path().join("two.safetensors"), &["b"]);
    let index = r#"{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
    std::fs::write(folder.path().join(INDEX), index).unwrap();
    let said = ModelFolder::open(folder.path()).unwrap_err().to_string();
    assert!(said.contains("\"b\" stands in both \"one.safetensors\" and \"two.safetensors\""), "{said}");
}

#[test]
fn folders_of_other_kinds_are_refused_with_a_remedy() {
    let cases = [
        ("pytorch_model.bin", "", "save_pretrained"),
        ("model.pth", "", "pickle"),
        ("x.Q4_K_M.gguf", "", "x.Q4_K_M.gguf"),
        ("adapter_config.json", "{}", "holds an adapter"),
        ("model-00001-of-00002.safetensors", "", "download the missing file"),
        ("notes.txt", "", "no weights here"),
    ];
    for (name, text, reason) in cases {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), text).unwrap();
        let said = ModelFolder::open(folder.path()).unwrap_err().to_string();
        assert!(said.contains(reason), "{name}: said {said:?}, not {reason:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    assert!(ModelFolder::open(&file).unwrap_err().to_string().contains("no such folder"));
    std::fs::write(&file, "GGUF").unwrap();
    assert!(ModelFolder::open(&file).unwrap_err().to_string().contains("cut short"));
}

#[test]
fn methods_that_are_not_read_are_refused_by_name() {
    let cases = [
        (r#"{"quantization_config":{"quant_method":"aqlm"}}"#, "method \"aqlm\", which is not read"),
        (r#"{"quantization_config":{"load_in_4bit":true}}"#, "method \"unnamed\""),
        (r#"{"quantization_config":{"quant_method":"gptq","bits":3}}"#, "bits: 3 is not read"),
        (r#"{"quantization_config":{"quant_method":"gptq","bits":4}}"#, "(gptq), but no tensor is stored"),
        (r#"{"quantization_config":{"quant_method":"awq","version":"gemv"}}"#, "version: \"gemv\" is not read"),
        (r#"{"quantization":{"bits":4,"group_size":64}}"#, "(MLX), but no tensor"),
        ("{", "config.json: not a JSON object"),
    ];
    for (config, reason) in cases {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join(SINGLE), &["a"]);
        std::fs::write(folder.path().join(CONFIG), config).unwrap();
        let error = ModelFolder::open(folder.path()).unwrap_err();
        assert!(error.to_string().contains(reason) && error.exit_code() == 3, "{config}: said {error}");
    }
}

#[test]
fn other_number_formats_are_refused_by_tensor_name() {
    let folder = tempfile::tempdir().unwrap();
    let view = TensorView::new(Dtype::F64, vec![1], &[0; 8]).unwrap();
    safetensors::serialize_to_file([("norm.weight", view)], None, &folder.path().join(SINGLE)).unwrap();
    let model = ModelFolder::open(folder.path()).unwrap();
    let said = model.tensor("norm.weight").unwrap_err().to_string();
    assert!(said.contains("\"norm.weight\" is stored as F64"), "{said}");
}

#[test]
fn the_fingerprint_sees_every_byte_of_weights_and_config() {
    let (folder, model) = sharded(r#"{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors"}"#);
    let first = model.unwrap().fingerprint().unwrap();
    let again = || ModelFolder::open(folder.path()).unwrap().fingerprint().unwrap();
    assert_eq!(first, again());
    let path = folder.path().join("two.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let second = again();
    assert_ne!(first, second);
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    assert_ne!(second, again());
}
