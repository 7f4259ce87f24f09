#!/usr/bin/env bash
# What matters on one GPU: tests of the kernels, then of model, learner and sampler (8 minutes at most), five steps of
# configs/tiny.py, and benchmarks/one_device.py, which compares with transformers and cuDNN. A stage that fails or takes
# too long is named at the end, and the next one runs all the same. Same .venv as local.sh, plus the extra gpu.
# Usage: bash launch/test_gpu.sh [--small] [--minutes=15] [STAGE ...]
#   STAGE: kernels, tests, train, benchmark; default: all of them in this order
#   --minutes: after which the benchmark starts no further case; its report is runs/test_gpu/one_device.json
#   --small: a few tests and small sizes, to try this script; on a machine without a GPU with JAX_PLATFORMS=cpu
# Environment: READY_PYTHON=python3 uses an interpreter that has everything already, and installs nothing.
cd "$(dirname "$0")/.."
source launch/venv.sh

small=() minutes=15 stages=()
for argument in "$@"; do
  case "$argument" in
    --small) small=(--small) ;;
    --minutes=*) minutes=${argument#--minutes=} ;;
    kernels | tests | train | benchmark) stages+=("$argument") ;;
    *)
      sed -n '2,/^cd/{/^#/s/^# \{0,1\}//p}' "$0" >&2
      exit 2
      ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(kernels tests train benchmark)

# The CPU too: programs that only move weights use it.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} PYTHONUNBUFFERED=1
if [ -n "${READY_PYTHON:-}" ]; then
  python=$READY_PYTHON
else
  [ "${JAX_PLATFORMS%%,*}" = cpu ] || install ".[gpu]"
  install ".[test]"
  python=$VENV/bin/python
fi
# jax takes the CPU in silence where its CUDA plugin is not installed.
"$python" -c '
import os, sys, jax
print(f"jax {jax.__version__}:", *jax.devices())
asked = os.environ["JAX_PLATFORMS"].split(",")[0]
if asked != "cpu" and jax.default_backend() == "cpu":
    sys.exit(f"error: jax finds no {asked} device. JAX_PLATFORMS=cpu and --small try this script without one.")
'
out=runs/test_gpu
mkdir -p "$out"
rm -rf "$out/tiny" # else the run would be resumed

processes=$(($(nproc) / 2))
processes=$((processes < 1 ? 1 : processes > 8 ? 8 : processes))
failed=()

stage() { # NAME SECONDS COMMAND ...: unless other stages were asked for
  local name=$1 seconds=$2 status=0
  shift 2
  [[ " ${stages[*]} " == *" $name "* ]] || return 0
  echo "== $name: at most $seconds s"
  local start=$SECONDS
  # INT first: pytest then says what it has so far.
  timeout --signal=INT --kill-after=20 "$seconds" "$@" || status=$?
  case $status in
    0) echo "== $name: passed in $((SECONDS - start)) s" && return ;;
    124 | 137) failed+=("$name (not done after $seconds s)") ;;
    *) failed+=("$name (exit code $status)") ;;
  esac
  echo "== $name: FAILED in $((SECONDS - start)) s"
}

# Several processes share the GPU; a failure is printed when it happens, and why tests are skipped at the end.
pytest=(
  env XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" -m pytest -q -n "$processes" --dist=loadfile --no-loadscope-reorder
  --at_once --tb=short -rs --durations=5
)
files=(
  tests/sampling/test_{engine,keys,draw}.py
  tests/learner/test_{train_step,step_gradient,train_state,logprobs,loss}.py
  tests/model/test_{attention,cache,precision,model,parity,adapter,hf}.py
  tests/run/test_stacked_checkpoints.py
  tests/run/test_checkpoint.py::test_{state_and_record_come_back_bit_for_bit,a_part_is_restored_alone_and_verified}
)
[ ${#small[@]} -eq 0 ] || files=(tests/{sampling/test_draw,learner/test_loss,model/test_attention}.py)
# The same program gives the same bits, as tests ask for: else gradients of lookups are added in any order. Products are
# cuBLAS's: compiled for an H100 without one, XLA (jax 0.10.2) found no tiles for some of the tests' smallest ones in its
# own kernels.
xla_of_tests="${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"

stage kernels 120 "${pytest[@]}" tests/model/test_attention_gpu.py tests/model/test_pages_gpu.py
stage tests 360 env XLA_FLAGS="$xla_of_tests" "${pytest[@]}" "${files[@]}"
stage train 240 "$python" -m spiral_jax.train --config=configs/tiny.py --workdir="$out/tiny" \
  --config.train.steps=5 --config.eval.problems=0
stage benchmark $(((minutes + 5) * 60)) "$python" -m benchmarks.one_device --json="$out/one_device.json" \
  --minutes="$minutes" "${small[@]}"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'error: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "all passed: ${stages[*]}"
