#!/usr/bin/env python3
"""Checks with PEFT and a plain DPO loop that assets/quickstart teaches what the quickstart says.

    python tools/quickstart/check.py [--steps 50] [--lr 4.5e-4] [--r 8] ...

Prints held-out reward accuracy, the shares of positive and negative reviews before and after,
and the KL of the tuned model to the base; fails where the quickstart's promise is missed.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from measure import answer_logps, shares, show, tokenize_pair, write


def main():
    here = Path(__file__).resolve().parents[2]
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--assets", type=Path, default=here / "assets/quickstart")
    args.add_argument("--steps", type=int, default=50)
    args.add_argument("--batch", type=int, default=16)
    args.add_argument("--lr", type=float, default=4.5e-4)
    args.add_argument("--warmup", type=int, default=5)
    args.add_argument("--r", type=int, default=8)
    args.add_argument("--alpha", type=int, default=16)
    args.add_argument("--beta", type=float, default=0.1)
    args.add_argument("--samples", type=int, default=200)
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.assets / "base")
    base = LlamaForCausalLM.from_pretrained(args.assets / "base").eval()
    rows = {name: read(args.assets / f"{name}.jsonl") for name in ("train", "eval")}
    pairs = {name: [tokenize_pair(tokenizer, row) for row in rows[name]] for name in rows}
    openings = [row["prompt"] for row in rows["eval"][:20]]

    with torch.no_grad():
        reference = {name: split(base, pairs[name]) for name in pairs}
    report("before", base, tokenizer, openings, args)

    lora = LoraConfig(r=args.r, lora_alpha=args.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    start = time.process_time()
    train(model, pairs["train"], reference["train"], args)
    print(f"{args.steps} steps, {time.process_time() - start:.1f} s of one core")

    with torch.no_grad():
        rewards = args.beta * (split(model, pairs["eval"]) - reference["eval"])
    accuracy = (rewards[0] > rewards[1]).float().mean().item()
    show(
        "held-out pairs",
        {
            "accuracy": accuracy,
            "reward_chosen": rewards[0].mean().item(),
            "reward_rejected": rewards[1].mean().item(),
            "margin": (rewards[0] - rewards[1]).mean().item(),
        },
    )
    after = report("after", model, tokenizer, openings, args)
    assert accuracy >= 0.95 and after["positive"] >= 0.9 and after["kl_to_base"] < 5


def read(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def split(model, pairs, batch=64):
    """`answer_logps` in batches: `[2, pairs]`."""
    return torch.cat([answer_logps(model, pairs[i : i + batch]) for i in range(0, len(pairs), batch)], dim=1)


def train(model, pairs, reference, args):
    """DPO (Rafailov et al. 2023, equation 7) with AdamW, warm-up and a line to 0."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    rng, order = random.Random(args.seed), []
    for step in range(args.steps):
        if len(order) < args.batch:
            order = rng.sample(range(len(pairs)), len(pairs))
        rows, order = order[: args.batch], order[args.batch :]
        left = (args.steps - step) / max(args.steps - args.warmup, 1)
        optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / max(args.warmup, 1), left)
        ratios = answer_logps(model, [pairs[row] for row in rows]) - reference[:, rows]
        margins = args.beta * (ratios[0] - ratios[1])
        loss = -F.logsigmoid(margins).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            correct = (margins > 0).float().mean().item()
            print(f"step {step:4} loss {loss.item():.4f} accuracy {correct:.2f} margin {margins.mean().item():.2f}", flush=True)


@torch.no_grad()
def report(title, model, tokenizer, openings, args):
    """Samples of the model as it stands: their shares, a few of them, and the KL to the base."""
    answers = write(model, tokenizer, openings, args.samples // len(openings), args.seed)
    figures = shares(tokenizer, answers)
    if hasattr(model, "disable_adapter"):
        prompts = [tokenizer(opening)["input_ids"] for opening, _ in answers]
        # `answer_logps` reads pairs; here both sides of one are the same sample.
        drawn = [(len(p), p + ids, p + ids) for p, (_, ids) in zip(prompts, answers)]
        tuned = split(model, drawn)[0]
        with model.disable_adapter():
            figures["kl_to_base"] = (tuned - split(model, drawn)[0]).mean().item()
    show(f"{title}, {len(answers)} samples at temperature 1", figures)
    for opening, ids in answers[:: len(answers) // 8]:
        print(f"  {opening} |{tokenizer.decode(ids)}")
    return figures


if __name__ == "__main__":
    main()
