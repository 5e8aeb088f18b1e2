#!/usr/bin/env python3
"""Writes a random model whose rows are whole blocks of 64, so that NF4 can be made of it.

    VENV/bin/python tools/tiny_model.py gpt2|qwen3 OUT
"""
import sys

import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

family, out = sys.argv[1:]
ids = dict(vocab_size=48, bos_token_id=1, eos_token_id=2)
config = {
    "gpt2": GPT2Config(n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=64, **ids),
    "qwen3": Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=64, tie_word_embeddings=False, **ids),
}[family]
torch.manual_seed(1)
model = AutoModelForCausalLM.from_config(config)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))
model.save_pretrained(out)
