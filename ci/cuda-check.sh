#!/usr/bin/env bash
# Type-checks the CUDA build on a machine without CUDA: a stand-in for nvcc says its version and writes empty outputs,
# so that candle's kernels count as compiled. Nothing that this builds can run, so it has a target folder of its own.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
toolkit=$(mktemp -d)
trap 'rm -rf "$toolkit"' EXIT
mkdir -p "$toolkit/bin" "$toolkit/include"
cp "$here/fake_nvcc" "$toolkit/bin/nvcc"

cd "$here/.."
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/cuda-check
PATH=$toolkit/bin:$PATH CUDA_HOME=$toolkit CUDA_PATH=$toolkit CUDA_ROOT=$toolkit NVCC=$toolkit/bin/nvcc \
  CUDA_COMPUTE_CAP=80 cargo check --locked --all-targets --features cuda
