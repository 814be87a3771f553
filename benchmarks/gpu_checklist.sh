#!/usr/bin/env bash
# What a GPU is asked when one is at hand, in under 9 minutes; see benchmarks/gpu_checklist.py for what it does.
#
#   bash benchmarks/gpu_checklist.sh                     on a machine with CUDA torch; the graph is in data/FB15k-237
#   DATA=DIR OUT=DIR bash benchmarks/gpu_checklist.sh    another graph folder, another folder for the results
#   bash benchmarks/gpu_checklist.sh --dry_run           the same path at toy size on the CPU
#
# data/FB15k-237 is ignored by git: copy it along before. A second call goes on from the first one's checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_checklist.py "$@"
