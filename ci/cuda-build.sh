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

# what stands in for the libraries: their functions as the bindings name them
cargo fetch --locked
bindings=$(cargo metadata --format-version 1 --locked --features cuda |
  python3 -c 'import json, pathlib, sys
packages = json.load(sys.stdin)["packages"]
print(next(pathlib.Path(p["manifest_path"]).parent for p in packages if p["name"] == "cudarc"))')
link=$CARGO_TARGET_DIR/link
rm -rf "$link"
mkdir -p "$link"
link=$(cd "$link" && pwd)
functions() { # library, folder of the bindings, start of the functions' names
  grep -hoE "fn $3[A-Z][A-Za-z0-9_]*\(" "$bindings/src/$2/sys/mod.rs" | sed 's/fn //; s/(//' | sort -u |
    grep -vxE 'cuInit|cuGetErrorString' | sed "s/^/$1 /"
}
{
  functions CUDA driver cu
  functions CUBLAS cublas cublas
  functions CUBLASLT cublaslt cublasLt
  functions CURAND curand curand
  functions NVRTC nvrtc nvrtc
} | awk '{ print "LATE(" NR - 1 ", " $1 ", " $2 ")" }' >"$link/symbols.h"
"${CC:-cc}" -O2 -fPIC -Wall -Wextra -Werror -I "$link" -c ci/cuda_late.c -o "$link/late.o"
ar rc "$link/libcuda.a" "$link/late.o"
for library in cublas cublasLt curand nvrtc; do ar rc "$link/lib$library.a"; done
ln -s "$CUDA_HOME/lib/libcudart_static.a" "$link/libcudart.a"
export LIBRARY_PATH=$link${LIBRARY_PATH:+:$LIBRARY_PATH}
exec cargo "$@" --features cuda
