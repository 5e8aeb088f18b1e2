#!/usr/bin/env bash
# The `unsafe` code under Miri, which watches every access for undefined behaviour. `docs/security.md` says which of it
# Miri can run.
#
# Under the default rules (stacked borrows). Nothing here enters rayon's pool: its queues (crossbeam-epoch) break those
# rules themselves. Tests that need two threads start their own.
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
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/miri

tests=(
  heap:: confined::tests kernels::words::tests kernels::host::tests kernels::micro::tests kernels::loose::tests
  gemm::tests::columns_of_one_matrix attention::tests::heads_side_by_side matrix::tests::a_product_fills
)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-permissive-provenance" miri test --lib -- "${tests[@]}" |
  tee "$log"
for name in "${tests[@]}"; do
  grep -q "^test .*$name" "$log" || { echo "no test $name ran"; exit 1; }
done
