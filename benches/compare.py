#!/usr/bin/env python3
"""dpo-lora and TRL in turn, on the same rows of the same base, and their ratios.

    DPO_LORA_HH=ROWS.jsonl benches/compare.py [--batch 2 16]

The base is SmolLM2 and TRL of fixed versions, both fetched and made where they are missing; DPO_LORA_SMOLLM2 and
DPO_LORA_PEERS_PYTHON name others.

r 8, max_length 512, rows in their order, AdamW at 5e-5, in f32 and in bf16. Reference log-probs are known before the
first timed step, as with TRL's `precompute_ref_log_probs`, its fastest setting; `within`: ours, computed in the step.
TRL in bf16 is run both ways that it has, and the faster counts: bf16 weights, and bf16 autocast over f32 weights. The first two
steps of each are not counted. Time it on a quiet machine, and more than once.
"""
import argparse, json, os, pathlib, shutil, statistics, subprocess, tempfile

here = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser()
ap.add_argument("--steps", type=int, default=8)
ap.add_argument("--batch", type=int, nargs="+", default=[2])
ap.add_argument("--compute", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
ap.add_argument("--budget", default="auto", help="memory.budget of ours")
ap.add_argument("--rounds", type=int, default=1)
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--trl-batch", type=int, default=2, help="pairs that TRL takes at once; four take 11 GB")
ap.add_argument("--without-trl", action="store_true")
ap.add_argument("--without-within", action="store_true", help="leave out the reference computed in the step")
ap.add_argument("--plan", action="store_true", help="show where ours goes, first")
ap.add_argument("--json", help="where every figure goes")
a = ap.parse_args()
if a.steps < 3:
    ap.error("the first two steps are not counted: --steps 3 at least")


def made(script, within):
    return subprocess.check_output([here.parent / "tools" / script], text=True).strip() + within


rows = pathlib.Path(os.environ.get("DPO_LORA_HH") or ap.error("DPO_LORA_HH names no rows; tools/hh_rows.py makes them"))
base = os.path.abspath(os.environ.get("DPO_LORA_SMOLLM2") or made("smollm2.sh", "/hf"))
python = a.without_trl or os.path.abspath(os.environ.get("DPO_LORA_PEERS_PYTHON") or made("peers.sh", "/bin/python"))
binary = os.path.abspath(os.environ.get("DPO_LORA_BINARY", here.parent / "target/release/dpo-lora"))
work = pathlib.Path(tempfile.mkdtemp())


def ours(batch, compute, precomputed):
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
batch_size = {batch}
learning_rate = 5e-5
lr_schedule = "constant"
max_steps = {a.steps}
[memory]
compute = "{compute}"
budget = "{a.budget}"
[run]
output = {json.dumps(str(run))}
device = "cpu"
threads = {a.threads}
""")
    if a.plan:
        print(subprocess.check_output([binary, "plan", recipe], text=True), flush=True)
    subprocess.run([binary, "train", recipe, "--json"], check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    steps = [row for row in map(json.loads, open(run / "metrics.jsonl")) if "loss" in row]
    timed = steps[2:]
    seconds = sum(row["seconds"] for row in timed)
    return {"pairs_per_s": batch * len(timed) / seconds, "peak_anon_mib": max(row["peak_bytes"] for row in steps) / 2**20}


def trl(batch, *options):
    out = work / "trl.json"
    command = [python, here / "trl_peer.py", "--model", base, "--data", work / "rows.jsonl",
               "--steps", str(a.steps), "--batch", str(min(batch, a.trl_batch)),
               "--accumulate", str(batch // min(batch, a.trl_batch)), "--threads", str(a.threads), "--json", out, *options]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=work)
    return json.load(open(out))


def programs(batch, compute):
    """What is run, by name."""
    found = {f"dpo-lora {compute}": lambda: ours(batch, compute, True)}
    if not a.without_within:
        found[f"dpo-lora {compute}, reference within"] = lambda: ours(batch, compute, False)
    if a.without_trl:
        return found
    if compute == "f32":
        return found | {"TRL f32": lambda: trl(batch, "--precompute")}
    return found | {"TRL bf16 weights": lambda: trl(batch, "--precompute", "--dtype", "bfloat16"),
                    "TRL bf16 autocast": lambda: trl(batch, "--precompute", "--autocast")}


def ratios(batch, results):
    best = max((name for name in results if name.startswith("TRL")), key=lambda name: median(results[name], "pairs_per_s"), default=None)
    if best is None:
        return
    for name in (name for name in results if name.startswith("dpo-lora")):
        faster = [o["pairs_per_s"] / t["pairs_per_s"] for o, t in zip(results[name], results[best])]
        smaller = [t["peak_anon_mib"] / o["peak_anon_mib"] for o, t in zip(results[name], results[best])]
        print(f"batch {batch}: {name} beside {best}: {statistics.median(faster):.2f} times the pairs a second, "
              f"1/{statistics.median(smaller):.0f} of the memory", flush=True)


def median(rounds, key):
    return statistics.median(result[key] for result in rounds)


print(f"{a.steps} steps, {a.threads} threads, load before: {os.getloadavg()[0]:.2f}")
everything = {}
for batch in a.batch:
    lines = open(rows).readlines()[: a.steps * batch]
    (work / "rows.jsonl").write_text("".join(lines))
    for compute in a.compute:
        results = {name: [] for name in programs(batch, compute)}
        for _ in range(a.rounds):
            for name, run in programs(batch, compute).items():
                results[name].append(run())
        for name, rounds in results.items():
            print(f"batch {batch:2}  {name:34} {median(rounds, 'pairs_per_s'):6.2f} pairs/s {median(rounds, 'peak_anon_mib'):7.0f} MiB", flush=True)
        ratios(batch, results)
        everything[f"batch {batch}, {compute}"] = results
if a.json:
    json.dump(everything, open(a.json, "w"), indent=1)
shutil.rmtree(work)
