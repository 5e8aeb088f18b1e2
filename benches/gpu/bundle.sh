#!/usr/bin/env bash
# Builds what benches/gpu.sh takes to a machine with a GPU, into FOLDER: the program, its tests on devices, the measurements of
# the matrix peak and of a step's parts, CUDA's libraries, fixtures, a tokenizer, and SmolLM2 with the golden figures where
# DPO_LORA_SMOLLM2 and DPO_LORA_GOLDEN name them.
#
#   benches/gpu/bundle.sh FOLDER [FEATURES]      FEATURES: cuda, unless said otherwise; "" for the CPU
#
# CUDA is built with the compiler of the registries (ci/cuda-build.sh), so that the program starts on any machine. WHEELS=1 takes TRL, PEFT,
# bitsandbytes and torch along, for this machine's Python (gigabytes); without them benches/gpu.sh needs them there.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1 features=${2-cuda}
mkdir -p "$out"
out=$(cd "$out" && pwd)

target=${CARGO_TARGET_DIR:-target}
if [ "$features" = cuda ]; then
  target=$target/cuda
  build() { ci/cuda-build.sh "$target" "$@"; }
else
  build() { cargo "$@" ${features:+--features "$features"}; }
fi
build build --release --locked --bin dpo-lora --example matrix-peak
build build --release --locked --features profile --example time-by-part
test=$(build test --release --locked --test devices --no-run --message-format json |
  python3 -c 'import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made["target"]["name"] == "devices": print(made["executable"])')
cp "$target/release/dpo-lora" "$target/release/examples/matrix-peak" "$target/release/examples/time-by-part" "$out/"
cp "$test" "$out/test-devices"

rm -rf "$out/fixtures" "$out/tokenizer"
cp -r tests/fixtures "$out/fixtures"
mkdir "$out/tokenizer"
cp assets/quickstart/base/tokenizer*.json "$out/tokenizer/"
for name in smollm2:${DPO_LORA_SMOLLM2:-} golden:${DPO_LORA_GOLDEN:-}; do
  [ -z "${name#*:}" ] || { rm -rf "${out:?}/${name%%:*}"; cp -rL "${name#*:}" "$out/${name%%:*}"; }
done

packages=()
[ "${WHEELS:-}" != 1 ] || packages+=(torch trl peft bitsandbytes transformers datasets)
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
if [ "$features" = cuda ] || [ ${#packages[@]} -gt 0 ]; then
  python3 -m venv "$made/pip"
fi
if [ ${#packages[@]} -gt 0 ]; then
  "$made/pip/bin/python" -m pip download -q -d "$out/wheels" "${packages[@]}"
fi
if [ "$features" = cuda ]; then
  # what the program looks for when it is asked for a card, but for the driver
  "$made/pip/bin/python" -m pip download -q --no-deps -d "$made/cuda" 'nvidia-cublas==13.0.*' 'nvidia-curand==10.4.0.*'
  for wheel in "$made"/cuda/*.whl; do python3 -m zipfile -e "$wheel" "$made/unpacked"; done
  rm -rf "$out/lib"
  mkdir "$out/lib"
  find "$made/unpacked" \( -name 'libcublas.so.*' -o -name 'libcublasLt.so.*' -o -name 'libcurand.so.*' \) -exec mv {} "$out/lib/" \;
fi
du -sh "$out"/* | sed 's/^/  /'
echo "ready: benches/gpu.sh --bundle $out"
