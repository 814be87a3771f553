#!/usr/bin/env bash
# The checks that need a GPU, in under 9 minutes; see benchmarks/gpu_checklist.py.
#
#   bash benchmarks/gpu_checklist.sh                     on a machine with CUDA torch; the graph is in data/FB15k-237
#   DATA=DIR OUT=DIR bash benchmarks/gpu_checklist.sh    another graph folder, another folder for the results
#   bash benchmarks/gpu_checklist.sh --dry_run           the same at toy size on the CPU
#
# data/FB15k-237 is ignored by git: copy it first. A second call continues from the checkpoint of the first.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_checklist.py "$@"
