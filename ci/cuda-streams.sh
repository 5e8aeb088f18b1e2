#!/usr/bin/env bash
# Runs the tests of weights' way to a card (src/weights/queues/cuda.rs) and of what waits on its host (src/kernels/cuda/pinned.rs) on a made-up driver (ci/made_up_driver.c), once with each
# of its streams as late as it may be. Builds the library with CUDA (ci/cuda-build.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cc -shared -fPIC -O1 -Wall -Wextra -Werror -o "$folder/libcuda.so.1" ci/made_up_driver.c -lpthread
# one library stands for all
for library in libcublas.so.13 libcublasLt.so.13 libcurand.so.10; do ln -s libcuda.so.1 "$folder/$library"; done
program=$(ci/cuda-build.sh "${CARGO_TARGET_DIR:-target}/cuda" test --release --locked --lib --no-run --message-format json |
  python3 -c 'import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made["profile"]["test"]: print(made["executable"])')
tests() { # which stream is late, which wait is left out, tests...
  LD_LIBRARY_PATH=$folder MADE_UP_LAZY=$1 MADE_UP_DEAF=$2 DPO_LORA_REQUIRE_ALL=1 "$program" "${@:3}" --test-threads 1
}
for lazy in copying computing none; do
  echo "late: $lazy"
  tests "$lazy" "" weights::queues::cuda kernels::cuda::pinned
done
for case in "copying host" "copying computes" "computing copies"; do
  # shellcheck disable=SC2086 # two words
  if tests $case weights::queues::cuda::tests::layers_that_stream >"$folder/said" 2>&1; then
    echo "$case: the wait that was left out is not missed"
    exit 1
  fi
  grep -q 'the matrix from' "$folder/said" || { cat "$folder/said"; exit 1; }
done
echo "each wait that is left out is missed"
