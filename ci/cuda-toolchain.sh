#!/usr/bin/env bash
# NVIDIA's compiler and its headers on a machine without CUDA, from PyPI's wheels: prints the folder that CUDA_HOME is to
# name. It is made once, in $DPO_LORA_CACHE.
set -euo pipefail

cache=${DPO_LORA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dpo-lora}/cuda-13.0.88
home=$cache/nvidia/cu13
if [ ! -x "$home/bin/nvcc" ]; then
  mkdir -p "$(dirname "$cache")"
  new=$(mktemp -d "$cache.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  python3 -m venv "$new/pip"
  "$new/pip/bin/python" -m pip download -q --no-deps -d "$new/wheels" nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96 >&2
  for wheel in "$new"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$new"; done
  rm -rf "$new/wheels" "$new/pip"
  find "$new/nvidia/cu13/bin" "$new/nvidia/cu13/nvvm/bin" -type f -exec chmod +x {} +
  rm -rf "$cache"
  mv -T "$new" "$cache"
fi
echo "$home"
