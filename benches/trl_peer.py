#!/usr/bin/env python3
"""The peer to be measured against: TRL's DPOTrainer with PEFT LoRA on the CPU, on the same rows.

    python3 -m venv VENV && VENV/bin/pip install torch==2.15.0 transformers==5.23.0 trl==1.16.0 peft==0.21.2 datasets accelerate
    VENV/bin/python benches/trl_peer.py --model HF_FOLDER --data ROWS.jsonl --steps 8 [options] [--json OUT.json]

(about 6 GB on disk; torch's PyPI build does not import without its CUDA libraries.) Prints one object:
seconds a step (median and mean after two warm-up steps), pairs and non-padding tokens a second, and the peak while
training of resident memory (which counts mapped files) and of anonymous memory (which does not: what other programs
cannot have). Time it on a quiet machine: with other work on the same cores torch's two threads wait for each other
and slow down many times over.
"""
import argparse, json, os, tempfile, threading, time

ap = argparse.ArgumentParser()
ap.add_argument("--model", required=True)
ap.add_argument("--data", required=True)
ap.add_argument("--json", help="where the same object goes, with the log of every step")
ap.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen weights")
ap.add_argument("--autocast", action="store_true", help="bf16 autocast")
ap.add_argument("--checkpointing", action="store_true")
ap.add_argument("--precompute", action="store_true", help="reference log-probs once, before training")
ap.add_argument("--steps", type=int, default=8, help="at least 3: the first two are warm-up")
ap.add_argument("--batch", type=int, default=2, help="pairs at once; their logits alone are gigabytes")
ap.add_argument("--accumulate", type=int, default=1, help="batches a step")
ap.add_argument("--max-length", type=int, default=512)
ap.add_argument("--rank", type=int, default=8)
ap.add_argument("--threads", type=int, default=2)
a = ap.parse_args()
if a.steps < 3:
    ap.error("--steps: the first two steps are warm-up, so at least 3 are needed")
os.environ.update(OMP_NUM_THREADS=str(a.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import torch, transformers, trl, peft, datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

datasets.disable_progress_bars()
torch.set_num_threads(a.threads)


def status(field):
    """A field of /proc/self/status in MiB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


class AnonymousPeak:
    """The kernel keeps no high-water mark of anonymous memory, so a thread looks every 10 ms."""

    def __enter__(self):
        self.mib, self.stop = status("RssAnon"), threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(0.01):
            self.mib = max(self.mib, status("RssAnon"))

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


class Watch(TrainerCallback):
    def __init__(self):
        self.seconds, self.logs = [], []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)

    def on_log(self, args, state, control, logs=None, **__):
        self.logs.append(dict(logs))


def make_trainer(watch, output):
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype))
    with open(a.data) as f:
        rows = [json.loads(line) for line, _ in zip(f, range(a.steps * a.batch * a.accumulate))]
    args = DPOConfig(
        output_dir=output, per_device_train_batch_size=a.batch, gradient_accumulation_steps=a.accumulate, max_steps=a.steps, learning_rate=5e-5,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, beta=0.1, max_length=a.max_length, seed=0,
        bf16=a.autocast, use_cpu=True, gradient_checkpointing=a.checkpointing, precompute_ref_log_probs=a.precompute,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential")
    lora = LoraConfig(
        r=a.rank, lora_alpha=2 * a.rank, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(a.model), peft_config=lora, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)  # stdout is for the one object
    return trainer


def count_tokens(trainer):
    """From now on the collator notes how many tokens of each batch are not padding, in the list that is returned."""
    tokens, collate = [], trainer.data_collator

    def counting(examples):
        batch = collate(examples)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counting
    return tokens


def main():
    watch = Watch()
    with tempfile.TemporaryDirectory() as output:
        before = time.perf_counter()
        trainer = make_trainer(watch, output)
        prepare = time.perf_counter() - before
        tokens = count_tokens(trainer)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # start the resident peak afresh
        with AnonymousPeak() as anonymous:
            trainer.train()
        resident = status("VmHWM")
    timed = watch.seconds[2:]
    result = {
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, peft)},
        "options": {k: v for k, v in vars(a).items() if k not in ("model", "data", "json")},
        "prepare_s": prepare, "median_step_s": sorted(timed)[len(timed) // 2], "mean_step_s": sum(timed) / len(timed),
        "pairs_per_s": a.batch * a.accumulate * len(timed) / sum(timed),
        "tokens_per_s": sum(tokens[2 * a.accumulate : len(watch.seconds) * a.accumulate]) / sum(timed),
        "peak_rss_mib": resident, "peak_anon_mib": anonymous.mib,
    }
    print(json.dumps(result, indent=1))
    if a.json:
        with open(a.json, "w") as f:
            json.dump(result | {"steps": [log for log in watch.logs if "loss" in log]}, f, indent=1)


main()
