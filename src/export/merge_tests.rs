use super::*;
use crate::export::AdapterConfig;
use crate::store::verify;

const CONFIG: &str = r#"{"model_type":"llama","hidden_size":4,"intermediate_size":6,"num_hidden_layers":1,
    "num_attention_heads":2,"vocab_size":5,"rms_norm_eps":1e-5,"max_position_embeddings":8,"dtype":"bfloat16"}"#;

/// Quarters between -1 and 1: every sum and product here is exact in f32 and bf16.
fn value(i: usize) -> f32 {
    (i * 5 % 9) as f32 / 4.0 - 1.0
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(value).collect()
}

/// A base of an embedding, a norm (f32), two adapted matrices and a head.
fn base() -> (tempfile::TempDir, ModelFolder) {
    base_with(&[])
}

/// The same with more tensors; those of other formats hold bytes that count up.
fn base_with(more: &[(&str, Stored, &[usize])]) -> (tempfile::TempDir, ModelFolder) {
    let folder = tempfile::tempdir().unwrap();
    let own: [(&str, Stored, &[usize]); 5] = [
        ("model.norm.weight", DType::F32.into(), &[4]),
        ("model.embed_tokens.weight", DType::BF16.into(), &[5, 4]),
        ("model.layers.0.mlp.up_proj.weight", DType::BF16.into(), &[6, 4]),
        ("model.layers.0.mlp.down_proj.weight", DType::BF16.into(), &[4, 6]),
        ("lm_head.weight", DType::BF16.into(), &[5, 4]),
    ];
    let entry = |(name, stored, shape): &(&str, Stored, &[usize])| (name.to_string(), *stored, shape.to_vec());
    let entries: Vec<_> = own.iter().chain(more).map(entry).collect();
    let mut writer = SafetensorsWriter::create(&folder.path().join("model.safetensors"), &entries, &[]).unwrap();
    for (name, stored, shape) in &entries {
        let elements: usize = shape.iter().product();
        let mut bytes = Vec::new();
        match stored {
            Stored::Float(dtype) => dtype.encode(&values(elements), &mut bytes),
            Stored::Other(_) => bytes.extend((0..).take(elements * stored.name_and_size().1)),
        }
        writer.write(name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    fs::write(folder.path().join(COMPANIONS[0]), "for tools").unwrap();
    fs::write(folder.path().join("optimizer.bin"), "not ours").unwrap();
    let model = ModelFolder::open(folder.path()).unwrap();
    (folder, model)
}

fn matrix(module: &str, input: usize, output: usize) -> AdapterMatrix {
    let (a, b) = (values(2 * input), values(output * 2));
    AdapterMatrix { module: module.into(), a, b, r: 2, input, output }
}

/// Rank 2, scale 4.
fn adapter() -> AdapterFolder {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"peft_type":"LORA","r":2,"lora_alpha":8,"target_modules":["up_proj","down_proj"]}"#;
    fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    AdapterFolder {
        config: AdapterConfig::read(folder.path()).unwrap(),
        matrices: vec![matrix("model.layers.0.mlp.up_proj", 4, 6), matrix("model.layers.0.mlp.down_proj", 6, 4)],
    }
}

/// `W + 4·B·A`, element by element.
fn expected(matrix: &AdapterMatrix) -> Vec<f32> {
    let element = |i: usize, j: usize| {
        let sum: f32 = (0..2).map(|k| matrix.b[i * 2 + k] * matrix.a[k * matrix.input + j]).sum();
        value(i * matrix.input + j) + 4.0 * sum
    };
    (0..matrix.output).flat_map(|i| (0..matrix.input).map(move |j| element(i, j))).collect()
}

#[test]
fn the_adapted_matrices_change_and_nothing_else() {
    let (_folder, base) = base();
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("merged");
    let adapter = adapter();
    merge(&base, &adapter, &out, None, &|| Ok(())).unwrap();
    let merged = ModelFolder::open(&out).unwrap();
    assert!(merged.names().eq(base.names()));
    for name in base.names() {
        let (before, after) = (base.plain(name).unwrap(), merged.plain(name).unwrap());
        assert_eq!((before.dtype, &before.shape), (after.dtype, &after.shape), "{name}");
        match adapter.matrices.iter().find(|matrix| format!("{}.weight", matrix.module) == name) {
            Some(matrix) => assert_eq!(after.to_f32(), expected(matrix), "{name}"),
            None => assert_eq!(after.bytes(), before.bytes(), "{name}"),
        }
    }
    verify(&out).unwrap();
    let mut files: Vec<_> = fs::read_dir(&out).unwrap().map(|f| f.unwrap().file_name()).collect();
    files.sort();
    let templates = "additional_chat_templates";
    assert_eq!(files, [templates, "config.json", "manifest.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read_to_string(out.join(COMPANIONS[0])).unwrap(), "for tools");
    assert!(fs::read_to_string(out.join("config.json")).unwrap().contains("\"dtype\": \"bfloat16\""));
    let said = merge(&base, &adapter, &out, None, &|| Ok(())).unwrap_err();
    assert!(said.to_string().contains("exists already") && said.exit_code() == 2);
}

#[test]
fn shards_hold_the_same_tensors() {
    let (_folder, base) = base();
    let place = tempfile::tempdir().unwrap();
    let (one, many) = (place.path().join("one"), place.path().join("many"));
    merge(&base, &adapter(), &one, Some(DType::F32), &|| Ok(())).unwrap();
    merge_in_shards(&base, &adapter(), &many, Some(DType::F32), 200, &|| Ok(())).unwrap();
    assert!(many.join("model-00003-of-00003.safetensors").exists());
    let (one, many) = (ModelFolder::open(&one).unwrap(), ModelFolder::open(&many).unwrap());
    assert!(one.names().eq(many.names()));
    for name in one.names() {
        let (a, b) = (one.plain(name).unwrap(), many.plain(name).unwrap());
        assert_eq!((a.dtype, a.bytes()), (DType::F32, b.bytes()), "{name}");
    }
    let config = fs::read_to_string(many.path().join("config.json")).unwrap();
    assert!(config.contains("\"dtype\": \"float32\"") && !config.contains("torch_dtype"), "{config}");
}

#[test]
fn what_is_no_weight_is_copied_whatever_the_type() {
    let types: Vec<&str> = "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ U16 I16 U32 I32 U64 I64 F64 C64"
        .split(' ')
        .collect();
    let more: Vec<(&str, Stored, &[usize])> =
        types.iter().map(|name| (*name, Stored::Other(name), &[1, 3, 1][..])).collect();
    let (_folder, base) = base_with(&more);
    let place = tempfile::tempdir().unwrap();
    for (name, dtype) in [("own", None), ("f32", Some(DType::F32))] {
        let out = place.path().join(name);
        merge_in_shards(&base, &adapter(), &out, dtype, 100, &|| Ok(())).unwrap();
        let merged = ModelFolder::open(&out).unwrap();
        assert!(merged.names().eq(base.names()));
        for name in &types {
            let (before, after) = (base.raw(name).unwrap(), merged.raw(name).unwrap());
            assert_eq!((before.stored, before.shape), (after.stored, after.shape), "{name}");
            assert_eq!(before.bytes, after.bytes, "{name}");
        }
    }
}

#[test]
fn what_is_written_names_no_python_files() {
    let (folder, base) = base();
    let config = CONFIG.replace('{', r#"{"auto_map":{"AutoModelForCausalLM":"modeling_other.Other"},"#);
    fs::write(folder.path().join("config.json"), config).unwrap();
    let tokenizer = r#"{"auto_map":{"AutoTokenizer":["tokenization_other.Other",null]},"eos_token":"</s>"}"#;
    fs::write(folder.path().join("tokenizer_config.json"), tokenizer).unwrap();
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("merged");
    merge(&base, &adapter(), &out, None, &|| Ok(())).unwrap();
    let written = |name: &str| object_file(&out.join(name)).unwrap();
    assert!(!written("config.json").contains_key(AUTO_MAP));
    assert_eq!(Value::Object(written("tokenizer_config.json")), json!({"eos_token": "</s>"}));
    verify(&out).unwrap();
}

#[test]
fn a_tensor_without_rows_stays_without() {
    let shapes = [("a", [0, 1 << 61]), ("b", [1 << 60, 0])];
    let (_folder, base) = base_with(&shapes.each_ref().map(|(name, shape)| (*name, DType::F32.into(), &shape[..])));
    let place = tempfile::tempdir().unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let out = place.path().join(dtype.to_string());
        merge(&base, &adapter(), &out, Some(dtype), &|| Ok(())).unwrap();
        let merged = ModelFolder::open(&out).unwrap();
        for (name, shape) in &shapes {
            assert_eq!(merged.raw(name).unwrap().shape, shape);
        }
    }
}

#[test]
fn what_cannot_be_merged_leaves_nothing() {
    let (folder, base) = base();
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("merged");
    let said = |adapter: &AdapterFolder, dtype| {
        let error = merge(&base, adapter, &out, dtype, &|| Ok(())).unwrap_err();
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "{error}");
        assert_eq!(error.exit_code(), 3);
        error.to_string()
    };
    let mut huge = adapter();
    huge.matrices[0].b[0] = 1e6;
    assert!(said(&huge, Some(DType::F16)).contains("up_proj.weight\": the value"));
    let mut other = adapter();
    other.matrices[0].module = "model.layers.1.mlp.up_proj".into();
    assert!(said(&other, None).contains("made for another base"));
    let mut head = adapter();
    head.matrices.push(matrix("lm_head", 4, 5));
    fs::write(folder.path().join("config.json"), CONFIG.replace('{', "{\"tie_word_embeddings\":true,")).unwrap();
    assert!(said(&head, None).contains("the head is the embedding"));
}

#[test]
fn rows_are_added_whatever_the_block() {
    let matrix = matrix("m", 3, 7);
    let whole = {
        let mut rows = vec![0.0; 21];
        add(&matrix, 0.5, 0, &mut rows);
        rows
    };
    let mut tail = vec![0.0; 6];
    add(&matrix, 0.5, 5, &mut tail);
    assert_eq!(tail, whole[15..]);
    let mut transposed = vec![0.0; 14];
    add_transposed(&matrix, 0.5, 1, &mut transposed);
    let expected = (1..3).flat_map(|input| (0..7).map(move |output| output * 3 + input));
    assert!(transposed.iter().copied().eq(expected.map(|at| whole[at])));
}

#[test]
fn what_a_dead_export_left_goes_before_room_is_asked_for() {
    let place = tempfile::tempdir().unwrap();
    let (out, left) = (place.path().join("out"), place.path().join(".out.incomplete"));
    fs::create_dir(&left).unwrap();
    assert_eq!(begin(&out, 1 << 60).unwrap_err().exit_code(), 4);
    assert!(!left.exists() && !out.exists());
}
