#!/usr/bin/env bash
# Builds the extension under AddressSanitizer and UBSan, and runs the kernels' tests on it, or what pytest is told to:
#
#   tools/sanitize.sh [pytest arguments]
#
# It uses the python on PATH, or $PYTHON, which needs `pip install -e ".[dev]"`, and builds in build/sanitize.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
compiler=${CXX:-c++}
here=build/sanitize

# A package of the sanitised extension and this tree's Python files, in a folder of its own.
mkdir -p $here/aevb
find $here -type l -delete
AEVB_SANITIZE=1 "$python" setup.py -q build_ext --build-lib $here --build-temp $here/objects >$here/build.log 2>&1 ||
  { cat $here/build.log && exit 1; }
for file in aevb/*; do
  case $file in *.so | *__pycache__) ;; *) ln -s "$PWD/$file" $here/aevb/ ;; esac
done
ln -s "$PWD/tests" $here/tests
cd $here

# Python itself is not sanitised, so the run-time is loaded before it; without libstdc++ the first C++ exception aborts.
# Leaks are not looked for: Python keeps memory for good. AEVB_CACHE_MB=0: nothing is used again, so use after free shows.
export PYTHONPATH=$PWD AEVB_CACHE_MB=0 OMP_NUM_THREADS=2
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)"
export LD_PRELOAD

if [ $# = 0 ]; then  # test_bits.py runs every op on every instruction set, test_shapes.py views at every offset
  # test_emulation.py: the CUDA kernels. Left out is what is slow, and what needs the cache.
  set -- tests/ops/test_{bits,elementary,noise,shapes,accuracy,ahead,binarize,layers,emulation}.py tests/checks/test_errors.py \
    tests/losses/test_gaussian_loss.py
  set -- -n auto "$@" -k "not 2_31 and not cached and not kolmogorov and not moments and not correlation and not compile"
fi
exec "$python" -m pytest --capture=sys -p no:cacheprovider "$@"
