#!/usr/bin/env bash
# Compiles our CUDA kernels with NVIDIA's compiler, to PTX and on to machine code for Ampere and Hopper, on a machine without
# a GPU or CUDA, and prints the registers and the shared memory of each; a kernel that spills a hundred bytes of
# registers or more fails. The compiler comes from PyPI's wheels and stays in $DPO_LORA_CACHE.
set -euo pipefail
cd "$(dirname "$0")/.."

cache=${DPO_LORA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dpo-lora}/cuda-13.0.88
nvcc=$cache/nvidia/cu13/bin/nvcc
if [ ! -x "$nvcc" ]; then
  mkdir -p "$(dirname "$cache")"
  new=$(mktemp -d "$cache.XXXXXX")
  python3 -m venv "$new/pip"
  "$new/pip/bin/python" -m pip download -q --no-deps -d "$new/wheels" nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96
  for wheel in "$new"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$new"; done
  rm -rf "$new/wheels" "$new/pip"
  find "$new/nvidia/cu13/bin" "$new/nvidia/cu13/nvvm/bin" -type f -exec chmod +x {} +
  rm -rf "$cache"
  mv "$new" "$cache"
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for source in $(grep -o '[a-z_]*\.cu"' src/kernels/cuda/mod.rs | tr -d '"'); do
  cat "src/kernels/cuda/$source"
done >"$folder/kernels.cu"
for capability in 80 90; do
  "$nvcc" -ptx -arch=compute_$capability -Werror all-warnings -o "$folder/kernels.ptx" "$folder/kernels.cu"
  "$(dirname "$nvcc")/ptxas" -v -arch=sm_$capability "$folder/kernels.ptx" -o "$folder/kernels.cubin" 2>"$folder/used"
  echo "compute capability $capability:"
  sed -n "s/.*Compiling entry function '\(.*\)' for.*/\1/p; s/.*Used \(.*\)/\1/p" "$folder/used" |
    sed 's/, *[0-9]* bytes cumulative stack size//' | paste - - | sed 's/^/  /'
  if grep -qE '[0-9]{3,} bytes spill' "$folder/used"; then
    echo "a kernel spills registers:"
    cat "$folder/used"
    exit 1
  fi
done
