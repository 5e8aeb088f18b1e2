#!/usr/bin/env python3
"""Make the golden set: one small DPO run by TRL and PEFT in float32 on the CPU, written down to the last number.

    VENV/bin/python tools/golden.py --model HF_FOLDER --data ROWS.jsonl --out DIR [--init-adapter DIR]

ROWS.jsonl holds prompt/chosen/rejected as text; its first 10 rows are used. A 135M model needs 6 GB of memory and
three minutes of one core. DIR receives

- `init_adapter/`: where the policy starts: r 8, alpha 16, the seven linear layers of each block; B is drawn too
  (normal, 0.01), because at PEFT's own start it is zero and A has no gradient;
- `pairs.json`: for each row its text, its ids as TRL tokenises it, log-probs of policy and reference (the bare base),
  rewards, margin and loss;
- `losses.json`: every loss of TRL's on the first 8 pairs, and two that only others have;
- `grads_batch1_selected.safetensors`, `params_after_step{1,2}_selected.safetensors`: 12 LoRA tensors (q_proj and
  down_proj of the first, the middle and the last layer) in two steps of AdamW without decay or clipping, two pairs each;
- `summary.json`: settings, TRL's log of both steps, and how far two ways of torch itself lie apart
  (`spread_between_two_torch_ways`): no other program can be held to less.
"""
import argparse, json, os, pathlib, statistics, tempfile

ap = argparse.ArgumentParser()
ap.add_argument("--model", required=True)
ap.add_argument("--data", required=True)
ap.add_argument("--out", required=True, type=pathlib.Path)
ap.add_argument("--init-adapter", type=pathlib.Path, help="start from this one instead of drawing it")
ap.add_argument("--threads", type=int, default=2)
a = ap.parse_args()
os.environ.update(
    OMP_NUM_THREADS=str(a.threads), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1")

import datasets, torch, trl
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer

from fixtures.common import BETA, lora_parameters, max_difference, norm, pair_logps, sigmoid_losses, versions

BATCH, STEPS, PAIRS, RATE = 2, 2, 10, 5e-5
SIDES = ("chosen", "rejected")


class Keep(TrainerCallback):
    """The gradients of the first step, the parameters after each, and what TRL logs."""

    def __init__(self):
        self.grads, self.params, self.logs = None, [], []

    def on_pre_optimizer_step(self, *_, model, **__):
        self.grads = self.grads or {n: p.grad.clone() for n, p in lora_parameters(model).items()}

    def on_step_end(self, *_, model, **__):
        self.params.append({n: p.detach().clone() for n, p in lora_parameters(model).items()})

    def on_log(self, *_, logs, **__):
        self.logs.append(dict(logs))


def read_texts():
    with open(a.data) as f:
        return [json.loads(line) for line, _ in zip(f, range(PAIRS))]


def make_trainer(texts, keep, output):
    args = DPOConfig(
        output_dir=output, per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE, seed=0, beta=BETA,
        lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0, max_grad_norm=0.0, max_length=512,
        bf16=False, use_cpu=True, gradient_checkpointing=False, train_sampling_strategy="sequential", logging_steps=1,
        report_to=[], save_strategy="no", disable_tqdm=True)
    # The adapter is made by the trainer: given one that exists, TRL would take that, not the bare base, as reference.
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, attn_implementation="sdpa")
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(a.model), peft_config=lora, callbacks=[keep])
    trainer.remove_callback(PrinterCallback)
    return trainer


def start_policy(model):
    """Give the policy its start, and save it."""
    if a.init_adapter:
        set_peft_model_state_dict(model, load_peft_weights(a.init_adapter, device="cpu"))
    else:
        torch.manual_seed(0)
        with torch.no_grad():
            for name, p in lora_parameters(model).items():
                if "lora_B" in name:
                    p.normal_(0, 0.01)
    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)
    config.base_model_name_or_path = pathlib.Path(a.model).name
    model.save_pretrained(a.out / "init_adapter", save_embedding_layers=False)
    (a.out / "init_adapter" / "README.md").unlink()


def trl_forward(trainer, batch):
    """TRL's own way, padding, sdpa and its chunked head: its output, and log-probs per sequence and answer token."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    output = trainer.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, labels=labels,
        fused_lm_head=True)
    answers = batch["completion_mask"][:, 1:].bool()
    return output, [row[mask] for row, mask in zip(output.log_probs, answers, strict=True)]


def trl_pair_logps(trainer, rows, batch_size):
    """`pair_logps` by `trl_forward`, in batches."""
    pairs = []
    for start in range(0, len(rows), batch_size):
        batch = trainer.data_collator(rows[start : start + batch_size])
        logps = trl_forward(trainer, batch)[1]
        half = len(logps) // 2  # the chosen answers come first
        pairs += list(zip(logps[:half], logps[half:], strict=True))
    return pairs


def describe_pairs(texts, rows, policy, reference):
    """The entries of pairs.json. The texts are those of the file: TRL's rows have EOS appended to the answers."""
    entries = []
    losses = sigmoid_losses(policy, reference)
    for i, (text, row, p, r, loss) in enumerate(zip(texts, rows, policy, reference, losses, strict=True)):
        entry = {"index": i} | {k: text[k] for k in ("prompt", *SIDES)} | {k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for who, logps in (("policy", p), ("ref", r)):
            for side, x in zip(SIDES, logps, strict=True):
                entry[f"{who}_{side}_logps"] = x.sum().item()
                entry[f"{who}_{side}_token_logps"] = x.tolist()
        for side in SIDES:
            entry[f"reward_{side}"] = BETA * (entry[f"policy_{side}_logps"] - entry[f"ref_{side}_logps"])
        entry["margin"] = entry["reward_chosen"] - entry["reward_rejected"]
        entries.append(entry | {"loss_sigmoid": loss.item()})
    return entries


def other_way(trainer, rows):
    """Log-probs, losses and the first batch's gradients by another way of torch: no padding, eager attention, full logits."""
    model = trainer.model
    ids = [{"prompt": r["prompt_ids"], "chosen": r["chosen_ids"], "rejected": r["rejected_ids"]} for r in rows]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        policy = pair_logps(model, ids)
        with model.disable_adapter():
            reference = pair_logps(model, ids)
    for pair, ref in zip(ids[:BATCH], reference, strict=False):
        (sigmoid_losses(pair_logps(model, [pair]), [ref]).sum() / BATCH).backward()
    grads = {n: p.grad.clone() for n, p in lora_parameters(model).items()}
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    return policy, sigmoid_losses(policy, reference), grads


# The log-ratios of policy to reference are C (chosen) and R (rejected), D = C - R, b is beta, e the label smoothing,
# ls the log of the sigmoid s, |c| and |r| the answers' lengths in tokens. For each loss: smoothings to try, formula.
TRL_LOSSES = {
    "sigmoid": ([0.0, 0.1], "-ls(b D); e is ignored"),
    "hinge": ([0.0], "max(0, 1 - b D)"),
    "ipo": ([0.0], "(C/|c| - R/|r| - 1/(2b))^2"),
    "robust": ([0.0, 0.1], "(-(1-e) ls(b D) + e ls(-b D)) / (1 - 2e)"),
    "exo_pair": ([0.1, 0.001], "q (log q - log(1-e)) + (1-q) (log(1-q) - log e), q = s(b D)"),
    "nca_pair": ([0.0], "-ls(b C) - ls(-b C)/2 - ls(-b R)/2"),
    "bco_pair": ([0.0], "-ls(b C) - ls(-b R)"),
    "sppo_hard": ([0.0], "(C - 1/(2b))^2 + (R + 1/(2b))^2"),
    "aot": ([0.0, 0.1], "-(1-e) ls(b d) - e ls(-b d), d = sorted policy's chosen less rejected, less sorted reference's"),
    "aot_unpaired": ([0.0, 0.1], "-(1-e) ls(b d) - e ls(-b d), d = sorted C less sorted R"),
    "apo_zero": ([0.0], "1 - s(b C) + s(b R)"),
    "apo_down": ([0.0], "s(b C) + 1 - s(b D)"),
    "discopop": ([0.0], "-ls(b D) (1-m) + exp(-b D) m, m = s(b D / 0.05)"),
    "sft": ([0.0], "mean of -log-prob over the chosen answers' tokens"),
    "sigmoid_norm": ([0.0], "-ls(b (C/|c| - R/|r|))"),
}
DIVERGENCES = {
    "forward_kl": "1 - exp(-x)", "js_divergence": "log 2 + ls(x)",
    "alpha_divergence": "(exp((h-1) x) - 1) / (h-1), h = 1/2,",
}


def all_losses(trainer, batch, output, reference):
    """TRL's `_compute_loss` on a forward pass that is already done, for every loss that it knows."""
    refs = [torch.stack([r[side].sum() for r in reference]) for side in (0, 1)]
    inputs = batch | {"ref_chosen_logps": refs[0], "ref_rejected_logps": refs[1]}
    trainer.precompute_ref_logps = True

    def by_trl(name, smoothing=0.0, divergence="reverse_kl"):
        trainer.loss_types, trainer.loss_weights = [name], [1.0]
        trainer.label_smoothing, trainer.f_divergence_type = smoothing, divergence
        return trainer._compute_loss(lambda **_: output, inputs, False).item()

    losses = {
        f"{name}|label_smoothing={e}": {"loss": by_trl(name, e), "formula": formula}
        for name, (smoothings, formula) in TRL_LOSSES.items() for e in smoothings}
    for divergence, score in DIVERGENCES.items():
        losses[f"sigmoid|f_divergence={divergence}"] = {
            "loss": by_trl("sigmoid", 0.0, divergence), "formula": f"sigmoid with {score} for each log-ratio x"}
    sums = output.log_probs.sum(1)
    half = len(sums) // 2
    delta = (sums[:half] - refs[0]) - (sums[half:] - refs[1])
    # TRL's `sigmoid` ignores label smoothing, and its `ipo` divides by length: these are the papers' own forms.
    losses["cdpo|label_smoothing=0.1"] = {
        "loss": -(0.9 * logsigmoid(BETA * delta) + 0.1 * logsigmoid(-BETA * delta)).mean().item(),
        "formula": "-(1-e) ls(b D) - e ls(-b D)"}
    losses["ipo_unnormalised"] = {"loss": (delta - 1 / (2 * BETA)).square().mean().item(), "formula": "(D - 1/(2b))^2"}
    counts = batch["completion_mask"].sum(1).tolist()
    return {
        "n_pairs": half, "beta": BETA, "policy_chosen": sums[:half].tolist(), "policy_rejected": sums[half:].tolist(),
        "ref_chosen": refs[0].tolist(), "ref_rejected": refs[1].tolist(), "chosen_tokens": counts[:half],
        "rejected_tokens": counts[half:], "losses": losses,
    }


def spread(policy, losses, grads, other):
    """How far the other way of torch lies from TRL's."""
    other_policy, other_losses, other_grads = other
    apart = {n: (norm([grads[n] - other_grads[n]]) / norm([grads[n]])) for n in grads}
    return {
        "max_abs_sum_logp": max_difference([[x.sum() for x in p] for p in policy], [[x.sum() for x in p] for p in other_policy]),
        "max_abs_token_logp": max_difference(policy, other_policy),
        "max_abs_loss": (losses - other_losses).abs().max().item(),
        "grad_rel_l2_median": statistics.median(apart.values()), "grad_rel_l2_max": max(apart.values()),
        "grad_rel_l2_selected": {n: apart[n] for n in selected(apart)},
        "what": "no padding, eager attention and full log-softmax against TRL's padding, sdpa and chunked head, both float32",
    }


def selected(tensors):
    """Of a dictionary of LoRA tensors, q_proj's and down_proj's of the first, the middle and the last layer."""
    last = max(int(n.split(".layers.")[1].split(".")[0]) for n in tensors)
    layers = [f".layers.{i}." for i in (0, (last + 1) // 2, last)]
    return {n: t for n, t in tensors.items() if any(l in n for l in layers) and ("q_proj" in n or "down_proj" in n)}


def write(name, value):
    (a.out / name).write_text(json.dumps(value))


def main(output):
    keep = Keep()
    texts = read_texts()
    trainer = make_trainer(texts, keep, output)
    start_policy(trainer.model)
    rows = list(trainer.train_dataset)
    eight = trainer.data_collator(rows[:8])
    with torch.no_grad():
        policy = trl_pair_logps(trainer, rows, BATCH)
        eight_output = trl_forward(trainer, eight)[0]
        with trainer.model.disable_adapter():
            reference = trl_pair_logps(trainer, rows, BATCH)
            eight_reference = trl_pair_logps(trainer, rows[:8], 8)
    write("pairs.json", describe_pairs(texts, rows, policy, reference))
    other = other_way(trainer, rows)
    trainer.train()
    write("losses.json", all_losses(trainer, eight, eight_output, eight_reference))
    save_file(selected(keep.grads), a.out / "grads_batch1_selected.safetensors")
    for step, params in enumerate(keep.params, 1):
        save_file(selected(params), a.out / f"params_after_step{step}_selected.safetensors")
    write("summary.json", {
        "versions": versions() | {"trl": trl.__version__}, "beta": BETA, "batch_size": BATCH, "lr": RATE,
        "lr_schedule": "constant", "optimizer": "AdamW, betas 0.9 and 0.999, eps 1e-8, no decay", "max_grad_norm": "none",
        "max_length": 512, "lora": {"r": 8, "alpha": 16, "dropout": 0.0}, "reference": "the bare base", "dtype": "float32",
        "batch1": {
            "pairs": list(range(BATCH)), "loss": keep.logs[0]["loss"], "grad_norm_all_lora": norm(keep.grads.values()),
            "input_shape": list(trainer.data_collator(rows[:BATCH])["input_ids"].shape)},
        "train_steps": keep.logs[:STEPS],
        "spread_between_two_torch_ways": spread(policy, sigmoid_losses(policy, reference), keep.grads, other),
    })


disable_progress_bar()
datasets.disable_progress_bars()
torch.set_num_threads(a.threads)
a.out.mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory() as scratch:
    main(scratch)
