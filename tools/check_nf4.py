#!/usr/bin/env python3
"""Let transformers and bitsandbytes read an NF4 folder, and print the log-probs of answers by what they read.

    VENV/bin/python tools/check_nf4.py FOLDER PLAIN IDS.json

PLAIN is the model that FOLDER was made of. The numbers are those that bitsandbytes dequantises, multiplied in float32 by
transformers: its own 4-bit product for the CPU rounds to bfloat16. IDS.json and the output are those of check_export.py.
"""
import json, os, pathlib, sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "fixtures"))
from common import pair_logps
from families import put_into
from models import load

disable_progress_bar()
small, plain, ids = sys.argv[1:]
quantised, report = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32, output_loading_info=True)
if any(report.values()):
    raise SystemExit(f"{small}: transformers does not read this folder whole: {report}")
model = load(plain)
layers = put_into(model, quantised)
with torch.inference_mode():
    logps = pair_logps(model, json.loads(pathlib.Path(ids).read_text()))
print(json.dumps({"layers": layers, "chosen_logps": [c.tolist() for c, _ in logps], "rejected_logps": [r.tolist() for _, r in logps]}))
