#!/usr/bin/env python3
"""Bases of random weights with real shapes, written at the speed of the disk: Llama in bf16 or in bitsandbytes' NF4.

    benches/gpu/bases.py NAME OUT --tokenizer FOLDER

NAME is a shape of SHAPES with `-nf4` behind it for NF4 with doubly quantised scales (embedding and head stay bf16). Needs
Python's own library alone. The numbers are one block of normal ones at shifting offsets: good for time and memory, not for
quality.
"""
import argparse, json, pathlib, random, shutil, struct

# hidden, intermediate, layers, heads, key heads, head dim, vocabulary, tied
SHAPES = {
    "tiny": (64, 160, 2, 4, 2, 16, 2048, True),
    "small-20m": (256, 704, 8, 8, 4, 32, 49_152, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128_256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, 128_256, True),
    "llama-3.1-8b": (4096, 14_336, 32, 32, 8, 128, 128_256, False),
}
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
BLOCK, NESTED = 64, 256
SHARD = 2 << 30


def bf16(value):
    return struct.pack("<f", value)[2:]


class Pool:
    """Bytes without end: a block of them, entered somewhere else each time."""

    def __init__(self, draw, block, unit):
        self.draw, self.block, self.unit = draw, block, unit

    def write(self, out, size):
        while size:
            at = self.draw.randrange(len(self.block) // self.unit) * self.unit
            part = self.block[at:at + size]
            out.write(part)
            size -= len(part)


def tensors(shape, nf4):
    """Names, dtypes, shapes and what fills them: a pool's name or bytes."""
    hidden, wide, layers, heads, kv, dim, vocabulary, tied = shape
    yield "model.embed_tokens.weight", "BF16", [vocabulary, hidden], "bf16"
    for layer in range(layers):
        at = f"model.layers.{layer}."
        matrices = [("self_attn.q_proj", heads * dim, hidden), ("self_attn.k_proj", kv * dim, hidden), ("self_attn.v_proj", kv * dim, hidden),
                    ("self_attn.o_proj", hidden, heads * dim), ("mlp.gate_proj", wide, hidden), ("mlp.up_proj", wide, hidden), ("mlp.down_proj", hidden, wide)]
        for name, rows, columns in matrices:
            name = f"{at}{name}.weight"
            if not nf4:
                yield name, "BF16", [rows, columns], "bf16"
                continue
            blocks = -(-rows * columns // BLOCK)
            state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [rows, columns],
                     "nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": 0.05}
            text = json.dumps(state).encode()
            nested = -(-blocks // NESTED)
            yield name, "U8", [rows * columns // 2, 1], "bytes"
            yield f"{name}.absmax", "U8", [blocks], "bytes"
            yield f"{name}.nested_absmax", "F32", [nested], struct.pack("<f", 0.02) * nested
            yield f"{name}.nested_quant_map", "F32", [256], struct.pack("<256f", *((i - 127.5) / 127.5 for i in range(256)))
            yield f"{name}.quant_map", "F32", [16], struct.pack("<16f", *NF4)
            yield f"{name}.quant_state.bitsandbytes__nf4", "U8", [len(text)], text
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{norm}.weight", "BF16", [hidden], bf16(1.0) * hidden
    yield "model.norm.weight", "BF16", [hidden], bf16(1.0) * hidden
    if not tied:
        yield "lm_head.weight", "BF16", [vocabulary, hidden], "bf16"


def write(name, out, tokenizer):
    nf4 = name.endswith("-nf4")
    shape = SHAPES[name.removesuffix("-nf4")]
    hidden, wide, layers, heads, kv, dim, vocabulary, tied = shape
    out.mkdir(parents=True)
    for file in pathlib.Path(tokenizer).iterdir():
        if "token" in file.name or file.name == "merges.txt":
            shutil.copy(file, out)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": wide,
              "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": dim,
              "vocab_size": vocabulary, "tie_word_embeddings": tied, "rope_theta": 500000.0, "max_position_embeddings": 8192,
              "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16"}
    if nf4:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                         "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    draw = random.Random(1)
    pools = {"bf16": Pool(draw, b"".join(bf16(draw.gauss(0, 0.02)) for _ in range(1 << 18)), 2), "bytes": Pool(draw, draw.randbytes(1 << 22), 1)}
    size = {"BF16": 2, "F32": 4, "U8": 1}
    shards, held = [[]], 0
    for tensor in tensors(shape, nf4):
        count = size[tensor[1]]
        for n in tensor[2]:
            count *= n
        if held and held + count > SHARD:
            shards.append([])
            held = 0
        shards[-1].append((*tensor, count))
        held += count
    weight_map = {}
    for number, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        at, header = 0, {"__metadata__": {"format": "pt"}}
        for tensor, dtype, dims, _, count in shard:
            header[tensor] = {"dtype": dtype, "shape": dims, "data_offsets": [at, at + count]}
            at += count
            weight_map[tensor] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(out / file, "wb") as to:
            to.write(struct.pack("<Q", len(text)) + text)
            for _, _, _, fill, count in shard:
                if isinstance(fill, bytes):
                    to.write(fill)
                else:
                    pools[fill].write(to, count)
    if len(shards) > 1:
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("name")
    ap.add_argument("out", type=pathlib.Path)
    ap.add_argument("--tokenizer", required=True)
    a = ap.parse_args()
    write(a.name, a.out, a.tokenizer)
