#!/usr/bin/env python3
"""TRL with PEFT and bitsandbytes on a GPU, as people use it for a base in NF4: QLoRA with gradient checkpointing and bf16.

    benches/gpu/trl_peer.py BASE ROWS.jsonl TOKENS STEPS [DEVICE]

Prints one object: the median of seconds a pair after two steps, and the peak of memory that torch's allocator reserved.
DEVICE is cuda:0; on cpu, where it shows no more than that it runs, there is no such peak.
"""
import json, os, sys, tempfile, time

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import datasets, torch
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

base, path, tokens, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
device = sys.argv[5] if len(sys.argv) > 5 else "cuda:0"
on_card = device != "cpu"
datasets.disable_progress_bars()


def synchronize():
    if on_card:
        torch.cuda.synchronize()


class Watch(TrainerCallback):
    seconds = []

    def on_step_begin(self, *_, **__):
        synchronize()
        self.at = time.perf_counter()

    def on_step_end(self, *_, **__):
        synchronize()
        self.seconds.append(time.perf_counter() - self.at)


tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
# every sequence is cut to the same tokens as ours: the prompt loses its beginning
rows = []
for line in open(path):
    row = json.loads(line)
    longest = max(len(tokenizer.encode(row[key], add_special_tokens=False)) for key in ("chosen", "rejected"))
    prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)[-(tokens - longest - 1):]
    rows.append({**row, "prompt": tokenizer.decode(prompt)})
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": device})
model = prepare_model_for_kbit_training(model)
watch = Watch()
with tempfile.TemporaryDirectory() as output:
    args = DPOConfig(output_dir=output, per_device_train_batch_size=1, max_steps=steps, learning_rate=5e-5, beta=0.1, max_length=tokens, bf16=True, use_cpu=not on_card,
                     gradient_checkpointing=True, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True)
    lora = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    trainer = DPOTrainer(model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora, callbacks=[watch])
    trainer.train()
timed = sorted(watch.seconds[2:])
print(json.dumps({"seconds_a_pair": timed[len(timed) // 2], "peak_bytes": torch.cuda.max_memory_reserved() if on_card else None, "torch": torch.__version__}))
