#!/usr/bin/env bash
# One build under several torches: a wheel, built once against the torch of the python on PATH, or $PYTHON, goes through
# the tests of every op, of autograd and of torch.compile under each torch given. The sources are compiled against each
# of them, too.
#
#   tools/abi_check.sh [VERSION ...]    such as 2.11.0 2.12.1; by default 2.11.0 and the newest that pip finds
#
# Prints a line a version. pip downloads several GB for each, which are deleted again before the next. The CUDA kernels
# are built whatever torch there is, for all architectures, unless AEVB_CUDA=0 or AEVB_CUDA_ARCHS says otherwise.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
[ $# -gt 0 ] || set -- 2.11.0 newest
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 AEVB_CUDA=${AEVB_CUDA:-1}

mkdir "$folder/tree" "$folder/check"
cp -r aevb csrc tools setup.py pyproject.toml README.md LICENSE "$folder/tree"
rm -f "$folder"/tree/aevb/*.so
cp -r tests pyproject.toml "$folder/check"  # without aevb/ beside them: the tests import what is installed
"$python" -m pip wheel -v --no-deps -w "$folder" "$folder/tree" >"$folder/log" 2>&1 || { cat "$folder/log" && exit 1; }
"$python" -c 'import torch; print("built against torch", torch.__version__)'
(cd "$folder" && sha256sum aevb-*.whl)

check() { # VERSION: everything that is printed goes to the log, but for the line that ends it
  rm -rf "$folder/venv"
  "$python" -m venv "$folder/venv" && source "$folder/venv/bin/activate" || return
  pip install --no-cache-dir "torch${1:+==$1}" numpy safetensors tyro tqdm matplotlib pytest scipy \
    "setuptools>=77" pybind11 ninja || return
  pip install --no-deps "$folder"/aevb-*.whl || return
  cd "$folder/check" || return
  python -c '
import torch, aevb
from aevb import _C
built = _C.build_info()["cuda"]
has = torch._C._dispatch_has_kernel_for_dispatch_key("aevb::gaussian_kl_forward", "CUDA")
assert has == built.startswith("built for"), (has, built)
print("torch", torch.__version__, "imports it; CUDA kernels", built)' >"$folder/line" || return
  python -m pytest -q -p no:cacheprovider tests/ops/test_{accuracy,contract,linear}.py tests/losses/test_{drop_in,estimators}.py >"$folder/tests"
  local status=$?
  cat "$folder/tests"
  cd "$folder/tree" && python setup.py build_ext --build-lib "$folder/compiled" || return
  return $status
}

failed=0
for version in "$@"; do
  : >"$folder/line" && : >"$folder/tests"
  if (check "${version/#newest/}") >"$folder/log" 2>&1; then
    echo "$(cat "$folder/line"); $(tail -n 1 "$folder/tests"); the sources compile"
  else
    failed=1
    grep -E "^(FAILED|ERROR)|error:" "$folder/log" || tail -n 40 "$folder/log"
    echo "torch $version FAILED: $(tail -n 1 "$folder/tests")"
  fi
done
exit $failed
