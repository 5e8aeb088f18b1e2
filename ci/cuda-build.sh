#!/usr/bin/env bash
# Builds with CUDA on a machine that has neither CUDA nor a card, with NVIDIA's own compiler (ci/cuda-toolchain.sh):
#
#   ci/cuda-build.sh [FOLDER] [CARGO ARGUMENTS]     FOLDER: target/cuda; arguments: build --release --locked
#
# CUDA_COMPUTE_CAP is 80 unless it is set: PTX for every card since Ampere. The binary looks for CUDA's libraries when it is
# asked for a GPU (ci/cuda_late.c), so it starts without them too; CUDA's runtime is linked in. `--features cuda` is added.
set -euo pipefail
cd "$(dirname "$0")/.."
CUDA_HOME=$(ci/cuda-toolchain.sh)
export CUDA_HOME CUDA_PATH=$CUDA_HOME PATH=$CUDA_HOME/bin:$PATH CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}
[ "$CUDA_COMPUTE_CAP" != 80 ] || export NVCC=$PWD/ci/nvcc_ptx
export CARGO_TARGET_DIR=${1:-target/cuda}
shift || true
[ $# -gt 0 ] || set -- build --release --locked

link=$CARGO_TARGET_DIR/link
ci/cuda-late.sh "$link"
link=$(cd "$link" && pwd)
ln -sf "$CUDA_HOME/lib/libcudart_static.a" "$link/libcudart.a"
export LIBRARY_PATH=$link${LIBRARY_PATH:+:$LIBRARY_PATH}
exec cargo "$@" --features cuda
