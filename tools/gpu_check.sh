#!/usr/bin/env bash
# All that needs a GPU, in one command, within 10 minutes and without the network; the results go to
# benchmarks/results/<gpu>.json.
#
#   tools/gpu_check.sh          needs torch >= 2.11 built for CUDA, nvcc, g++ and an NVIDIA GPU
#   tools/gpu_check.sh --dry    needs no GPU: the same steps as far as they go without, to try this script
#
# The steps, in the order in which their answers are wanted (STEPS="build small" picks some):
#   machine     what there is, and what is missing
#   build       in place, for the GPUs of this machine; a build that was brought along (aevb/_C*.so) needs none
#   small       every kernel: the CPU's bits; beside it, the benchmarks' compilers fill their caches
#   benchmarks  python -m benchmarks.gpu
#   commands    from a command to a trained model; needs MNIST in $MNIST
#   tests       those that are marked `cuda`, in several processes where pytest-xdist is
#   large       tensors of more than 2^31 elements
#   memcheck, racecheck  compute-sanitizer, where it is installed
#
# A step that fails or takes too long is noted, the others go on, and the exit status is 1 at the end. PYTHON chooses
# the interpreter (python3), AEVB_GPU_CHECK_SECONDS the time for all (560). The log, and the results again, are left in
# $OUT, by default build/gpu_check.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

dry=
case "${1-}" in
  "") ;;
  --dry) dry=1 ;;
  *) echo "usage: tools/gpu_check.sh [--dry]" >&2 && exit 2 ;;
esac
steps=${STEPS:-machine build small benchmarks commands tests large memcheck racecheck}
python=${PYTHON:-python3}
total=${AEVB_GPU_CHECK_SECONDS:-560}
out=${OUT:-build/gpu_check}
rm -rf "$out/results"
mkdir -p "$out/results" || exit
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# The compilers' caches, which `small` fills; JAX takes no more of the GPU's memory than it needs.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/build/jax} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# What has a test for a GPU. Not `tests`: others' imports may be missing on a machine that is bare but for torch.
tests=(tests/ops/test_cuda.py tests/training/test_cuda_training.py)
for name in ops/{accuracy,binarize,gpu_layers,linear,noise,shapes} losses/estimators training/{optimizers,steps}; do
  tests+=("tests/${name%/*}/test_${name#*/}.py")
done

summary=()
failures=0

note() { # NAME RESULT: a line of the summary
  summary+=("$(printf '%-12s %s' "$1" "$2")")
  echo "-- $1: $2"
}

left() { echo $((total - SECONDS)); }

# step NAME SECONDS COMMAND...: runs the command for so long at the most, if the step is wanted.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  [[ " $steps " == *" $name "* ]] || return
  if ((limit > $(left))); then limit=$(left); fi
  if ((limit < 5)); then
    note "$name" "FAILED: no time was left for it"
    failures=$((failures + 1))
    return
  fi
  printf '\n== %s (at most %d s)\n' "$name" "$limit"
  timeout -s INT -k 15 "$limit" "$@"
  status=$?
  case $status in
    0) note "$name" "ok, $((SECONDS - start)) s" && return ;;
    124 | 137) note "$name" "FAILED: stopped after $((SECONDS - start)) s" ;;
    *) note "$name" "FAILED with exit status $status after $((SECONDS - start)) s" ;;
  esac
  failures=$((failures + 1))
}

# What there is, and what is missing; the GPUs' architectures go to the file that is the argument.
machine='
import importlib.metadata, importlib.util, os, shutil, sys, sysconfig
has = importlib.util.find_spec
missing = [m for m in ("numpy", "safetensors", "tqdm", "matplotlib", "pytest", "scipy", "setuptools") if not has(m)]
if has("setuptools"):
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < 77:
        missing.append(f"setuptools 77 or later (it is {version})")
compilers = {name: os.environ.get(name, command) for name, command in (("CC", "cc"), ("CXX", "c++"))}
missing += [f"{c} on PATH" for c in ("nvcc", *(c.split()[0] for c in compilers.values())) if not shutil.which(c)]
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    missing.append("Python.h")
print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPUs, {compilers}; Python itself:", sysconfig.get_config_var("CC"))
for name in ("torch", "numpy", "setuptools", "jax", "triton", "pytest-xdist"):
    try:
        print(f"{name} {importlib.metadata.version(name)}", end="  ")
    except importlib.metadata.PackageNotFoundError:
        print(f"no {name}", end="  ")
print()
archs = []
if has("torch"):
    import torch
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        archs.append(f"{major}{minor}")
        print(f"GPU {i}: {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}, CUDA {torch.version.cuda}")
    if not archs:
        missing.append("a GPU that torch sees")
else:
    missing.append("torch")
print("Missing, and needed: " + ", ".join(missing) + "." if missing else "Nothing that is needed is missing.")
if not has("ninja"):
    print("Without ninja the build takes longer.")
with open(sys.argv[1], "w") as file:
    file.write(";".join(sorted(set(archs), key=int)))
sys.exit(bool(missing) and sys.argv[2] != "dry")
'

sanitizer() { # where compute-sanitizer is, if anywhere
  command -v compute-sanitizer && return
  local nvcc
  nvcc=$(command -v nvcc) && nvcc=$(dirname "$(readlink -f "$nvcc")")
  local place
  for place in "${nvcc:-/none}" "${CUDA_HOME:-/usr/local/cuda}/bin"; do
    if [ -x "$place/compute-sanitizer" ]; then echo "$place/compute-sanitizer" && return; fi
  done
}

sanitize() { # TOOL
  local tool=$1 program
  program=$(sanitizer)
  if [ -n "$dry" ]; then
    step "$tool" 60 "$python" tests/cuda_small_case.py --device cpu --every 40
  elif [ -z "$program" ]; then
    note "$tool" "skipped: compute-sanitizer is not installed"
  else
    # Without PyTorch's cache every tensor is an allocation of its own, whose ends memcheck watches.
    step "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 \
      --report-api-errors no --print-limit 20 "$python" tests/cuda_small_case.py --every 40
  fi
}

# pytest's processes: two CPUs each, for the twins of what runs on the GPU.
parallel() {
  local processes=$(($(nproc) / 2))
  if ((processes > 1)) && "$python" -c 'import xdist' 2>/dev/null; then echo "-n $processes"; fi
}

check() {
  step machine 60 "$python" -c "$machine" "$out/architectures" "${dry:+dry}"
  local archs
  archs=$(cat "$out/architectures" 2>/dev/null) && rm -f "$out/architectures"
  if [ -n "$dry" ]; then dry_run; else on_a_gpu; fi
  printf '\n== Summary, after %d s\n' "$SECONDS"
  printf '%s\n' "${summary[@]}"
  if ((failures)); then echo "$failures of the steps FAILED" && return 1; fi
}

dry_run() {
  # As on a machine that is bare but for torch.
  mkdir -p "$out/bare"
  echo 'import sys; sys.modules.update(dict.fromkeys(("tyro", "pooch", "lightning")))' >"$out/bare/sitecustomize.py"
  PYTHONPATH="$out/bare:$PYTHONPATH"
  step small 60 "$python" tests/cuda_small_case.py --device cpu --every 40
  step benchmarks 120 "$python" -m benchmarks.gpu --device cpu --quick --out "$out/results"
  step tests 180 env AEVB_CUDA_DRY=20 "$python" -m pytest -m cuda -q -p no:cacheprovider "${tests[@]}"
  sanitize memcheck
}

on_a_gpu() {
  if compgen -G 'aevb/_C*.so' >/dev/null && [[ " ${STEPS-} " != *" build "* ]]; then
    note build "skipped: there is one already"
  else
    step build 150 env AEVB_CUDA=1 AEVB_CUDA_ARCHS="${AEVB_CUDA_ARCHS:-${archs:-native}}" \
      "$python" setup.py build_ext --inplace
  fi
  local share compiling=()
  if [[ " $steps " == *" benchmarks "* ]]; then
    for share in 1/5 2/5 3/5 4/5 5/5; do
      TORCHINDUCTOR_COMPILE_THREADS=4 timeout 100 "$python" -m benchmarks.gpu --compile "$share" ${MNIST:+--data "$MNIST"} >"$out/compile-${share%/*}.log" 2>&1 &
      compiling+=($!)
    done
  fi
  step small 90 env OMP_NUM_THREADS=4 "$python" tests/cuda_small_case.py --every 4
  for share in "${compiling[@]}"; do
    wait "$share" || echo "a share of the compilers' caches could not be filled: see compile-*.log"
  done
  local seconds=$(($(left) - 30))
  if ((seconds > ${BENCHMARK_SECONDS:-180})); then seconds=${BENCHMARK_SECONDS:-180}; fi
  step benchmarks $((seconds + 25)) "$python" -m benchmarks.gpu --seconds "$seconds" --out "$out/results" \
    ${MNIST:+--data "$MNIST"}
  if [ -n "${MNIST-}" ]; then
    step commands 150 "$python" -m benchmarks.gpu --commands "${RUNS:-1}" --data "$MNIST" --out "$out/results"
  fi
  # A broken CUDA context fails all that follows.
  step tests 200 env AEVB_NEED_CUDA=1 OMP_NUM_THREADS=2 "$python" -m pytest -m cuda -q --tb=short --maxfail=40 \
    --durations=10 -p no:cacheprovider $(parallel) "${tests[@]}"
  find "$out/results" -name '*.json' -exec cp {} benchmarks/results/ ';'
  step large 60 env AEVB_NEED_CUDA=1 AEVB_SLOW_TESTS=1 "$python" -m pytest -m cuda -q --tb=short -rs \
    -p no:cacheprovider -k 2_31 tests/ops/test_cuda.py
  sanitize memcheck
  sanitize racecheck
  local results
  for results in "$out"/results/*.json; do
    if [ -e "$results" ]; then "$python" -m benchmarks.gpu --table "$results"; fi
  done
}

check 2>&1 | tee "$out/gpu_check.log"
exit "${PIPESTATUS[0]}"
