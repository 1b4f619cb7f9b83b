#!/usr/bin/env bash
# All that needs a GPU, in one command, within 10 minutes and without the network: builds in place for the GPUs of this
# machine, runs `pytest -m cuda`, compute-sanitizer on a small case where it is installed, the benchmarks, and the tests
# of tensors of over 2^31 elements; the results go to benchmarks/results/<gpu>.json.
#
#   tools/gpu_check.sh          needs torch >= 2.11 built for CUDA, nvcc, g++ and an NVIDIA GPU
#   tools/gpu_check.sh --dry    needs no GPU: the same steps as far as they go without, to try this script
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
python=${PYTHON:-python3}
total=${AEVB_GPU_CHECK_SECONDS:-560}
out=${OUT:-build/gpu_check}
rm -rf "$out/results"
mkdir -p "$out/results" || exit
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

summary=()
failures=0

note() { # NAME RESULT: a line of the summary
  summary+=("$(printf '%-12s %s' "$1" "$2")")
  echo "-- $1: $2"
}

left() { echo $((total - SECONDS)); }

# step NAME SECONDS COMMAND...: runs the command for so long at the most.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
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
import importlib.util, os, shutil, sys, sysconfig
has = importlib.util.find_spec
missing = [m for m in ("numpy", "safetensors", "tqdm", "matplotlib", "pytest", "scipy", "setuptools") if not has(m)]
missing += [f"{c} on PATH" for c in ("nvcc", os.environ.get("CXX", "c++").split()[0]) if not shutil.which(c)]
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    missing.append("Python.h")
archs = []
if has("torch"):
    import torch
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        archs.append(f"{major}{minor}")
        print(f"GPU {i}: {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
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
    step "$tool" 60 "$python" tests/cuda_small_case.py cpu
  elif [ -z "$program" ]; then
    note "$tool" "skipped: compute-sanitizer is not installed"
  else
    # Without PyTorch's cache every tensor is an allocation of its own, whose ends memcheck watches.
    step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 \
      --report-api-errors no --print-limit 20 "$python" tests/cuda_small_case.py
  fi
}

check() {
  step machine 60 "$python" -c "$machine" "$out/architectures" "${dry:+dry}"
  local archs results
  archs=$(cat "$out/architectures" 2>/dev/null) && rm -f "$out/architectures"
  if [ -n "$dry" ]; then
    note build "skipped: a dry run"
    step tests 180 env AEVB_CUDA_DRY=1 "$python" -m pytest -m cuda -q -p no:cacheprovider tests/test_cuda.py
    sanitize memcheck
    step benchmarks 120 "$python" -m benchmarks.gpu --device cpu --quick --out "$out/results"
  else
    step build 150 env AEVB_CUDA=1 AEVB_CUDA_ARCHS="${AEVB_CUDA_ARCHS:-${archs:-native}}" \
      "$python" setup.py build_ext --inplace
    # tests/test_cli.py needs tyro, and nothing in it runs on a GPU. A broken CUDA context fails all that follows.
    step tests 200 env AEVB_NEED_CUDA=1 "$python" -m pytest -m cuda -q --tb=short --maxfail=20 --durations=10 -p no:cacheprovider \
      tests/test_cuda.py tests --ignore=tests/test_cli.py
    sanitize memcheck
    sanitize racecheck
    local seconds=$(($(left) - 30))
    if ((seconds > 230)); then seconds=230; fi
    step benchmarks $((seconds + 25)) "$python" -m benchmarks.gpu --seconds "$seconds" --out "$out/results"
    find "$out/results" -name '*.json' -exec cp {} benchmarks/results/ ';'
    step large 60 env AEVB_NEED_CUDA=1 AEVB_SLOW_TESTS=1 "$python" -m pytest -m cuda -q --tb=short -rs \
      -p no:cacheprovider -k 2_31 tests/test_cuda.py
    for results in "$out"/results/*.json; do
      if [ -e "$results" ]; then "$python" -m benchmarks.gpu --table "$results"; fi
    done
  fi
  printf '\n== Summary, after %d s\n' "$SECONDS"
  printf '%s\n' "${summary[@]}"
  if ((failures)); then echo "$failures of the steps FAILED" && return 1; fi
}

check 2>&1 | tee "$out/gpu_check.log"
exit "${PIPESTATUS[0]}"
