"""What make.py and check.py both measure: log-probs of answers, and the reviews a model writes."""

import torch
import torch.nn.functional as F

import grammar

EOS = "<|endoftext|>"


def pad(rows, value):
    """Lists of ids as one tensor `[rows, longest]`, filled at the end with `value`."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def tokenize_pair(tokenizer, pair):
    """(prompt length, chosen ids, rejected ids); prompt first, EOS last, as TRL does."""
    prompt = tokenizer(pair["prompt"])["input_ids"]
    sides = [tokenizer(pair["prompt"] + pair[side])["input_ids"] for side in ("chosen", "rejected")]
    assert all(ids[: len(prompt)] == prompt for ids in sides), "the tokenizer merges over the seam"
    return len(prompt), *(ids + [tokenizer.eos_token_id] for ids in sides)


def answer_logps(model, pairs):
    """Summed log-probs of the answers of tokenized pairs: `[2, pairs]`, chosen then rejected."""
    rows = [pair[1] for pair in pairs] + [pair[2] for pair in pairs]
    starts = torch.tensor([pair[0] for pair in pairs] * 2)[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    ids = pad(rows, 0)
    # Padding lies behind every token that counts, so causal attention needs no mask.
    logps = -F.cross_entropy(model(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    at = torch.arange(1, ids.shape[1])[None]
    return (logps * ((at >= starts) & (at < ends))).sum(1).view(2, -1)


@torch.no_grad()
def write(model, tokenizer, openings, each, seed, max_new_tokens=48):
    """`each` continuations of every opening at temperature 1: ids without the opening, cut behind EOS."""
    torch.manual_seed(seed)
    eos, answers = tokenizer.eos_token_id, []
    for opening in openings:
        prompt = torch.tensor([tokenizer(opening)["input_ids"]] * each)
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=eos,
        )
        for ids in out[:, prompt.shape[1] :].tolist():
            answers.append((opening, ids[: ids.index(eos) + 1] if eos in ids else ids))
    return answers


def shares(tokenizer, answers):
    """Shares of answers by label, of those the grammar could have made, and of those that end."""
    checker = grammar.Grammar(0)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in answers]
    labels = [grammar.label(text) for text in texts]
    return {
        "positive": labels.count("positive") / len(texts),
        "negative": labels.count("negative") / len(texts),
        "none": labels.count(None) / len(texts),
        "grammatical": sum(map(checker.accepts, texts)) / len(texts),
        "ended": sum(ids[-1] == tokenizer.eos_token_id for _, ids in answers) / len(texts),
        "mean_tokens": sum(len(ids) for _, ids in answers) / len(texts),
    }


def show(title, figures):
    """One line a figure."""
    print(title)
    for name, figure in figures.items():
        print(f"  {name:24} {figure:.4g}")
