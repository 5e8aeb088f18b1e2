#!/usr/bin/env python3
"""What benches/gpu.sh runs: parity, time and memory of dpo-lora on a GPU, and TRL beside it. Every part has a time limit of its
own; a part that fails or runs out is reported and the rest goes on. One JSON object and a table at the end."""
import argparse, json, os, pathlib, platform, random, shutil, subprocess, sys, tempfile, threading, time

here = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser(description=__doc__)
ap.add_argument("--bundle", type=pathlib.Path, required=True, help="what benches/gpu/bundle.sh made")
ap.add_argument("--device", default="cuda:0", help="cuda:0, metal or cpu")
ap.add_argument("--tiny", action="store_true", help="tiny shapes: a rehearsal, whose figures mean nothing")
ap.add_argument("--work", type=pathlib.Path, help="where bases are made; by default a folder that is removed")
ap.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu-results"))
ap.add_argument("--python", default=sys.executable, help="a Python with torch, transformers, TRL, PEFT and bitsandbytes")
ap.add_argument("--wheels", type=pathlib.Path, help="a folder of wheels for those that it lacks; by default the bundle's")
ap.add_argument("--only", nargs="*", help="these parts alone")
ap.add_argument("--seconds", type=float, default=520, help="for everything together")
a = ap.parse_args()
binary, began = (a.bundle / "dpo-lora").resolve(), time.monotonic()
WORDS = "the river runs past old stone houses and a small market where people talk about rain tea bread roads".split()
GIB = 1 << 30
# CUDA's libraries, for the bundle's own programs; torch brings those that it was built with
environment = {**os.environ, "RUST_BACKTRACE": "0", "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), str((a.bundle / "lib").resolve())]))}
plain = {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}


def left():
    return a.seconds - (time.monotonic() - began)


class Refused(Exception):
    """A part that did not give what was due."""


def run(command, limit, env=None, cwd=None):
    limit = min(limit, left())
    if limit < 5:
        raise Refused("no time was left")
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=limit, cwd=cwd, env={**environment, **(env or {})})
    except subprocess.TimeoutExpired:
        raise Refused(f"not done after {limit:.0f} s")
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise Refused(f"exit code {done.returncode}: " + " / ".join(last))
    return done.stdout


class DeviceMemory:
    """The most of the card's memory in use above what was in use before, asked of nvidia-smi: the second opinion beside the
    program's own figure."""

    def query(self):
        try:
            text = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5).stdout
            return int(text.split()[0]) << 20
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
            return None

    def __enter__(self):
        self.before = self.query()
        self.peak, self.stop = self.before or 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        if self.before is not None:
            self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(0.05):
            self.peak = max(self.peak, self.query() or 0)

    def __exit__(self, *_):
        self.stop.set()

    def bytes(self):
        return None if self.before is None else self.peak - self.before


def base(name):
    folder = work / "bases" / name
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run([sys.executable, here / "bases.py", name, folder, "--tokenizer", a.bundle / "tokenizer"], 90)
    return folder


def rows(path, count, tokens, same=False):
    """Pairs whose two sequences are cut to `tokens` tokens: a prompt that is too long loses its beginning. `same`: all of one
    length."""
    draw = random.Random(1)
    with open(path, "w") as out:
        for i in range(count):
            draw = random.Random(1) if same else draw
            words = lambda n: " ".join(draw.choice(WORDS) for _ in range(n))
            answers = [" " + words(tokens // 6) for _ in range(2)]
            out.write(json.dumps({"prompt": f"{i} {words(tokens * 2)}", "chosen": answers[0] + " yes", "rejected": answers[1] + " no"}) + "\n")


def recipe(name, tokens, steps, settings=None, same=False):
    """A folder with a recipe for steps of one pair, and what is set beside it."""
    folder, at = base(name), pathlib.Path(tempfile.mkdtemp(dir=work))
    rows(at / "rows.jsonl", steps, tokens, same)
    (at / "recipe.toml").write_text(f"[model]\nbase = {json.dumps(str(folder))}\n[data]\ntrain = [\"rows.jsonl\"]\n")
    wanted = {"adapter.r": 16, "adapter.lora_alpha": 32, "data.max_length": tokens, "data.truncation": "prompt_start", "train.batch_size": 1,
              "train.max_steps": steps, "run.device": a.device, "run.output": str(at / "run"), **(settings or {})}
    return at, [f"{key}={json.dumps(value)}" for key, value in wanted.items()]


def train(name, tokens, steps, limit, settings=None, same=False):
    """Steps of one pair; seconds a pair after the first two, peaks, the adapter's bytes."""
    at, sets = recipe(name, tokens, steps, settings, same)
    sets = [part for setting in sets for part in ("--set", setting)]
    with DeviceMemory() as memory:
        run([binary, "train", "recipe.toml", *sets, "--json"], limit, cwd=at)
    logged = [json.loads(line) for line in (at / "run/metrics.jsonl").read_text().splitlines()]
    logged = [row for row in logged if "seconds" in row and "grad_norm" in row]
    summary = json.loads((at / "run/summary.json").read_text())
    timed = sorted(row["seconds"] for row in logged[2:] or logged)
    weights = (at / "run/adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(at)
    result = {"base": name, "tokens": tokens, "steps": steps, "tokens_a_pair": logged[-1]["tokens"], "seconds_a_pair": timed[len(timed) // 2], "peak_bytes": summary.get("peak_bytes"),
              "predicted_bytes": summary.get("predicted_bytes"), "host_peak_bytes": summary.get("host_peak_bytes"), "nvidia_smi_bytes": memory.bytes(), "peaks": [row.get("peak_bytes") for row in logged]}
    return result, weights


def tests(program, limit, filters=()):
    env = {"DPO_LORA_FIXTURES": str(a.bundle / "fixtures")}
    if (a.bundle / "smollm2").is_dir() and (a.bundle / "golden").is_dir():
        env |= {"DPO_LORA_SMOLLM2": str(a.bundle / "smollm2"), "DPO_LORA_GOLDEN": str(a.bundle / "golden")}
    if a.device != "cpu":
        env["DPO_LORA_REQUIRE_DEVICE"] = a.device.split(":")[0]
    text = run([a.bundle / program, "--nocapture", "--test-threads", "1", *filters], limit, env)
    return {"measured": [line for line in text.splitlines() if line.startswith(("measured:", "devices:", "skipped"))]}


def parity():
    return tests("test-devices", 90)


def same_twice():
    tokens = 64 if a.tiny else 512
    first, second = (train(small, tokens, 5, 40)[1] for _ in range(2))
    if first != second:
        raise Refused("two runs gave different adapters")
    return {"adapters": "equal to the byte"}


def timed(name, tokens, steps, limit, budget=None, goal=None):
    """`budget`: of the device's memory, in bytes, or a function that says so when the time has come."""
    def part():
        most = budget() if callable(budget) else budget
        result, _ = train(name, tokens, steps, limit, {"memory.budget": f"{most}B"} if most else None)
        result.pop("peaks")
        peak = result["peak_bytes"]
        if goal and peak:
            result["goal_bytes"], result["goal_met"] = goal, peak <= goal
        if peak and result["predicted_bytes"]:
            result["measured_to_predicted"] = round(peak / result["predicted_bytes"], 3)
        return result
    return part


def growth():
    """Memory after 50 steps on pairs of one length, when CUDA's libraries have loaded what they need, and 200 steps later."""
    result, _ = train(small, 32 if a.tiny else 256, 250, 60, same=True)
    peaks = [peak for peak in result["peaks"] if peak]
    if not peaks:
        return {"growth": "not measured here"}
    return {"peak_after_50_steps": peaks[49], "peak_after_250_steps": peaks[-1], "grew": peaks[-1] > peaks[49] * 1.01 + (2 << 20)}


def by_part(name, tokens, steps, limit, settings=None):
    """Where a step's time goes: the share of each part, with a wait for the device at every border between them."""
    def part():
        at, sets = recipe(name, tokens, steps, settings)
        told = json.loads(run([a.bundle / "time-by-part", "recipe.toml", *sets], limit, cwd=at))
        shutil.rmtree(at)
        return {"base": name, **told}
    return part


def matrix_peak():
    return json.loads(run([a.bundle / "matrix-peak", a.device, "256" if a.tiny else "8192"], 30))


def trl():
    """TRL with PEFT and bitsandbytes on the same base and shapes."""
    have = "import torch, transformers, trl, peft, datasets, bitsandbytes"
    python, env = a.python, plain
    if subprocess.run([python, "-c", have], capture_output=True).returncode:
        wheels = a.wheels or a.bundle / "wheels"
        if not wheels.is_dir():
            raise Refused("its packages are not here, and neither the bundle nor --wheels has them")
        # a folder of this name: what dill finds elsewhere it takes apart, and that fails
        packages = work / "site-packages"
        run([python, "-m", "pip", "install", "-q", "--no-index", "--find-links", wheels, "--target", packages, "trl", "peft", "bitsandbytes", "transformers", "datasets"], 180)
        env = {**plain, "PYTHONPATH": str(packages)}
    tokens = 64 if a.tiny else 1024
    rows(work / "trl.jsonl", 6, tokens)
    said = run([python, here / "trl_peer.py", base(large), work / "trl.jsonl", tokens, 6, a.device], 120, env)
    return json.loads(said.splitlines()[-1])


def card():
    try:
        return subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def share(results):
    """The share of the measured matrix peak that the 8B step reaches: what its frozen products do, over the time."""
    step, peak = results.get("8B NF4, all memory", {}), results.get("matrix peak", {})
    if "seconds_a_pair" not in step or "tflops" not in peak:
        return {"refused": "needs both the 8B step and the matrix peak"}
    from bases import SHAPES
    hidden, wide, layers, heads, kv, dim, _, _ = SHAPES[large.removesuffix("-nf4")]
    matrices = layers * (hidden * dim * (2 * heads + 2 * kv) + 3 * hidden * wide)
    # the reference forward, the policy forward, gradients of inputs; the recomputed forward is not useful work
    useful = 3 * 2 * matrices * step["tokens_a_pair"]
    reached = useful / step["seconds_a_pair"] / 1e12
    return {"tflops": round(reached, 2), "share_of_peak": round(reached / peak["tflops"], 4)}


def main():
    tokens = 64 if a.tiny else 1024
    results = {}

    def half_of_trl():
        peak = results.get("TRL", {}).get("peak_bytes")
        if not peak:
            raise Refused("needs TRL's peak")
        return peak // 2

    parts = {
        "parity": parity,
        "two runs": same_twice,
        "8B NF4": timed(large, tokens, 6, 100, int(6.5 * GIB), int(6.5 * GIB)),
        "matrix peak": matrix_peak,
        "where the time goes": by_part(large, tokens, 3, 60, {"memory.budget": "6.5GiB"}),
        "TRL": trl,
        "8B NF4, half of TRL's memory": timed(large, tokens, 6, 60, half_of_trl),
        "8B NF4, all memory": timed(large, tokens, 6, 60),
        "where the time goes, all memory": by_part(large, tokens, 3, 60),
        "8B streamed": timed(large, tokens, 4, 90, 3 * GIB, 3 * GIB),
        "where the time goes, streamed": by_part(large, tokens, 3, 60, {"memory.budget": "3GiB"}),
        "1B bf16": timed(one, tokens, 6, 50),
        "3B bf16": timed(three, tokens, 5, 70),
        "growth": growth,
    }
    for name, part in parts.items():
        if a.only and name not in a.only:
            continue
        at = time.monotonic()
        print(f"== {name}", file=sys.stderr, flush=True)
        try:
            results[name] = part()
        except Refused as why:
            results[name] = {"refused": str(why)}
        except Exception as why:  # the rest is worth having
            results[name] = {"refused": f"{type(why).__name__}: {why}"}
        results[name]["part_seconds"] = round(time.monotonic() - at, 1)
    results["share of the peak"] = share(results)
    theirs = results.get("TRL", {})
    for name in ("8B NF4", "8B NF4, half of TRL's memory", "8B NF4, all memory", "8B streamed"):
        ours = results.get(name, {})
        if "seconds_a_pair" in ours and "seconds_a_pair" in theirs:
            beside = {"pairs_a_second_ratio": round(theirs["seconds_a_pair"] / ours["seconds_a_pair"], 3)}
            if ours["peak_bytes"] and theirs.get("peak_bytes"):
                beside["peak_ratio"] = round(ours["peak_bytes"] / theirs["peak_bytes"], 3)
            results[f"{name}, beside TRL"] = beside
    told = {"date": time.strftime("%Y-%m-%d"), "device": a.device, "card": card(), "machine": platform.platform(), "rehearsal": a.tiny,
            "seconds": round(time.monotonic() - began, 1), "parts": results}
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "results.json").write_text(json.dumps(told, indent=1) + "\n")
    table = [f"{told['date']}, {told['card'] or a.device}" + (", a rehearsal with tiny shapes: these figures mean nothing" if a.tiny else ""), "", "| part | result |", "| --- | --- |"]
    words = lambda value: ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else value
    for name, result in results.items():
        table.append(f"| {name} | " + "; ".join(f"{key} {words(value)}" for key, value in result.items() if key != "measured").replace("|", "/") + " |")
        table += [f"| | {line} |" for line in result.get("measured", [])]
    (a.out / "results.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    # TRL alone may be missing
    bad = [name for name, result in results.items() if "refused" in result and name not in ("TRL", "share of the peak")]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path.insert(0, str(here))
    a.bundle = a.bundle.resolve()
    small, one, three, large = ("tiny",) * 3 + ("tiny-nf4",) if a.tiny else ("small-20m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b-nf4")
    with tempfile.TemporaryDirectory() as made:
        work = (a.work or pathlib.Path(made)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        code = main()
    sys.exit(code)
