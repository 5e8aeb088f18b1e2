#!/usr/bin/env bash
# Builds what benches/gpu.sh takes to a machine with a GPU, into FOLDER: the program, its tests on devices, the measurement of the
# matrix peak, fixtures, a tokenizer, and SmolLM2 with the golden figures where DPO_LORA_SMOLLM2 and DPO_LORA_GOLDEN name them.
#
#   benches/gpu/bundle.sh FOLDER [FEATURES]      FEATURES: cuda, unless said otherwise; "" for the CPU
#
# For CUDA an nvcc must be found (docs/install.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1 features=${2-cuda}
mkdir -p "$out"
flags=(--release --locked)
[ -z "$features" ] || flags+=(--features "$features")
cargo build "${flags[@]}" --bin dpo-lora --example matrix-peak
target=${CARGO_TARGET_DIR:-target}/release
cp "$target/dpo-lora" "$out/"
cp "$target/examples/matrix-peak" "$out/"
test=$(cargo test "${flags[@]}" --test devices --no-run --message-format json |
  python3 -c 'import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made["target"]["name"] == "devices": print(made["executable"])')
cp "$test" "$out/test-devices"
rm -rf "$out/fixtures" "$out/tokenizer"
cp -r tests/fixtures "$out/fixtures"
mkdir "$out/tokenizer"
cp assets/quickstart/base/tokenizer*.json "$out/tokenizer/"
for name in smollm2:${DPO_LORA_SMOLLM2:-} golden:${DPO_LORA_GOLDEN:-}; do
  [ -z "${name#*:}" ] || { rm -rf "${out:?}/${name%%:*}"; cp -rL "${name#*:}" "$out/${name%%:*}"; }
done
echo "ready: benches/gpu.sh --bundle $out"
