#!/usr/bin/env bash
# Type-checks with the oldest Rust that Cargo.toml promises. Without rustup, or without a way to that toolchain, it says NOT
# CHECKED.
set -euo pipefail
cd "$(dirname "$0")/.."
oldest=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
if ! command -v rustup >/dev/null || ! rustup toolchain install "$oldest" --profile minimal >/dev/null 2>&1; then
  echo "NOT CHECKED: Rust $oldest is not to be had here"
  exit 0
fi
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/oldest cargo "+$oldest" check --locked
