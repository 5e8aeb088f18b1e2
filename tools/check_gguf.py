#!/usr/bin/env python3
"""Let the real llama.cpp (through xllamacpp) read a GGUF model, and an adapter on it, and go on from token ids.

    VENV/bin/python tools/check_gguf.py MODEL.gguf [--lora ADAPTER.gguf] --ids 1,2,3 [--new 12]

On stdout comes {"tokens": [ids], "logprobs": [...]}: the likeliest token each time, and its log-prob.
"""
import argparse, json, xllamacpp

ap = argparse.ArgumentParser()
ap.add_argument("model")
ap.add_argument("--lora")
ap.add_argument("--ids", required=True)
ap.add_argument("--new", type=int, default=12)
a = ap.parse_args()

params = xllamacpp.CommonParams()
params.model.path = a.model
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 512, 1, 0, False, -1
if a.lora:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(a.lora, 1.0)]
answer = xllamacpp.Server(params).handle_completions({
    "prompt": [int(token) for token in a.ids.split(",")], "n_predict": a.new, "temperature": 0, "n_probs": 1,
    "cache_prompt": False, "ignore_eos": True,
})
told = answer["choices"][0]["logprobs"]["content"]
print(json.dumps({"tokens": [token["id"] for token in told], "logprobs": [token["logprob"] for token in told]}))
