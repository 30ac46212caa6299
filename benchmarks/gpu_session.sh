#!/usr/bin/env bash
# The first thing to run on a machine with a GPU: tests, ranks, kernels, memory, the whole trainer; at most 12 minutes.
#
#   benchmarks/gpu_session.sh [FOLDER]
#
# Needs torch with CUDA and no network. Packages that are missing are installed from the wheels in the folder `wheels`
# of the checkout, if there is one. Writes each part's output and JSON into FOLDER (by default gpu-session) and ends
# with a table. Nothing that fails stops what comes after it. With PEER, a Python that has eai-sparsify, also the steps
# and the memory beside sparsify's.
set -uo pipefail
cd "$(dirname "$0")/.."
FOLDER=$(realpath -m "${1:-gpu-session}")
mkdir -p "$FOLDER"
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
if [ -d wheels ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps wheels/*.whl || echo "some wheels could not be installed" >&2
fi

ROWS=()
part() { # NAME MINUTES COMMAND...: runs it with a limit; its last line goes into the table
  local name=$1 minutes=$2 began code
  shift 2
  began=$SECONDS
  timeout --kill-after=10 "${minutes}m" "$@" > "$FOLDER/$name.txt" 2>&1
  code=$?
  ROWS+=("$(printf '%-16s %4s %5ss  %s' "$name" "$code" "$((SECONDS - began))" \
    "$(grep -v '^ *$' "$FOLDER/$name.txt" | tail -n 1 | cut -c1-90)")")
  echo "${ROWS[-1]}"
}

part machine 1 "$PYTHON" -m saekit doctor
part tests 2 "$PYTHON" -m pytest -q -p no:cacheprovider -m "gpu or not slow" tests/sae tests/activations
part ranks 4 "$PYTHON" benchmarks/gpu_ranks.py --out "$FOLDER/ranks.json"
part kernels 2 "$PYTHON" benchmarks/kernels.py --gpu --profile --out "$FOLDER/kernels_gpu.json"
part auto 1 "$PYTHON" benchmarks/kernels.py --gpu --auto
part train-1024 1 "$PYTHON" benchmarks/gpu_train.py --width 1024 --layers 8 --out "$FOLDER/train_1024.json"
part train-2304 1 "$PYTHON" benchmarks/gpu_train.py --width 2304 --layers 4 --out "$FOLDER/train_2304.json"
if [ -n "${PEER:-}" ]; then # a Python that has eai-sparsify
  part step 1 "$PYTHON" benchmarks/step.py --gpu --repeats 2 --peer "$PEER" --out "$FOLDER/step_gpu.json"
  part memory 1 "$PYTHON" benchmarks/memory.py --gpu --repeats 1 --peer "$PEER" --out "$FOLDER/memory_gpu.json"
fi

printf '\n%-16s %4s %6s  %s\n' part code time "last line"
printf '%s\n' "${ROWS[@]}"
