#!/usr/bin/env python3
"""Time and memory of a step against the tokens of a pair and against the rank, as figures and as two plots.

    DPO_LORA_SMOLLM2=BASE benches/lengths.py OUT_FOLDER [--lengths 256 … 8192] [--ranks 4 … 128] [--compute f32 bf16]

One pair a step: half of its tokens prompt, a quarter each answer; the reference is computed in the step. Rank is varied at
512 tokens, length at rank 8. Pairs of more than 1024 tokens are timed in a run's first step, shorter ones in its second:
what a first step does besides does not show in a long one. Writes `lengths.svg`, `ranks.svg` and `lengths.json`. Time it on a quiet machine.
"""
import argparse, json, os, pathlib, shutil, subprocess, tempfile

ap = argparse.ArgumentParser()
ap.add_argument("out", type=pathlib.Path)
ap.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
ap.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
ap.add_argument("--compute", nargs="+", default=["f32", "bf16"])
ap.add_argument("--budget", default="auto")
a = ap.parse_args()
here = pathlib.Path(__file__).resolve().parent
binary = pathlib.Path(os.environ.get("DPO_LORA_BINARY", here.parent / "target/release/dpo-lora"))
base = os.environ["DPO_LORA_SMOLLM2"]
work = pathlib.Path(tempfile.mkdtemp())


def words(n, seed):
    """About n tokens: one word a token, told apart by their order."""
    known = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]
    return "".join(" " + known[(i * (seed + 3) + i // 7) % len(known)] for i in range(n))


def step(tokens, rank, compute):
    """Seconds of the last step of a run of one or two, and the peak of anonymous memory."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    part = tokens // 4
    row = lambda i: {"prompt": words(2 * part - 4, i), "chosen": words(part - 2, i + 1), "rejected": words(part - 2, i + 2)}
    (work / "rows.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(1 if tokens > 1024 else 2)))
    (work / "recipe.toml").write_text(f"""
[model]
base = {json.dumps(base)}
[adapter]
r = {rank}
[data]
train = ["rows.jsonl"]
format = "text"
chat_template = "none"
max_length = {tokens}
[train]
batch_size = 1
[memory]
compute = "{compute}"
budget = "{a.budget}"
reference_cache = false
[run]
output = {json.dumps(str(run))}
device = "cpu"
""")
    done = subprocess.run([binary, "train", work / "recipe.toml", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    last = [json.loads(line) for line in open(run / "metrics.jsonl")][-1]
    return {"tokens": last["tokens"], "seconds": last["seconds"], "mib": last["peak_bytes"] / 2**20}


def plot(path, title, axis, series):
    """Two panels, seconds and MiB, both axes logarithmic; a line for each compute type."""
    import math
    width, height, left, top = 300, 220, 56, 34
    colours = {"f32": "#1f6fb2", "bf16": "#c8553d"}
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * (width + left) + 20} {height + 80}" font-family="sans-serif" '
             f'font-size="11"><rect width="100%" height="100%" fill="white"/><text x="{left}" y="16" font-size="13">{title}</text>']
    for panel, (key, unit) in enumerate([("seconds", "seconds a step"), ("mib", "MiB anonymous, peak")]):
        x0 = left + panel * (width + left)
        xs = sorted({x for points in series.values() for x in points})
        ys = [p[key] for points in series.values() for p in points.values()]
        low, high = math.floor(math.log2(min(ys))), math.ceil(math.log2(max(ys)))
        high = max(high, low + 1)
        at_x = lambda x: x0 + 20 + (width - 40) * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        at_y = lambda y: top + height - height * (math.log2(y) - low) / (high - low)
        parts.append(f'<rect x="{x0}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#bbb"/>')
        parts += [f'<text x="{at_x(x):.0f}" y="{top + height + 16}" text-anchor="middle">{x}</text>' for x in xs]
        for e in range(low, high + 1):
            label = f"{2.0 ** e:g}"
            parts.append(f'<line x1="{x0}" x2="{x0 + width}" y1="{at_y(2.0 ** e):.1f}" y2="{at_y(2.0 ** e):.1f}" stroke="#eee"/>'
                         f'<text x="{x0 - 5}" y="{at_y(2.0 ** e) + 4:.0f}" text-anchor="end">{label}</text>')
        parts.append(f'<text x="{x0 + width / 2}" y="{top + height + 32}" text-anchor="middle">{axis}: {unit}</text>')
        for name, points in series.items():
            line = " ".join(f"{at_x(x):.1f},{at_y(p[key]):.1f}" for x, p in sorted(points.items()))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
    for i, name in enumerate(series):
        parts.append(f'<text x="{left + 10 + 60 * i}" y="{top + height + 56}" fill="{colours[name]}">— {name}</text>')
    path.write_text("\n".join(parts + ["</svg>"]) + "\n")


a.out.mkdir(parents=True, exist_ok=True)
figures = {"lengths": {c: {} for c in a.compute}, "ranks": {c: {} for c in a.compute}}
for compute in a.compute:
    for tokens in a.lengths:
        figures["lengths"][compute][tokens] = step(tokens, 8, compute)
        print("length", tokens, compute, figures["lengths"][compute][tokens], flush=True)
    for rank in a.ranks:
        figures["ranks"][compute][rank] = step(512, rank, compute)
        print("rank", rank, compute, figures["ranks"][compute][rank], flush=True)
plot(a.out / "lengths.svg", "SmolLM2-135M, one pair a step, r 8", "tokens a pair", figures["lengths"])
plot(a.out / "ranks.svg", "SmolLM2-135M, one pair of 512 tokens a step", "rank", figures["ranks"])
(a.out / "lengths.json").write_text(json.dumps(figures, indent=1) + "\n")
shutil.rmtree(work)
