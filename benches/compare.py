#!/usr/bin/env python3
"""dpo-lora and TRL in turn, on the same rows of the same base, and their ratios.

    DPO_LORA_SMOLLM2=BASE DPO_LORA_HH=ROWS.jsonl DPO_LORA_PEERS_PYTHON=VENV/bin/python benches/compare.py [--steps 10]

f32, r 8, batch 2, max_length 512, rows in their order, AdamW at 5e-5. `precomputed`: the reference's log-probs are
known before the first step is timed, as with TRL's `precompute_ref_log_probs`; `within`: they are computed in the step.
The first two steps of each are not counted. Time it on a quiet machine, and more than once.
"""
import argparse, json, os, pathlib, shutil, statistics, subprocess, tempfile

here = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser()
ap.add_argument("--steps", type=int, default=10)
ap.add_argument("--batch", type=int, default=2)
ap.add_argument("--rounds", type=int, default=1)
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--without-trl", action="store_true")
a = ap.parse_args()
base, rows, python = (os.environ[f"DPO_LORA_{name}"] for name in ("SMOLLM2", "HH", "PEERS_PYTHON"))
binary = here.parent / "target/release/dpo-lora"
work = pathlib.Path(tempfile.mkdtemp())
few = work / "rows.jsonl"
few.write_text("".join(open(rows).readlines()[: a.steps * a.batch]))


def ours(precomputed):
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    recipe = work / "recipe.toml"
    recipe.write_text(f"""
[model]
base = {json.dumps(base)}
[adapter]
r = 8
lora_alpha = 16
[data]
train = ["rows.jsonl"]
eval = {json.dumps(["rows.jsonl"] if precomputed else [])}
format = "text"
max_length = 512
truncation = "prompt_start"
shuffle = false
[train]
batch_size = {a.batch}
learning_rate = 5e-5
lr_schedule = "constant"
max_steps = {a.steps}
[run]
output = {json.dumps(str(run))}
device = "cpu"
threads = {a.threads}
""")
    subprocess.run([binary, "train", recipe, "--json"], check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    steps = [row for row in map(json.loads, open(run / "metrics.jsonl")) if "loss" in row]
    timed = steps[2:]
    seconds = sum(row["seconds"] for row in timed)
    return {"pairs_per_s": a.batch * len(timed) / seconds, "tokens_per_s": sum(r["tokens"] for r in timed) / seconds,
            "peak_anon_mib": max(row["peak_bytes"] for row in steps) / 2**20}


def trl():
    out = work / "trl.json"
    command = [python, here / "trl_peer.py", "--model", base, "--data", few, "--steps", str(a.steps), "--batch", str(a.batch),
               "--threads", str(a.threads), "--precompute", "--json", out]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=work)
    return json.load(open(out))


print(f"{a.steps} steps of {a.batch} pairs, {a.threads} threads, load before: {os.getloadavg()[0]:.2f}")
results = {"ours, reference precomputed": [], "ours, reference within the step": [], "TRL, reference precomputed": []}
for _ in range(a.rounds):
    results["ours, reference precomputed"].append(ours(True))
    results["ours, reference within the step"].append(ours(False))
    if not a.without_trl:
        results["TRL, reference precomputed"].append(trl())
print(f"{'':34}{'pairs/s':>9}{'tokens/s':>10}{'peak anonymous MiB':>20}")
for name, all_rounds in results.items():
    if all_rounds:
        median = lambda key: statistics.median(r[key] for r in all_rounds)
        print(f"{name:34}{median('pairs_per_s'):9.2f}{median('tokens_per_s'):10.0f}{median('peak_anon_mib'):20.0f}")
if not a.without_trl:
    for name in list(results)[:2]:
        ratios = [o["pairs_per_s"] / t["pairs_per_s"] for o, t in zip(results[name], results["TRL, reference precomputed"])]
        print(f"{name} / TRL: {statistics.median(ratios):.2f} times the pairs a second")
    ratios = [t["peak_anon_mib"] / o["peak_anon_mib"] for o, t in zip(results["ours, reference precomputed"], results["TRL, reference precomputed"])]
    print(f"TRL / ours: {statistics.median(ratios):.1f} times the memory")
shutil.rmtree(work)
