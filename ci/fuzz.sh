#!/usr/bin/env bash
# Every fuzz target for some seconds, from its good files on: a finding fails, and its file lies in fuzz/artifacts/.
#
#   ci/fuzz.sh [SECONDS]    a target; 10 if not said
#
# It takes cargo-fuzz and a C++ compiler, and no nightly: the targets are compiled with coverage and without a sanitizer,
# since what reads files is safe Rust (Miri watches the `unsafe` rest, ci/miri.sh). Where cargo-fuzz cannot be had, the
# same functions are fed seeded mutations of the same files, without coverage to guide them.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-10}

if ! cargo fuzz --version >/dev/null 2>&1 && ! cargo install --quiet --locked cargo-fuzz || ! command -v c++ >/dev/null; then
  printf '\n!! NOT FUZZED: there is no cargo-fuzz (cargo install cargo-fuzz) or no C++ compiler; mutations by seed instead.\n'
  DPO_LORA_MUTATIONS=20000 DPO_LORA_MUTATION_SEED=1000000 cargo test --release --test mutations
  exit 0
fi

cargo fuzz build --sanitizer none
DPO_LORA_CORPUS=fuzz/corpus cargo test --quiet --test mutations good_files
for target in $(cargo fuzz list); do
  # a thread that broke its bounds waits for good and keeps what it holds: other processes go on where many have
  case $target in
  template | tokenizer | tokenizer_config | gguf) more=(-fork=1 -ignore_ooms=1) ;;
  *) more=() ;;
  esac
  log=$(mktemp)
  # a file may take so long: what a run grants it, on a machine that has other work
  if ! cargo fuzz run --sanitizer none "$target" -- -max_total_time="$seconds" -timeout=120 -max_len=65536 \
    ${more[@]+"${more[@]}"} >"$log" 2>&1; then
    tail -n 40 "$log"
    echo "$target: a finding"
    exit 1
  fi
  printf '%-17s %s executions\n' "$target" "$(grep -o '^#[0-9]*' "$log" | tail -n 1 | tr -d '#')"
  rm -f "$log"
done
