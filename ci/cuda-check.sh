#!/usr/bin/env bash
# Type-checks the CUDA build, all targets of it, on a machine without CUDA.
set -euo pipefail
exec "$(dirname "$0")/cuda-stand-in.sh" check --locked --all-targets
