#!/usr/bin/env bash
# Dependencies held against deny.toml: licences, banned crates, sources, and known holes (advisories) where the database
# of RustSec can be fetched. Where it cannot, that is said and nothing else: the rest needs no network.
#
# cargo-deny is built once into $DPO_LORA_CACHE (about two minutes on one core) unless it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.20.2
if ! command -v cargo-deny >/dev/null; then
  tools=${DPO_LORA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dpo-lora}/cargo-deny-$version
  [ -x "$tools/bin/cargo-deny" ] || cargo install cargo-deny --version "$version" --locked --debug --root "$tools"
  PATH=$tools/bin:$PATH
fi

cargo deny --log-level error check licenses bans sources
if timeout 120 cargo deny fetch db 2>/dev/null; then
  cargo deny --log-level error check --disable-fetch advisories
else
  echo "advisories: NOT CHECKED, the database (https://github.com/RustSec/advisory-db) cannot be reached from here"
fi
