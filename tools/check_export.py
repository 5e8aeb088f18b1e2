#!/usr/bin/env python3
"""Read what dpo-lora exported with the real transformers and PEFT, and print the log-probs of answers.

    VENV/bin/python tools/check_export.py adapter BASE ADAPTER IDS.json [--dtype float32]
    VENV/bin/python tools/check_export.py merged FOLDER IDS.json [--dtype float32]
    VENV/bin/python tools/check_export.py all JOBS.json [--dtype float32]

IDS.json is a list of {"prompt": [ids], "chosen": [ids], "rejected": [ids]}. On stdout comes one object: `versions`, and
`chosen_logps` and `rejected_logps`, for each pair the log-prob of every answer token, prompt and answer being one
unpadded sequence. JOBS.json is a list of {"base": FOLDER, "adapter": FOLDER or null, "pairs": what IDS.json holds}, for
which a list of such objects comes. A tensor that transformers or PEFT misses, does not know or finds of another shape is an error
here; by themselves they would pass over some of these with a warning or in silence.
"""
import argparse, json, os, pathlib

ap = argparse.ArgumentParser()
ap.add_argument("kind", choices=["adapter", "merged", "all"])
ap.add_argument("paths", type=pathlib.Path, nargs="+")
ap.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights in memory")
a = ap.parse_args()
if len(a.paths) != {"adapter": 3, "merged": 2, "all": 1}[a.kind]:
    ap.error("`adapter` takes BASE ADAPTER IDS.json, `merged` takes FOLDER IDS.json, `all` takes JOBS.json")
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


def logps(base, adapter, pairs):
    model = read_base(base)
    if adapter:
        model = read_adapter(model, adapter)
    with torch.inference_mode():
        logps = pair_logps(model.eval(), pairs)
    return {
        "versions": versions(),
        "chosen_logps": [chosen.tolist() for chosen, _ in logps],
        "rejected_logps": [rejected.tolist() for _, rejected in logps],
    }


disable_progress_bar()
*folders, file = a.paths
content = json.loads(file.read_text())
if a.kind == "all":
    path = lambda text: text and pathlib.Path(text)
    print(json.dumps([logps(path(job["base"]), path(job["adapter"]), job["pairs"]) for job in content]))
else:
    print(json.dumps(logps(folders[0], folders[1] if a.kind == "adapter" else None, content)))
