#!/usr/bin/env python3
"""Runs of many sizes, lengths, ranks, batches and budgets: is the measured peak what was planned, and within the budget?

    benches/memory.py --bases FOLDER --tokenizer FOLDER [--only WORD] [--large]

Bases of random weights are made in FOLDER where they are missing (`benches/bases`, `dpo-lora quantize`), the tokenizer's files
are copied from the second folder (SmolLM2's). Prints a table for docs/memory.md; exits with 1 where a peak is above its budget or more
than a tenth away from the prediction. `--large` adds runs on the 1B shape, which take minutes.
"""
import argparse, json, pathlib, random, shutil, subprocess, sys, tempfile

here = pathlib.Path(__file__).resolve().parent
ap = argparse.ArgumentParser()
ap.add_argument("--bases", type=pathlib.Path, required=True)
ap.add_argument("--tokenizer", type=pathlib.Path, required=True)
ap.add_argument("--target", type=pathlib.Path, default=here.parent / "target", help="cargo's target folder")
ap.add_argument("--only", default="", help="run only what has this in its name")
ap.add_argument("--large", action="store_true")
a = ap.parse_args()
binary, bases = a.target / "release/dpo-lora", a.target / "release/examples/bases"
WORDS = "the river runs past old stone houses and a small market where people talk about rain tea bread roads".split()

# base, longest pair's tokens (about), pairs a step, rank, budget, more
RUNS = [
    ("small-20m", 64, 1, 4, "auto", {}),
    ("small-20m", 256, 4, 8, "auto", {}),
    ("small-20m", 256, 4, 8, "least", {}),
    ("small-20m", 256, 16, 8, "middle", {}),
    ("small-20m", 256, 16, 8, "auto", {"samples.prompts": ["the river", "a small market"], "samples.count": 80}),
    ("small-20m", 256, 16, 8, "least", {"samples.prompts": ["the river", "a small market"], "samples.count": 80}),
    ("small-20m", 512, 4, 256, "auto", {"train.save_every": 1}),
    ("small-20m", 512, 4, 256, "least", {"train.optimizer": "rmsprop"}),
    ("small-20m", 512, 4, 256, "least", {"resumed": True}),
    ("small-20m", 2048, 2, 16, "least", {}),
    ("small-20m", 2048, 2, 16, "middle", {"data.eval_fraction": 0.3}),
    ("small-20m", 6000, 2, 16, "auto", {}),
    ("small-20m", 512, 4, 16, "middle", {"adapter.lora_dropout": 0.1}),
    ("smollm2-135m", 256, 4, 8, "auto", {}),
    ("smollm2-135m", 256, 4, 8, "middle", {}),
    ("smollm2-135m", 512, 2, 16, "least", {}),
    ("smollm2-135m", 512, 2, 64, "1GiB", {}),
    ("smollm2-360m", 256, 2, 8, "least", {}),
    ("smollm2-360m", 512, 2, 16, "auto", {}),
]
LARGE = [
    ("llama-3.2-1b", 512, 1, 8, "least", {}),
    ("llama-3.2-1b", 512, 2, 16, "2GiB", {}),
    ("llama-3.2-1b q8_0", 512, 1, 8, "least", {}),
    ("llama-3.2-1b q4_k", 512, 2, 16, "1GiB", {}),
]


def rows(path, tokens, count):
    """Pairs whose run holds up to so many tokens: half of it the prompt, about a word a token."""
    draw = random.Random(1)
    with open(path, "w") as out:
        for i in range(count):
            size = tokens if i % 3 == 0 else draw.randint(tokens // 2, tokens)
            words = lambda n: " ".join(draw.choice(WORDS) for _ in range(max(n, 2)))
            out.write(json.dumps({"prompt": f"{i} {words(size // 2)}", "chosen": " " + words(size // 4 - 3), "rejected": " x " + words(size // 4 - 6)}) + "\n")


def sets(settings):
    return [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def train(common, budget, work, *more):
    arguments = [*common, "--set", f"memory.budget={budget}", "--json", *more]
    return subprocess.run([binary, "train", *arguments], capture_output=True, text=True, cwd=work)


def made(base):
    shape, *form = base.split()
    folder = a.bases / shape
    if not (folder / "config.json").exists():
        subprocess.run([bases, shape, folder, "--tokenizer", a.tokenizer], check=True)
    if not form:
        return folder
    file = a.bases / f"{shape}-{form[0]}.gguf"
    if not file.exists():
        subprocess.run([binary, "quantize", folder, "--to", form[0], file], check=True, stdout=subprocess.DEVNULL)
    return file


def check(base, tokens, batch, rank, budget, more):
    folder = made(base)
    work = pathlib.Path(tempfile.mkdtemp())
    try:
        rows(work / "rows.jsonl", tokens, 3 * batch + 3)
        (work / "recipe.toml").write_text("[model]\nbase = " + json.dumps(str(folder.resolve())) + "\n[data]\ntrain = [\"rows.jsonl\"]\n")
        extra = ", ".join(f"{key.split('.')[-1]} {'…' if isinstance(value, list) else value}".removesuffix(" True") for key, value in more.items())
        resumed = more.pop("resumed", False)
        settings = {"adapter.r": rank, "data.max_length": 8192, "train.batch_size": batch, "train.max_steps": 3,
                    "run.device": "cpu", "run.output": str(work / "run"), **more}
        common = ["recipe.toml", *sets(settings)]
        plan = lambda budget: json.loads(subprocess.run([binary, "plan", *common, "--json", "--set", f"memory.budget={budget}"],
                                                        check=True, capture_output=True, cwd=work).stdout)
        if budget in ("least", "middle"):
            told = plan("auto")
            rungs = [rung["budget"] for rung in told["other_budgets"]]
            size = rungs[0] if budget == "least" else (rungs[0] + rungs[-1]) // 2
            # two plans of one recipe differ a little by what loading left over
            budget = f"{-(-size // 2**20) + 1}MiB"
        told = plan(budget)
        run = train(common, budget, work)
        if resumed and not run.returncode:
            run = train(common, budget, work, "--max-steps", "5", "--resume", "--extend")
        if run.returncode:
            return f"| {base} | {tokens} | {batch} | {rank} | {budget} | failed: {run.stderr.strip().splitlines()[-1]} |", False
        summary = json.loads(run.stdout)
        predicted, measured = summary["predicted_bytes"] / 2**20, summary["peak_bytes"] / 2**20
        kept = measured <= told["budget"] / 2**20
        good = kept and abs(predicted - measured) <= 0.1 * predicted
        return (f"| {base} | {tokens} | {batch} | {rank} | {extra or '–'} | {budget} | {predicted:.0f} | {measured:.0f} | "
                f"{100 * (measured / predicted - 1):+.1f} %{'' if good else ' **no**'} |"), good
    finally:
        shutil.rmtree(work)


print("| base | tokens a pair | pairs a step | r | more | budget | predicted MiB | measured MiB | difference |")
print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
failed = 0
for run in RUNS + (LARGE if a.large else []):
    if a.only in run[0]:
        line, good = check(*run)
        failed += not good
        print(line, flush=True)
sys.exit(failed > 0)
