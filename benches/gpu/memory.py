#!/usr/bin/env python3
"""What the plan predicts of a card's memory, and what tensors take there: two or three steps of many runs of real shapes.

    benches/gpu/memory.py BUNDLE WORK       BUNDLE: what benches/gpu/bundle.sh made; WORK: where bases are made and stay

Predicted are the parts that tensors take, without the libraries' and the pool's gaps (docs/memory.md); a run that takes more
than that, or less than nine tenths of it, fails. On a card `held` is what its pool came to. It needs no card: for

    ci/made-up-card.sh make CARD
    MADE_UP_IDLE=1 MADE_UP_MEMORY=143000 LD_LIBRARY_PATH=CARD benches/gpu/memory.py BUNDLE WORK

a made-up one of an H200's size counts what it is asked for and computes nothing."""
import json, pathlib, random, subprocess, sys

bundle, work = (pathlib.Path(path).resolve() for path in sys.argv[1:])
here = pathlib.Path(__file__).resolve().parent
GAPS = ("gaps between those", "CUDA's libraries, gaps")
# base, tokens of a sequence, rank, pairs a step, budget, arithmetic
RUNS = [
    ("llama-3.1-8b-nf4", 1024, 16, 1, "6.5GiB", "bf16"),
    ("llama-3.1-8b-nf4", 1024, 16, 1, "4.8GiB", "bf16"),
    ("llama-3.1-8b-nf4", 1024, 16, 1, "3GiB", "bf16"),
    ("llama-3.1-8b-nf4", 1024, 16, 1, "auto", "bf16"),
    ("llama-3.1-8b-nf4", 1024, 64, 1, "8GiB", "bf16"),
    ("llama-3.1-8b-nf4", 512, 128, 1, "10GiB", "bf16"),
    ("llama-3.1-8b-nf4", 1024, 16, 4, "12GiB", "bf16"),
    ("llama-3.1-8b-nf4", 1024, 16, 4, "5GiB", "bf16"),
    ("llama-3.1-8b-nf4", 256, 8, 2, "3GiB", "bf16"),
    ("llama-3.1-8b-nf4", 1024, 16, 1, "8GiB", "f32"),
    ("llama-3.2-3b", 1024, 16, 1, "auto", "bf16"),
    ("llama-3.2-3b", 1024, 16, 4, "3GiB", "bf16"),
    ("llama-3.2-1b", 1024, 16, 1, "auto", "bf16"),
    ("llama-3.2-1b", 1024, 16, 4, "3GiB", "bf16"),
    ("llama-3.2-1b", 256, 8, 2, "auto", "bf16"),
    ("llama-3.2-1b", 1024, 16, 1, "auto", "f32"),
    ("small-20m", 256, 8, 8, "auto", "bf16"),
]


def base(name):
    folder = work / "bases" / name
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, here / "bases.py", name, folder, "--tokenizer", bundle / "tokenizer"], check=True)
    return folder


def rows(tokens):
    """Enough pairs for three steps of any run, their prompts too long."""
    draw, path = random.Random(1), work / f"rows-{tokens}.jsonl"
    words = lambda n: " ".join(draw.choice("the river runs past old stone houses and a small market".split()) for _ in range(n))
    row = lambda i: {"prompt": f"{i} {words(tokens * 2)}", "chosen": f" {words(tokens // 6)} yes", "rejected": f" {words(tokens // 6)} no"}
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(24)))
    return path


def run(name, tokens, rank, pairs, budget, compute):
    (work / "recipe.toml").write_text(f"""
[model]
base = {json.dumps(str(base(name)))}
[adapter]
r = {rank}
[data]
train = [{json.dumps(str(rows(tokens)))}]
max_length = {tokens}
truncation = "prompt_start"
[train]
batch_size = {pairs}
max_steps = 3
[memory]
budget = "{budget}"
compute = "{compute}"
[run]
device = "cuda:0"
""")
    said = subprocess.run([bundle / "time-by-part", "--no-waits", work / "recipe.toml"], capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(f"{name}: {said.stderr.strip()}")
    told = json.loads(said.stdout.splitlines()[-1])
    predicted = sum(part["bytes"] for part in told["predicted"]["parts"] if part["what"] not in GAPS)
    used, held = told["most_used_and_held_bytes"]
    return predicted, used, held, told["predicted_bytes"]


work.mkdir(parents=True, exist_ok=True)
print("| base | tokens | rank | pairs | budget | arithmetic | tensors predicted, MiB | taken | taken of predicted | held | all predicted |\n" + "| --- " * 11 + "|")
failed = False
for settings in RUNS:
    predicted, used, held, whole = run(*settings)
    mib = lambda n: f"{n / (1 << 20):.0f}"
    failed |= not 0.9 <= used / predicted <= 1
    print(f"| {' | '.join(str(value) for value in settings)} | {mib(predicted)} | {mib(used)} | {used / predicted:.3f} | {mib(held)} | {mib(whole)} |", flush=True)
sys.exit(failed)
