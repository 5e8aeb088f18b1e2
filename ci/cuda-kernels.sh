#!/usr/bin/env bash
# Compiles our CUDA kernels with NVIDIA's compiler, to PTX and on to machine code for Ampere and Hopper, on a machine without
# a GPU or CUDA, and prints the registers and the shared memory of each; a kernel that spills a hundred bytes of
# registers or more fails. The compiler comes from PyPI's wheels and stays in $DPO_LORA_CACHE.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=$(ci/cuda-toolchain.sh)/bin/nvcc
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for source in $(grep -o '[a-z0-9_]*\.cu"' src/kernels/cuda/mod.rs | tr -d '"'); do
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
