#!/usr/bin/env bash
# One command for a CUDA machine without a package registry: GPU tests, then the loss benchmarks.
#
#   bench/gpu_session.sh [--dry-run]
#
# SESSION_SECONDS  time for everything (1500); a part that would start later is left out
# PEER_WHEELS      folder with wheels of the projects to compare with; without it they are reported as not installed
# RESULTS_ROOT     where the folder named after the GPU is made (bench/results)
# BENCH_COMMIT     commit to name in the results, where the tree has no history
# HEADS, TOKENS    which heads, and which numbers of tokens besides 8192, to do less than everything
# PYTHON           interpreter (python3)
#
# A part that fails does not stop the next. bench/ops.py writes no speed of an operator that is wrong at that shape.
set -uo pipefail
cd "$(dirname "$0")/.."

dry_run=
[[ "${1:-}" == --dry-run ]] && dry_run=1
python=${PYTHON:-python3}
seconds=${SESSION_SECONDS:-1500}
heads=${HEADS:-"qwen2.5-1.5b qwen2.5-7b qwen2.5-32b"}
tokens=${TOKENS:-"4096 16384 1024 65536"}
export TRITON_INTERPRET=0
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
# Operators with very different buffers share a process; without this their blocks fragment the memory.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
started=$SECONDS

left() { echo $((seconds - (SECONDS - started))); }

# run LIMIT COMMAND...: at most LIMIT seconds and at most what is left; 124 when the time was up.
run() {
  local limit=$1 rest
  shift
  rest=$(left)
  ((rest < limit)) && limit=$rest
  ((limit < 5)) && { echo "no time left for: $*"; return 124; }
  echo "+ [$limit s] $*"
  [[ -n $dry_run ]] && return 0
  timeout --kill-after=10 "$limit" "$@"
}

if [[ -n $dry_run ]]; then
  folder=GPU
else
  folder=$("$python" -c 'import torch; from bench.machine import result_folder; print(result_folder())') || exit 2
  [[ $folder == cpu ]] && { echo "no CUDA device found"; exit 2; }
fi
out=${RESULTS_ROOT:-bench/results}/$folder
[[ -z $dry_run ]] && mkdir -p "$out"
failed=()

echo "== machine"
run 60 "$python" -c 'import json; from bench.machine import describe_machine; print(json.dumps(describe_machine(), indent=1))'

if [[ -n ${PEER_WHEELS:-} ]]; then
  echo "== peers"
  peers=$(mktemp -d)
  # Not where the interpreter keeps its own: a peer must not replace a package that others here use.
  export PYTHONPATH="$PYTHONPATH:$peers"
  for wheel in "$PEER_WHEELS"/*.whl; do
    run 120 "$python" -m pip install -q --no-index --no-deps --find-links "$PEER_WHEELS" --target "$peers" "$wheel" ||
      failed+=("install of ${wheel##*/}")
  done
fi

echo "== tests on the GPU"
export BENCH_TESTS="no tests/gpu"
if [[ -d tests/gpu ]]; then
  # Written through a file and not a pipe, so that the exit status is pytest's own.
  log=${dry_run:+/dev/null}
  log=${log:-$out/tests.txt}
  if run 600 "$python" -m pytest -q tests/gpu >"$log" 2>&1; then
    BENCH_TESTS="tests/gpu passed"
  else
    BENCH_TESTS="tests/gpu failed"
    failed+=("tests/gpu")
  fi
  [[ -z $dry_run ]] && tail -n 15 "$log"
fi
echo "$BENCH_TESTS"

# measure NAME LIMIT OPTIONS...: with the peers; without them once more if one took the process down with it.
measure() {
  local name=$1 limit=$2
  shift 2
  run "$limit" "$python" bench/ops.py --device cuda --out "$out/$name.json" "$@" && return
  failed+=("$name")
  (($(left) < 5)) && return
  run "$limit" "$python" bench/ops.py --device cuda --out "$out/$name-own.json" "$@" --skip peers || failed+=("$name-own")
}

echo "== loss operators, masked tokens and tokens without advantage"
for head in $heads; do
  measure "ops-$head-shares" 400 --shape "$head" --tokens 8192 --active 1 0.7 0.3 --live 1 0.5 0.1 --deadline 300
done

echo "== from logits"
for head in $heads; do
  measure "logits-$head" 200 --shape "$head" --level logits --tokens 8192
done

echo "== loss operators, all tokens active and live"
for count in $tokens; do
  for head in $heads; do
    measure "ops-$head-$count" 300 --shape "$head" --tokens "$count"
  done
done

echo "== $((SECONDS - started)) s, results in $out"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
