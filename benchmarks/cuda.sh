#!/usr/bin/env bash
# Tests and timings on a CUDA machine without network, in one command:
#
#     benchmarks/cuda.sh OUT [--minutes 8]               on the card
#     benchmarks/cuda.sh OUT --device cpu --tiny         a try of the same path without one
#
# OUT gets at most eight files. Collect the wheels first, where there is a network:
# python scripts/carry_wheels.py (see --help of both).
set -euo pipefail
export CALLED_FROM=$PWD # relative paths are the caller's
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python3 scripts/run_on_cuda.py "$@"
