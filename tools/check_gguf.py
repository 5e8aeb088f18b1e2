#!/usr/bin/env python3
"""Let the real llama.cpp (through xllamacpp) read a GGUF model, and an adapter on it.

    VENV/bin/python tools/check_gguf.py MODEL.gguf [--lora ADAPTER.gguf] --ids 1,2,3 [--new 12]
    VENV/bin/python tools/check_gguf.py MODEL.gguf --pairs FILE
    VENV/bin/python tools/check_gguf.py MODEL.gguf --texts FILE

With --ids it goes on from these tokens; on stdout comes {"tokens": [ids], "logprobs": [...]}: the likeliest token each time,
and its log-prob. With --pairs, a JSON file with "pairs" of token ids as those of tests/fixtures, come "chosen_logps" and
"rejected_logps": the log-prob of each answer token, keys and values of the attention kept in f32. With --texts, a JSON list,
come {"ids": [...]}: each text's tokens, with those that the tokenizer itself puts around a text.
"""
import argparse, json, pathlib, urllib.request

import xllamacpp

ap = argparse.ArgumentParser()
ap.add_argument("model")
ap.add_argument("--lora")
ap.add_argument("--ids")
ap.add_argument("--pairs", type=pathlib.Path)
ap.add_argument("--texts", type=pathlib.Path)
ap.add_argument("--new", type=int, default=12)
a = ap.parse_args()

params = xllamacpp.CommonParams()
params.model.path = a.model
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 512, 1, 0, False, -1
if a.pairs:
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if a.lora:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(a.lora, 1.0)]
server = xllamacpp.Server(params)


def complete(ids, **more):
    """The tokens that follow, with what is told of each."""
    answer = server.handle_completions({"prompt": ids, "temperature": 0, "cache_prompt": False, "ignore_eos": True} | more)
    return answer["choices"][0]["logprobs"]["content"]


def tokenize(text):
    content = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", content, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]


def logps(prompt, answer):
    """Of each token, from the whole distribution at its place. A letter is what follows: a piece of a character would come
    without its log-probs."""
    told = []
    for i, token in enumerate(answer):
        content = complete(prompt + answer[:i], n_predict=1, n_probs=100_000, logit_bias=[[letter, 1e9]])
        told += [other["logprob"] for other in content[0]["top_logprobs"] if other["id"] == token]
    assert len(told) == len(answer)
    return told


if a.texts:
    print(json.dumps({"ids": [tokenize(text) for text in json.loads(a.texts.read_text())]}))
elif a.pairs:
    letter = tokenize("e")[-1]
    pairs = json.loads(a.pairs.read_text())["pairs"]
    print(json.dumps({f"{side}_logps": [logps(pair["prompt"], pair[side]) for pair in pairs] for side in ("chosen", "rejected")}))
else:
    told = complete([int(token) for token in a.ids.split(",")], n_predict=a.new, n_probs=1)
    print(json.dumps({"tokens": [token["id"] for token in told], "logprobs": [token["logprob"] for token in told]}))
