#!/usr/bin/env bash
# The `unsafe` code under Miri, which watches every access for undefined behaviour. `docs/security.md` says which of it
# Miri can run.
#
# Two passes. What does not enter rayon's pool runs under the default rules (stacked borrows). The pool's queues
# (crossbeam-epoch) break those rules themselves, so what goes through it runs under tree borrows.
#
# Miri comes with a nightly toolchain; DPO_LORA_MIRI_TOOLCHAIN names another than `nightly`. Where it is missing and
# cannot be had, the stage passes with a loud line, since nothing of the build needs it.
set -euo pipefail
cd "$(dirname "$0")/.."
toolchain=${DPO_LORA_MIRI_TOOLCHAIN:-nightly}

miri() { cargo "+$toolchain" miri "$@"; }

if ! miri --version >/dev/null 2>&1; then
  # rust-src: Miri builds the standard library for itself
  if ! { rustup toolchain install "$toolchain" --profile minimal --component miri --component rust-src; }; then
    printf '\n!! NOT CHECKED: no Miri in toolchain %s, and rustup cannot fetch it.\n' "$toolchain"
    printf '!! By hand: rustup toolchain install nightly --component miri,rust-src && ci/miri.sh\n'
    exit 0
  fi
fi
miri setup >/dev/null 2>&1 || { printf '\n!! NOT CHECKED: Miri cannot build its standard library (rust-src?).\n'; exit 0; }

# a confined thread that broke its bounds waits for ever, so threads and their memory are left behind on purpose
flags="-Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-permissive-provenance"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/miri

run() { # rules, then tests by name: each must be there
  local rules=$1 log
  shift
  printf -- '-- %s: %s\n' "${rules:-stacked borrows}" "$*"
  log=$(mktemp)
  MIRIFLAGS="$flags $rules" miri test --lib -- "$@" | tee "$log"
  local name
  for name in "$@"; do
    grep -q "^test .*$name.* ok$" "$log" || { echo "no test $name ran"; rm -f "$log"; return 1; }
  done
  rm -f "$log"
}

run "" \
  heap::tests confined::tests kernels::words::tests kernels::host::tests \
  kernels::micro::tests gemm::tests::columns_of_one_matrix \
  attention::tests::heads_side_by_side matrix::tests::a_product_fills
run "-Zmiri-tree-borrows" \
  gemm::tests::transposed attention::tests::a_few_heads_through_the_pool
