#!/usr/bin/env bash
# Checks on Linux that Metal's shaders keep the kinds of memory apart (device, constant, threadgroup, thread), which Apple's
# compiler demands and g++ cannot see: clang, from which that compiler comes, has the attribute.
set -euo pipefail
cd "$(dirname "$0")/.."

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

if ! command -v clang++ >/dev/null; then
  as_root apt-get update -qq
  as_root apt-get install -y -qq --no-install-recommends clang
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for source in $(grep -o '[a-z_]*\.metal"' src/kernels/metal/mod.rs | tr -d '"'); do
  cat "src/kernels/metal/$source"
done >"$folder/shaders.cpp"
find src/kernels -path '*/host/*' -type f -exec cp {} "$folder" \;

check() {
  clang++ -std=c++14 -fsyntax-only -DADDRESS_SPACES -Wall -Wextra -Werror -Wno-unknown-attributes -Wno-ignored-attributes \
    -Wno-unknown-pragmas -Wno-unused-parameter -Wno-unused-function -I "$folder" "$1"
}

check "$folder/shaders.cpp"
# and sees what it is there for
cp "$folder/shaders.cpp" "$folder/bad.cpp"
echo 'float bad(device float* x) { threadgroup float* y = x; return *y; }' >>"$folder/bad.cpp"
if check "$folder/bad.cpp" 2>/dev/null; then
  echo "clang takes a pointer into device memory for one into a threadgroup's"
  exit 1
fi
echo "the shaders keep the kinds of memory apart"
