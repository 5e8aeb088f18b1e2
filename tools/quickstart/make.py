#!/usr/bin/env python3
"""Makes everything under assets/quickstart: a tiny base model and preference pairs for it.

    python tools/quickstart/make.py [--steps N] [--out assets/quickstart] [--verify]

The base is trained on positive and negative reviews alike, so that it writes both about evenly;
the pairs prefer the positive continuation of a neutral opening. Ends with the figures that the
quickstart stands on, and fails where one is off.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import grammar
from measure import EOS, answer_logps, pad, shares, show, tokenize_pair, write

SEED = 20
VOCAB = 2000
BATCH = 32
OPENING_WEIGHT = 0.3
SHARES = (1, 2, 7)  # tenths of the steps: opinion words alone, opinions alone, reviews
TRAIN_PAIRS, EVAL_PAIRS = 800, 192
MODEL_LIMIT, PAIRS_LIMIT = 6_000_000, 1_000_000  # bytes


def main():
    here = Path(__file__).resolve().parents[2]
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--steps", type=int, default=3000, help="optimizer steps of the base")
    args.add_argument("--out", type=Path, default=here / "assets/quickstart")
    args.add_argument("--verify", action="store_true", help="make nothing; measure what is there")
    args = args.parse_args()
    # One thread: the same sums in the same order wherever this runs, and no waiting on busy cores.
    torch.set_num_threads(1)
    text = grammar.check()
    show("grammar", text)
    if args.verify:
        return verify(args.out, text["continuation_nats"])

    train, held_out = make_pairs()
    lessons = make_lessons(args.steps, {pair["prompt"] for pair in held_out})
    base = args.out / "base"
    base.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(["".join(review) for review in lessons[-1][:20_000]])
    tokenizer.save_pretrained(base)
    # transformers 5 names a class that transformers 4 does not know; both know this one.
    config = json.loads((base / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (base / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = make_model(tokenizer)
    print(f"base: {sum(p.numel() for p in model.parameters())} parameters, vocabulary {len(tokenizer)}")
    train_base(model, tokenizer, lessons)
    # f32, so that a merged export rounds nothing that base + adapter does not.
    model.save_pretrained(base)

    for name, rows in (("train", train), ("eval", held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(lines)
    (args.out / "labels.json").write_text(json.dumps(grammar.LABELS, indent=1) + "\n")
    verify(args.out, text["continuation_nats"])


def make_pairs():
    """Rows of prompt, chosen, rejected for training and, with openings of their own, held out."""
    source, pairs = grammar.Grammar(SEED + 1), {}
    while len(pairs) < TRAIN_PAIRS + EVAL_PAIRS:
        opening = source.opening()
        chosen, rejected = (source.review(side, opening)[1] for side in (True, False))
        pairs[opening] = {"prompt": opening, "chosen": chosen, "rejected": rejected}
    rows = list(pairs.values())
    return rows[:TRAIN_PAIRS], rows[TRAIN_PAIRS:]


def make_lessons(steps, without):
    """What the base reads, easy to hard, as three lists of (opening, continuation); half of each kind.

    That a review is of one mind is a faint signal: one bit among fifty. Read alone, reviews teach it
    only after many thousand steps; rows of nothing but opinions teach it in hundreds.
    """
    rng, source = random.Random(SEED), grammar.Grammar(SEED)
    counts = [share * steps // 10 * BATCH for share in SHARES]
    words = [("", " " + " ".join(rng.sample(grammar.LABELS[side], 14))) for side in sides(counts[0])]
    opinions = [("", source.opinions(side == "positive", 4)) for side in sides(counts[1])]
    reviews = []
    for side in sides(counts[2]):
        opening = next(o for o in iter(source.opening, None) if o not in without)
        reviews.append((opening, source.review(side == "positive", opening)[1]))
    return [words, opinions, reviews]


def sides(count):
    """Positive and negative in turn."""
    return ["positive", "negative"] * (count // 2)


def make_tokenizer(corpus):
    """Byte-level BPE with one special token, EOS; adds nothing to a text by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS, model_max_length=256)


def make_model(tokenizer):
    """A Llama of about a million parameters: grouped queries, tied embeddings."""
    torch.manual_seed(SEED)
    eos = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=eos, pad_token_id=eos,
        )
    )


def make_batches(rows, pool=32):
    """Batches of rows of like length (a third less padding), in an order that tells nothing of it."""
    batches = []
    for start in range(0, len(rows), pool * BATCH):
        block = sorted(rows[start : start + pool * BATCH], key=lambda row: len(row[1]))
        batches += [block[i : i + BATCH] for i in range(0, len(block), BATCH)]
    random.Random(SEED).shuffle(batches)
    return batches


def train_base(model, tokenizer, lessons):
    """Next-token prediction, every row once; AdamW, warm-up and half a cosine."""
    batches = []
    for lesson in lessons:
        heads = tokenizer([opening for opening, _ in lesson])["input_ids"]
        texts = tokenizer(["".join(row) for row in lesson])["input_ids"]
        batches += make_batches([(len(head), text + [tokenizer.eos_token_id]) for head, text in zip(heads, texts)])
    steps, some = len(batches), [opening for opening, _ in lessons[-1][:10]]
    peak, warmup = 3e-3, 100
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup),
        ],
        [warmup],
    )
    start = time.monotonic()
    for step in range(1, steps + 1):
        tokens, targets = (pad([row[1] for row in batches[step - 1]], value) for value in (0, -100))
        model.train()
        logits = model(input_ids=tokens).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), targets[:, 1:], reduction="none")
        # The continuation is what is asked of the base; that it be of one mind is learned late.
        opening = torch.arange(1, tokens.shape[1])[None] < torch.tensor([row[0] for row in batches[step - 1]])[:, None]
        weights = (targets[:, 1:] >= 0) * torch.where(opening, OPENING_WEIGHT, 1.0)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 100 == 0:
            print(f"step {step:5} loss {loss.item():.4f} {time.monotonic() - start:.0f} s", flush=True)
        if step % 500 == 0:
            model.eval()
            sampled = shares(tokenizer, write(model, tokenizer, some, 10, SEED))
            print(" ".join(f"{name} {share:.2f}" for name, share in sampled.items()), flush=True)
    model.eval()


def verify(out, continuation_nats):
    """Loads what was written and measures what the quickstart promises of it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "base")
    model = LlamaForCausalLM.from_pretrained(out / "base").eval()
    rows = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    pairs = [tokenize_pair(tokenizer, row) for row in rows]
    answers = write(model, tokenizer, [row["prompt"] for row in rows[:100]], 10, SEED)
    with torch.no_grad():
        logps = answer_logps(model, pairs)
    figures = shares(tokenizer, answers) | {
        "continuation_nats": -logps.mean().item(),
        "of_the_grammar": continuation_nats,
        "pair_accuracy": (logps[0] > logps[1]).float().mean().item(),
        "longest_pair_tokens": max(len(ids) for pair in pairs for ids in pair[1:]),
        "model_bytes": sum(file.stat().st_size for file in (out / "base").iterdir()),
        "pairs_bytes": sum(file.stat().st_size for file in out.glob("*.jsonl")),
    }
    show(f"base, {len(answers)} samples at temperature 1", figures)
    for opening, ids in answers[::125]:
        print(f"  {opening} |{tokenizer.decode(ids)}")
    assert 0.45 <= figures["positive"] <= 0.55, "the base does not write both kinds evenly"
    assert figures["none"] < 0.05 and figures["ended"] > 0.99 and figures["grammatical"] > 0.8
    assert 0.4 <= figures["pair_accuracy"] <= 0.6
    assert figures["model_bytes"] <= MODEL_LIMIT and figures["pairs_bytes"] <= PAIRS_LIMIT


if __name__ == "__main__":
    main()
