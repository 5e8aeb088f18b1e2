#!/usr/bin/env bash
# What docs/performance.md and docs/memory.md say of a CPU, in one go: timings first, then memory. It takes hours of two
# cores with nothing beside it, tens of gigabytes of disk for the bases and 12 GiB of memory for TRL; the cap on the 8B
# runs wants root. It has not been run whole yet.
#
#   DPO_LORA_HH=ROWS.jsonl benches/all.sh OUT           everything
#   DPO_LORA_HH=ROWS.jsonl benches/all.sh OUT STEP...   some of it: `grep '^step' benches/all.sh` names the steps
#
# What a step prints goes to OUT/STEP.txt. OUT/bases holds the bases, which stay for the next time. A step that fails does
# not stop the others; the last lines say how long each took and which failed.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:?where the results go}"
out=$(cd "$1" && pwd)
shift
asked=" $* "
[ -e "${DPO_LORA_HH:?names no rows; tools/hh_rows.py makes them}" ]
DPO_LORA_SMOLLM2=${DPO_LORA_SMOLLM2:-$(tools/smollm2.sh)/hf}
DPO_LORA_PEERS_PYTHON=${DPO_LORA_PEERS_PYTHON:-$(tools/peers.sh)/bin/python}
export DPO_LORA_HH DPO_LORA_SMOLLM2 DPO_LORA_PEERS_PYTHON

target=${CARGO_TARGET_DIR:-target}
cargo build --release --locked --bin dpo-lora --example bases
# the profile's build puts a program of its own in the place of this one
mkdir -p "$out/release/examples" "$out/bases" "$out/hh"
cp "$target/release/dpo-lora" "$out/release/"
cp "$target/release/examples/bases" "$out/release/examples/"
export DPO_LORA_BINARY=$out/release/dpo-lora
cargo build --release --locked --features profile --bench profile
cargo build --release --locked --bench kernels
{ date -u; git rev-parse HEAD; lscpu | grep -E 'Model name|^CPU\(s\)'; grep -m 1 -oE 'amx_bf16|avx512_bf16|avx2' /proc/cpuinfo; } > "$out/machine.txt" || true

failed=()
took=()
step() { # name, command…
  local name=$1 began=$SECONDS
  shift
  [ "$asked" = "  " ] || [[ $asked == *" $name "* ]] || return 0
  printf '== %s\n' "$name"
  "$@" > "$out/$name.txt" 2>&1 || failed+=("$name")
  took+=("$(printf '%-12s %5d s' "$name" $((SECONDS - began)))")
}

# A step is part of a condition, where `set -e` is off: what follows says itself where it ends.

times() { # how often, command…
  local n=$1
  shift
  for _ in $(seq "$n"); do "$@" || return; done
}

profile() { cargo bench --locked --bench profile --features profile -- "$@"; }

# one pass over 511 pairs in each arithmetic: what bf16 changes
effect() {
  head -n 512 "$DPO_LORA_HH" > "$out/hh/train.jsonl"
  tail -n 200 "$DPO_LORA_HH" > "$out/hh/held-out.jsonl"
  local compute
  for compute in f32 bf16; do
    "$DPO_LORA_BINARY" train recipes/hh.toml --set "run.output=\"$out/hh/$compute\"" \
      --set "model.base=\"$DPO_LORA_SMOLLM2\"" --set "data.train=[\"$out/hh/train.jsonl\"]" \
      --set "data.eval=[\"$out/hh/held-out.jsonl\"]" --set data.format=text --set train.batch_size=8 \
      --set train.learning_rate=1e-4 --set train.warmup_steps=6 --set memory.compute=$compute --set run.device=cpu || return
  done
}

base() { # name, shape, format
  local at=$out/bases/$1
  [ "$3" = bf16 ] || base "$2" "$2" bf16 || return
  [ -e "$at" ] || case $3 in
    bf16) "$out/release/examples/bases" "$2" "$at" --tokenizer "$DPO_LORA_SMOLLM2" ;;
    *) "$DPO_LORA_BINARY" quantize "$out/bases/$2" --to "$3" "$at" ;;
  esac
}

streamed() {
  base llama-3.2-1b-q8_0.gguf llama-3.2-1b q8_0 &&
    benches/streamed.py "$out/bases/llama-3.2-1b-q8_0.gguf" &&
    benches/streamed.py "$out/bases/llama-3.2-1b" --tokens 256
}

# a pair of 1,016 tokens on a base of 15 GiB, in 2 GiB of its own and 3 with the base's pages
capped() { # base
  python3 -c 'import json; print(json.dumps({"prompt": " time year" * 254, "chosen": " people way" * 127,
      "rejected": " day man" * 127}))' > "$out/pair.jsonl"
  printf '[model]\nbase = "%s"\n[adapter]\nr = 8\n[data]\ntrain = ["pair.jsonl"]\nformat = "text"\nchat_template = "none"\n' \
    "$out/bases/$1" > "$out/8b.toml"
  printf 'max_length = 1024\n[train]\nbatch_size = 1\n[run]\ndevice = "cpu"\noutput = "8b"\n' >> "$out/8b.toml"
  benches/memory_over_time.py --binary "$DPO_LORA_BINARY" --cgroup 3GiB --cap 2GiB --svg "$out/$1.svg" -- \
    train "$out/8b.toml" --max-steps 1 --set memory.budget=1800MiB --set memory.compute=bf16
}

eight() { # format
  local name=llama-3.1-8b
  [ "$1" = bf16 ] || name=$name-$1.gguf
  base "$name" llama-3.1-8b "$1" && capped "$name"
}

step f32 times 6 profile f32 2
step bf16 times 2 profile bf16 2
step f32-16 times 2 profile f32 16
step trl-2 benches/compare.py --budget 290MiB --plan --rounds 2 --json "$out/trl-2.json"
step trl-16 benches/compare.py --budget 290MiB --batch 16 --steps 3 --without-within --json "$out/trl-16.json"
step lengths benches/lengths.py "$out/lengths"
step kernels cargo bench --locked --bench kernels -- --quick
step effect effect
step memory benches/memory.py --bases "$out/bases" --tokenizer "$DPO_LORA_SMOLLM2" --target "$out" --large
step streamed streamed
step 8b-bf16 eight bf16
step 8b-q8_0 eight q8_0

cat "$out/machine.txt"
printf '%s\n' "${took[@]}"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[*]}"; exit 1; }
