#!/usr/bin/env bash
# cargo with CUDA on a machine that has neither it nor its compiler: a stand-in for nvcc says its version and writes empty
# kernels, and CUDA's libraries are looked for when the program asks for a GPU (ci/cuda_late.c).
#
#   ci/cuda-stand-in.sh CARGO ARGUMENTS       `--features cuda` is added
#
# What this builds runs on a made-up card (ci/made-up-card.sh) and on no other.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target/cuda-stand-in/bin" "$target/cuda-stand-in/include"
home=$(cd "$target/cuda-stand-in" && pwd)
cp -u ci/fake_nvcc "$home/bin/nvcc"
ci/cuda-late.sh "$home/lib"
ar rc "$home/lib/libcudart.a"
export PATH=$home/bin:$PATH CUDA_HOME=$home CUDA_PATH=$home CUDA_ROOT=$home NVCC=$home/bin/nvcc CUDA_COMPUTE_CAP=80
export LIBRARY_PATH=$home/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
exec cargo "$@" --features cuda
