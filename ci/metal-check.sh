#!/usr/bin/env bash
# Type-checks the Metal build on Linux: Debian's rustc-web with its library source knows Apple's target. Unpacked into the
# cache, not installed, since it conflicts with rustup's. Shaders and linking are not checked.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."
cache=${DPO_LORA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dpo-lora}
toolchain=$cache/rustc-for-apple

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

mkdir -p "$cache"
exec 9>"$toolchain.lock"
flock 9
if [ ! -e "$toolchain/.complete" ]; then
  rm -rf "$toolchain"
  mkdir -p "$toolchain/packages"
  as_root apt-get update -qq
  std=$(apt-cache pkgnames libstd-rust-web-1 | sort -V | tail -1)
  llvm=$(apt-cache depends rustc-web "$std" | grep -o 'libllvm[0-9]*' | sort -V | tail -1)
  (cd "$toolchain/packages" && apt-get download -q rustc-web rust-web-src "$std" libstd-rust-web-dev "$llvm")
  for package in "$toolchain"/packages/*.deb; do dpkg -x "$package" "$toolchain"; done
  rm -rf "$toolchain/packages"
  touch "$toolchain/.complete"
fi
flock -u 9

cargo=$(rustup which cargo 2>/dev/null || command -v cargo)
export LD_LIBRARY_PATH=$toolchain/usr/lib/x86_64-linux-gnu RUSTC=$toolchain/usr/bin/rustc RUSTC_BOOTSTRAP=1
export CC_aarch64_apple_darwin=$here/fake_cc AR_aarch64_apple_darwin=$here/fake_cc
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/metal-check
exec "$cargo" check --locked --features metal --target aarch64-apple-darwin -Zbuild-std=std,panic_abort
