#!/usr/bin/env bash
# Makes what a build with CUDA is linked against in place of CUDA's libraries (ci/cuda_late.c), in FOLDER: libcuda.a and
# its empty companions.
#
#   ci/cuda-late.sh FOLDER
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

# the functions are those that the bindings in Cargo.lock name
bindings=$(cargo metadata --format-version 1 --locked --features cuda |
  python3 -c 'import json, pathlib, sys
packages = json.load(sys.stdin)["packages"]
print(next(pathlib.Path(p["manifest_path"]).parent for p in packages if p["name"] == "cudarc"))')
functions() { # library, folder of the bindings, start of the functions' names
  grep -hoE "fn $3[A-Z][A-Za-z0-9_]*\(" "$bindings/src/$2/sys/mod.rs" | sed 's/fn //; s/(//' | sort -u |
    { grep -vxE 'cuInit|cuGetErrorString' || true; } | sed "s/^/$1 /"
}
{
  functions CUDA driver cu
  functions CUBLAS cublas cublas
  functions CUBLASLT cublaslt cublasLt
  functions CURAND curand curand
  functions NVRTC nvrtc nvrtc
} | awk '{ print "LATE(" NR - 1 ", " $1 ", " $2 ")" }' >"$out/symbols.h"
rm -f "$out"/lib*.a
"${CC:-cc}" -O2 -fPIC -Wall -Wextra -Werror -I "$out" -c ci/cuda_late.c -o "$out/late.o"
ar rc "$out/libcuda.a" "$out/late.o"
for library in cublas cublasLt curand nvrtc; do ar rc "$out/lib$library.a"; done
