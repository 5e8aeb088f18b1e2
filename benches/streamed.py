#!/usr/bin/env python3
"""A base streamed within a budget below its size, and the same run with all of it in memory: the same adapter?

    benches/streamed.py BASE [--budget 600MiB] [--tokens 512] [--steps 2] [--compute f32]

Prints the peak of each, the gradient's norm a step, and the digest of the adapter; exits with 1 where they differ. BASE is a
folder or a GGUF file (`benches/bases`, `dpo-lora quantize`).
"""
import argparse, hashlib, json, os, pathlib, subprocess, sys, tempfile

here = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser()
ap.add_argument("base", type=pathlib.Path)
ap.add_argument("--budget", default="600MiB")
ap.add_argument("--tokens", type=int, default=512, help="of a pair, about")
ap.add_argument("--steps", type=int, default=2)
ap.add_argument("--compute", default="f32", choices=["f32", "bf16"])
a = ap.parse_args()
binary = os.path.abspath(os.environ.get("DPO_LORA_BINARY", here.parent / "target/release/dpo-lora"))
part = a.tokens // 8
row = {"prompt": " time year" * (2 * part), "chosen": " people way" * part, "rejected": " day man" * part}


def run(budget):
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        (work / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
        (work / "recipe.toml").write_text(f"""
[model]
base = {json.dumps(str(a.base.resolve()))}
[data]
train = ["rows.jsonl"]
format = "text"
chat_template = "none"
[train]
batch_size = 2
max_steps = {a.steps}
[memory]
budget = "{budget}"
compute = "{a.compute}"
reference_cache = false
[run]
output = "run"
device = "cpu"
""")
        plan = json.loads(subprocess.check_output([binary, "plan", "recipe.toml", "--json"], cwd=work))
        summary = json.loads(subprocess.check_output([binary, "train", "recipe.toml", "--json"], cwd=work))
        steps = map(json.loads, open(work / "run/metrics.jsonl"))
        norms = [step["grad_norm"] for step in steps if "grad_norm" in step]
        digest = hashlib.sha256((work / "run/adapter/adapter_model.safetensors").read_bytes()).hexdigest()
    print(f"budget {budget}: {'streamed' if plan['plan']['schedule']['stream'] else 'resident'}, {summary['predicted_bytes'] / 2**20:.0f} MiB "
          f"predicted, {summary['peak_bytes'] / 2**20:.0f} measured, base {plan['weights_bytes'] / 2**20:.0f}; norms {norms}, adapter {digest[:16]}", flush=True)
    return plan["plan"]["schedule"]["stream"], norms, digest


streamed, resident = run(a.budget), run("auto")
if not streamed[0] or resident[0]:
    sys.exit("the first run was not streamed, or the second was: choose another budget")
sys.exit("they differ" if streamed[1:] != resident[1:] else 0)
