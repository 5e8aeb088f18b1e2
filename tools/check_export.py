#!/usr/bin/env python3
"""Read what dpo-lora exported with the real transformers and PEFT, and print the log-probs of answers.

    VENV/bin/python tools/check_export.py adapter BASE ADAPTER IDS.json [--dtype float32]
    VENV/bin/python tools/check_export.py merged FOLDER IDS.json [--dtype float32]

IDS.json is a list of {"prompt": [ids], "chosen": [ids], "rejected": [ids]}. On stdout comes one object: `versions`, and
`chosen_logps` and `rejected_logps`, for each pair the log-prob of every answer token, prompt and answer being one
unpadded sequence. A tensor that transformers or PEFT misses, does not know or finds of another shape is an error
here; by themselves they would pass over some of these with a warning or in silence.
"""
import argparse, json, os, pathlib

ap = argparse.ArgumentParser()
ap.add_argument("kind", choices=["adapter", "merged"])
ap.add_argument("base", type=pathlib.Path, help="a Hugging Face model folder")
ap.add_argument("adapter", type=pathlib.Path, nargs="?", help="a PEFT adapter folder, for `adapter`")
ap.add_argument("ids", type=pathlib.Path)
ap.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights in memory")
a = ap.parse_args()
if (a.kind == "adapter") != (a.adapter is not None):
    ap.error("`adapter` takes BASE ADAPTER IDS.json, `merged` takes FOLDER IDS.json")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from fixtures.common import pair_logps, versions


def read_base(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, a.dtype), output_loading_info=True)
    if any(report.values()):
        raise SystemExit(f"{folder}: transformers does not read this folder whole: {report}")
    return model


def read_adapter(base, folder):
    model = PeftModel.from_pretrained(base, folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as f:
        odd = set(f.keys()) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if odd:
        raise SystemExit(f"{folder}: PEFT misses or does not know {sorted(odd)}")
    return model


disable_progress_bar()
model = read_base(a.base)
if a.kind == "adapter":
    model = read_adapter(model, a.adapter)
with torch.inference_mode():
    logps = pair_logps(model.eval(), json.loads(a.ids.read_text()))
print(json.dumps({
    "versions": versions(),
    "chosen_logps": [chosen.tolist() for chosen, _ in logps],
    "rejected_logps": [rejected.tolist() for _, rejected in logps],
}))
