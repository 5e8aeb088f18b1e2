#!/usr/bin/env bash
# The Python programs that we are compared with, in a virtual environment outside the tree, keyed by their versions.
# Prints its folder; makes it first where it is absent (6 GB, minutes).
#
#   python=$(tools/peers.sh)/bin/python
#
# DPO_LORA_CACHE moves it; the default is dpo-lora in the user's cache folder.
set -euo pipefail

torch=2.15.0 transformers=5.23.0 trl=1.16.0 peft=0.21.2
more="xllamacpp==2026.10.11549 bitsandbytes==0.50.2" # the first is llama.cpp in a wheel
cache=${DPO_LORA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dpo-lora}
venv=$cache/peers-torch$torch-transformers$transformers-trl$trl-peft$peft

mkdir -p "$cache"
# two runs at once: the second waits for the first's
exec 9>"$venv.lock"
flock 9
if [ ! -e "$venv/.complete" ]; then
  rm -rf "$venv"
  python3 -m venv "$venv" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "torch==$torch" "transformers==$transformers" "trl==$trl" "peft==$peft" datasets accelerate gguf numpy >&2
  touch "$venv/.complete"
fi
if [ "$(cat "$venv/.more" 2>/dev/null)" != "$more" ]; then
  # shellcheck disable=SC2086 # two words are two packages
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps $more >&2
  echo "$more" >"$venv/.more"
fi
echo "$venv"
