#!/usr/bin/env bash
# Runs the CUDA build on a machine without a card. The driver and cuBLAS are made up (ci/made_up_driver.c), and kernels run
# on the CPU (ci/made_up_kernels.cpp); all between a recipe and the driver's calls is what a card gets.
#
#   ci/made-up-card.sh                  what tests/devices.rs holds, and two runs beside the CPU's
#   ci/made-up-card.sh library          the library's tests on a card, and its queues with each stream as late as it may be
#   ci/made-up-card.sh make FOLDER      the card alone: with LD_LIBRARY_PATH=FOLDER any build with CUDA finds it
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

make_card() { # where
  local source
  mkdir -p "$1"
  {
    echo '#include "cuda.hpp"'
    for source in $(grep -o '[a-z0-9_]*\.cu"' src/kernels/cuda/mod.rs | tr -d '"'); do cat "src/kernels/cuda/$source"; done
    # a list of the kernels as launch.hpp takes it
    sed -n '/^pub const [A-Z_]*KERNELS/,/^\];/p' src/kernels/gpu/mod.rs | grep -oE '"[a-z0-9_]+"' | tr -d '"' |
      sed 's/.*/NAME(&)/' | tr '\n' ' ' | sed 's/^/#define NAMES /'
    echo
    echo '#include "launch.hpp"'
    cat ci/made_up_kernels.cpp
  } >"$folder/kernels.cpp"
  # as src/kernels/gpu/host.rs has them compiled
  "${CXX:-c++}" -std=c++14 -O3 -ffp-contract=off -fPIC -U_FORTIFY_SOURCE -Wall -Wextra -Werror -Wno-attributes \
    -Wno-unknown-pragmas -Wno-unused-parameter -Wno-unused-variable -Wno-unused-function -I src/kernels/cuda/host \
    -I src/kernels/gpu/host -c "$folder/kernels.cpp" -o "$folder/kernels.o"
  "${CC:-cc}" -O1 -fPIC -Wall -Wextra -Werror -c ci/made_up_driver.c -o "$folder/driver.o"
  "${CXX:-c++}" -shared -o "$1/libcuda.so.1" "$folder/driver.o" "$folder/kernels.o" -lpthread
  # one library stands for all
  local library
  for library in libcublas.so.13 libcublasLt.so.13 libcurand.so.10; do ln -sf libcuda.so.1 "$1/$library"; done
}

programs() { # cargo's arguments after `test`: its test program, and the binary where it needs one, as NAME=PATH
  ci/cuda-stand-in.sh test --locked --no-run --message-format json "$@" | python3 -c 'import json, shlex, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable"): print(made["target"]["name"].replace("-", "_") + "=" + shlex.quote(made["executable"]))'
}

devices() {
  local devices dpo_lora
  eval "$(programs --test devices)"
  DPO_LORA_REQUIRE_DEVICE=cuda "$devices" --nocapture
  local assets=$PWD/assets/quickstart
  cat >"$folder/recipe.toml" <<RECIPE
[model]
base = "$assets/base"
[data]
train = ["$assets/train.jsonl"]
[train]
batch_size = 4
max_steps = 4
[memory]
compute = "f32"
RECIPE
  train() { # device, name
    "$dpo_lora" train "$folder/recipe.toml" --set run.device="$1" --set run.output="$folder/$2"
  }
  train cpu cpu
  train cuda:0 there
  train cuda:0 again
  cmp "$folder"/{there,again}/adapter/adapter_model.safetensors
  python3 - "$folder"/{cpu,there}/metrics.jsonl <<'PYTHON'
import json, sys
cpu, card = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
assert len(cpu) == len(card) == 4
for ours, theirs in zip(card, cpu):
    for figure in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins"):
        assert abs(ours[figure] - theirs[figure]) <= 1e-4 * max(1, abs(theirs[figure])), (figure, ours, theirs)
print("a run on the card: the CPU's figures, and its own bytes again")
PYTHON
}

library() {
  local dpo_lora lazy case
  eval "$(programs --lib)"
  tests() { # which stream is late, which wait is left out, tests...
    MADE_UP_LAZY=$1 MADE_UP_DEAF=$2 DPO_LORA_REQUIRE_ALL=1 "$dpo_lora" "${@:3}" --test-threads 1
  }
  tests none "" gpu
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
}

case ${1:-} in
  make) make_card "${2:?where the card goes}" ;;
  library | "")
    make_card "$folder/card"
    export LD_LIBRARY_PATH=$folder/card
    "${1:-devices}"
    ;;
  *) sed -n 's/^#   //p' "$0"; exit 2 ;;
esac
