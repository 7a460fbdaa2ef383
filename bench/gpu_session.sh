#!/usr/bin/env bash
# One command for a CUDA machine without a package registry: what must be right first, then how fast it is.
#
#   bench/gpu_session.sh [--dry-run] [PART...]
#
# Parts, all of them in this order if none is named; each takes less than ten minutes, those of heads that for each head:
#   tests            tests/gpu but the next two
#   colocated-tests  vLLM and trainer on one GPU: cycles of sleep and sync at real size
#   run-tests        short whole runs with vLLM
#   colocated        speed and memory of vLLM and trainer on one GPU, by phase
#   calibrate        the rates that memory plans divide by
#   shares           the loss from hidden states at each head, over shares of masked tokens and of tokens without advantage
#   tokens           the same over numbers of tokens
#   logprob, logits  log-probs from hidden states, and losses from logits, at each head
#   packed           losses from log-probs, covariance, and the operators on packed batches
#   step             whole training steps beside TRL's
#   trainer-only     updates on frozen rollouts beside TRL's
#   rollout, sync    engines, and what new weights cost them
#   study            GRPO and GiGPO with and without SPEAR on generated ALFWorld, with a model of 100 M parameters
#
# SESSION_SECONDS  time for everything (1500); a part that would start later is left out
# ENGINE_WHEELS    folder with the wheels of bench/gpu_requirements.txt, where vLLM is not installed
# COLOCATED_RUNS   which runs of `colocated` (sleep2 sleep1 process)
# COLOCATED_SET    settings for `colocated`, e.g. "engine.enforce_eager=true"
# PEER_WHEELS      folder with wheels of the projects to compare with; without it they are reported as not installed
# RESULTS_ROOT     where the folder named after the GPU is made (bench/results)
# BENCH_COMMIT     commit to name in the results, where the tree has no history
# HEADS            which heads, to do less than all of them
# STUDY_WORK, STUDY_SEEDS, STUDY_ENV_STEPS  folder of the runs, to go on with them; seeds (0); steps of each run (100000)
# WORKLOADS        which workloads of `step` (long-tail tools game)
# PYTHON           interpreter (python3)
#
# A part that fails does not stop the next. bench/kernels.py writes no speed of an operator that is wrong at that shape.
set -uo pipefail
cd "$(dirname "$0")/.."

dry_run=
[[ "${1:-}" == --dry-run ]] && { dry_run=1; shift; }
known=(tests colocated-tests run-tests colocated calibrate shares tokens logprob logits packed step
  trainer-only rollout sync study)
parts=" ${*:-${known[*]}} "
for part in $parts; do
  [[ " ${known[*]} " == *" $part "* ]] || { echo "no part $part; choose from ${known[*]}"; exit 2; }
done
python=${PYTHON:-python3}
seconds=${SESSION_SECONDS:-1500}
heads=${HEADS:-"qwen2.5-1.5b qwen2.5-7b qwen2.5-32b"}
export TRITON_INTERPRET=0
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
started=$SECONDS

# Nothing here has a registry to ask, or other nodes to talk to.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_HOST_IP=127.0.0.1

wanted() { [[ "$parts" == *" $1 "* ]]; }

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
  folder=$("$python" -c 'import torch; from bench.common.machine import result_folder; print(result_folder())') || exit 2
  [[ $folder == cpu ]] && { echo "no CUDA device found"; exit 2; }
fi
out=${RESULTS_ROOT:-bench/results}/$folder
[[ -z $dry_run ]] && mkdir -p "$out"
failed=()

echo "== machine"
run 60 "$python" -c 'import json; from bench.common.machine import describe_machine; print(json.dumps(describe_machine(), indent=1))'

# Not where the interpreter keeps its own: what is brought along must not replace a package that others here use.
brought=$(mktemp -d)
export PYTHONPATH="$PYTHONPATH:$brought"
install() { run 300 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$brought" "$@"; }

if [[ -n ${ENGINE_WHEELS:-} ]]; then
  echo "== engine"
  install "$ENGINE_WHEELS"/*.whl || failed+=("install of the engine")
fi
if [[ -n ${PEER_WHEELS:-} ]]; then
  echo "== peers"
  for wheel in "$PEER_WHEELS"/*.whl; do
    install "$wheel" || failed+=("install of ${wheel##*/}")
  done
fi

# check NAME OPTIONS...: pytest, its output in NAME.txt; BENCH_TESTS says how it ended.
check() {
  local name=$1 log
  shift
  # Written through a file and not a pipe, so that the exit status is pytest's own.
  log=${dry_run:+/dev/null}
  log=${log:-$out/$name.txt}
  echo "+ pytest $*"
  if run 590 "$python" -m pytest -q --durations=0 "$@" >"$log" 2>&1; then
    BENCH_TESTS="$name passed"
  else
    BENCH_TESTS="$name failed"
    failed+=("$name")
  fi
  [[ -z $dry_run ]] && tail -n 15 "$log"
  echo "$BENCH_TESTS"
}

export BENCH_TESTS="not in this session"

if wanted tests; then
  echo "== tests on the GPU"
  check tests tests/gpu --ignore tests/gpu/test_colocated.py
fi
operators_tested=$BENCH_TESTS

colocated_ok=1
if wanted colocated-tests; then
  echo "== engine and trainer on one GPU"
  check colocated-tests tests/gpu/test_colocated.py -k cycles
  [[ $BENCH_TESTS == *passed ]] || colocated_ok=
fi
if wanted run-tests; then
  echo "== whole runs"
  check run-tests tests/gpu/test_colocated.py -k quickstart
fi

# colocated NAME OPTIONS...: bench/colocated.py writes no speed if its own cycles are wrong.
colocated() {
  local name=$1
  shift
  # shellcheck disable=SC2086  # several settings are several words
  run 280 "$python" bench/colocated.py --device cuda --out "$out/colocated-$name.json" "$@" ${COLOCATED_SET:-} ||
    failed+=("colocated-$name")
}

if wanted colocated; then
  echo "== speed of engine and trainer on one GPU"
  if [[ -n $colocated_ok ]]; then
    for name in ${COLOCATED_RUNS:-sleep2 sleep1 process}; do
      case $name in
        process) colocated process --mode sleep2 --set engine.placement=process ;;
        *) colocated "$name" --mode "$name" --set engine.placement=inproc ;;
      esac
    done
  else
    echo "left out: its tests failed"
  fi
fi

if wanted calibrate; then
  echo "== rates of this device"
  run 200 "$python" bench/calibrate.py --device cuda --out "$out/coefficients.json" || failed+=("calibrate")
fi

export BENCH_TESTS=$operators_tested
# Operators with very different buffers share a process; without this their blocks fragment the memory.
operators() { run "$1" env PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "$python" bench/kernels.py --device cuda "${@:2}"; }

# measure NAME LIMIT OPTIONS...: with the peers; without them once more if one took the process down with it. No case
# starts in the last fifth of the limit.
measure() {
  local name=$1 limit=$2 status
  shift 2
  set -- "$@" --out "$out/$name.json" --deadline $((limit * 4 / 5))
  operators "$limit" "$@"
  status=$?
  ((status == 0)) && return
  failed+=("$name")
  # Only a process that was taken down is worth another try.
  ((status < 124)) && return
  (($(left) < 5)) && return
  operators "$limit" "$@" --out "$out/$name-own.json" --skip peers || failed+=("$name-own")
}

# at_heads SUITE LIMIT: a suite of bench/layers/suites.py, head by head.
at_heads() {
  for head in $heads; do
    measure "kernels-$1-$head" "$2" --suite "cuda-$1" --shape "$head"
  done
}

if wanted shares; then
  echo "== the loss from hidden states, masked tokens and tokens without advantage"
  at_heads shares 400
fi

if wanted tokens; then
  echo "== the loss from hidden states, all tokens active and live"
  at_heads tokens 590
fi

if wanted logprob; then
  echo "== log-probs from hidden states"
  at_heads logprob 300
fi

if wanted logits; then
  echo "== losses from logits"
  at_heads logits 200
fi

if wanted packed; then
  echo "== losses from log-probs, covariance and packed batches"
  measure kernels-packed 400 --suite cuda-packed
fi

# alone NAME LIMIT SCRIPT OPTIONS...: a benchmark that refuses its own wrong rows and writes what it has by and by.
alone() {
  local name=$1 limit=$2
  shift 2
  run "$limit" "$python" "$@" --device cuda --out "$out/$name.json" || failed+=("$name")
}

if wanted step; then
  echo "== whole steps beside TRL"
  for workload in ${WORKLOADS:-long-tail tools game}; do
    alone "step-$workload" 590 bench/step.py --size qwen2.5-1.5b --workload "$workload" --apart --steps 2 --micro-batch 8 32
  done
fi

if wanted trainer-only; then
  echo "== updates on frozen rollouts beside TRL"
  # Every loss is compared on the small model, where that takes seconds.
  alone trainer_only-gate 300 bench/trainer_only.py --size cpu --all-losses
  alone trainer_only 590 bench/trainer_only.py --size qwen2.5-1.5b --dtype bfloat16 --no-gate
fi

if wanted rollout; then
  echo "== rollout engines"
  alone rollout 590 bench/rollout.py --suite cuda
fi

if wanted sync; then
  echo "== weight sync"
  alone sync 400 bench/sync.py --suite cuda
fi

if wanted study; then
  echo "== GRPO and GiGPO with and without SPEAR on generated ALFWorld, a model of 100 M parameters"
  # A later call with the same STUDY_WORK goes on where this one was cut off.
  run 590 "$python" bench/study.py configs/study/alfworld-gpu.yaml --arms pairs --seeds ${STUDY_SEEDS:-0} --jobs 1 \
    --env-steps "${STUDY_ENV_STEPS:-100000}" --work "${STUDY_WORK:-$out/study}" --out "$out/study_alfworld.json" \
    || failed+=("study")
fi

echo "== $((SECONDS - started)) s, results in $out"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
