#!/usr/bin/env bash
# All that only a GPU can show, in under 9 minutes and without a network: parity with the CPU, an 8B base in NF4, 1B and 3B in
# bf16, 8B streamed under 3 GiB, growth of memory, the share of the card's matrix peak, TRL beside it. Results: one JSON
# object and a table in --out (gpu-results).
#
#   benches/gpu/bundle.sh BUNDLE       where there is a compiler; needs no GPU
#   benches/gpu.sh --bundle BUNDLE     on the machine with the card; needs python3 and a driver
#   benches/gpu.sh --bundle BUNDLE --device cpu --tiny     a rehearsal anywhere
#
# All options: benches/gpu.sh --help. The bases are made on the spot: 24 GiB of disk, or --work FOLDER that has them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
exec timeout --kill-after=10 535 python3 "$here/gpu/run.py" "$@"
