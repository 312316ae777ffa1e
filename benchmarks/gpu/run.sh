#!/usr/bin/env bash
# Everything worth knowing about a GPU, in at most 8 minutes, on a machine that has torch, transformers and lightning.
#
#     bash benchmarks/gpu/run.sh wheels results
#
# Each part has a time limit of its own, and writes into the folder of results as it goes: a run that is cut off still
# tells. Wheels come from collect.sh.
set -uo pipefail
cd "$(dirname "$0")/../.."
wheels=${1:-wheels} results=${2:-results} site=$(mktemp -d)
mkdir -p "$results"
python3 -m pip install --quiet --no-deps --no-index --target "$site" "$wheels"/*.whl
export PYTHONPATH="$site:$PWD:$PWD/tests" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

part() { # name, seconds, command
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" >"$results/$name.txt" 2>&1
  echo "status $?" >>"$results/$name.txt"
  grep -vE "Writing model|Loading weights|Warning|warn" "$results/$name.txt" | tail -n 20 | cut -c 1-300
}

part tests 90 python3 -m pytest -q -m gpu -n 8 -p no:cacheprovider tests/end_to_end/test_gpu.py
part time 180 python3 -m benchmarks.gpu.measure --only time --trl-batches 64 --json "$results/time.json"
part decode 60 python3 -m benchmarks.gpu.measure --only decode --json "$results/decode.json"
part trace 60 python3 -m benchmarks.gpu.measure --only trace --models smollm2 --json "$results/trace.json"
part memory 60 python3 -m benchmarks.gpu.measure --only memory --json "$results/memory.json"
