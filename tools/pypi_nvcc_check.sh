#!/usr/bin/env bash
# Builds and imports the package with the nvcc that PyPI has, as on a GPU machine without a CUDA toolkit:
#
#   tools/pypi_nvcc_check.sh [FOLDER]    the package is left in FOLDER, if one is named
#
# It uses the python on PATH, or $PYTHON, which needs torch and the packages that aevb imports, CPU builds or not. It
# compiles for AEVB_CUDA_ARCHS (90 by default, which is quick), with nvcc's warnings as errors.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
site=$(realpath -m "${1:-$folder/site}")

# A copy, so that nothing here is replaced by this build.
mkdir "$folder/tree"
cp -a aevb csrc tools setup.py pyproject.toml README.md LICENSE "$folder/tree"
rm -f "$folder"/tree/aevb/*.so

# A CUDA_HOME that is none hides the machine's own toolkits.
export CUDA_HOME=$folder/no-toolkit AEVB_CUDA=1 AEVB_CUDA_ARCHS=${AEVB_CUDA_ARCHS:-90}
export NVCC_APPEND_FLAGS="-Werror all-warnings"
unset PIP_QUIET  # the log must say which nvcc it was
"$python" -m pip install -v --no-deps --target "$site" "$folder/tree" >"$folder/log" 2>&1 ||
  { cat "$folder/log" && exit 1; }
grep -q 'aevb: nvcc is .*/nvidia/cu13/bin/nvcc$' "$folder/log" ||
  { cat "$folder/log" && echo "The kernels were not compiled by the nvcc of PyPI's packages." && exit 1; }

cd "$folder"
PYTHONPATH=$site "$python" -c '
import aevb, torch
from aevb import _C
assert aevb.__file__.startswith("'"$site"'/"), aevb.__file__
decision = _C.build_info()["cuda"]
assert decision.startswith("built for "), decision
assert torch._C._dispatch_has_kernel_for_dispatch_key("aevb::gaussian_kl_forward", "CUDA")
print("nvcc from PyPI: CUDA kernels", decision)'
