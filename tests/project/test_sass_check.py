"""tools/sass_check.py, by planted faults: each must be found in a kernel's machine code, and not in the kernel's right
twin. No GPU is needed."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import sass_check  # noqa: E402


def missing():
    try:
        sass_check.find_tools()
    except FileNotFoundError as e:
        return str(e)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

# name: (what is found, the wrong body, the right body), applied to the vector v that a thread copies.
FAULTS = {
    "local_array": (
        "local memory",
        "float a[64] = {}; for (int k = 0; k < 64; ++k) a[k * n % 64] += x[k].x; v.x += a[i % 64];",
        "float a[64] = {}; for (int k = 0; k < 64; ++k) a[k] += x[k].x; v.x += a[3] + a[31];",
    ),
    "float64": ("float64", "v.x = v.x * 0.1;", "v.x = v.x * 0.1f;"),
    "to_float64": ("float64", "v.x = __double2hiint(v.x);", "v.x = __float_as_int(v.x);"),
    "division": ("a call", "v.x = v.y / v.x;", "v.x = v.y * rcp_in_range(v.x);"),
    "root": ("a call", "v.x = sqrtf(v.x);", "v.x = sqrt_in_range(v.x);"),
    "division_of_int64": ("a call", "v.x += (n + i) / (n - i);", "v.x += (n + i) >> (n - i);"),
    "not_inlined": ("a call", "v.x = called(v.x);", "v.x = inlined(v.x);"),
}
PROLOGUE = """
#include <cstdint>
#include "formulas/elementary.h"
using namespace aevb;
__noinline__ __device__ float called(float x) { return 2 * x; }
__forceinline__ __device__ float inlined(float x) { return 2 * x; }
"""


def kernel(name, body):
    return f"""
__global__ void __launch_bounds__(256) {name}(const float4* __restrict__ x, float4* y, int64_t n) {{
  const int64_t i = blockIdx.x * int64_t{{256}} + threadIdx.x;
  if (i >= n) return;
  float4 v = x[i];
  {body}
  y[i] = v;
}}
"""


def check(tmp_path, text, archs=("80", "90")):
    source = tmp_path / "kernels.cu"
    source.write_text(PROLOGUE + text)
    return sass_check.check_all([source], archs)


def test_every_fault_is_found(tmp_path, monkeypatch):
    lenient = [f for f in sass_check.FLAGS if f not in ("-Werror", "all-warnings", "-warn-spills,-warn-lmem-usage")]
    monkeypatch.setattr(sass_check, "FLAGS", [f for f in lenient if f != "-Xptxas"])  # or some would not be compiled
    count, found = check(tmp_path, "".join(kernel(name, wrong) for name, (_, wrong, _) in FAULTS.items()))
    assert count == 2 * len(FAULTS)
    for arch in ("80", "90"):
        for name, (expected, _, _) in FAULTS.items():
            assert [f for f in found if f.startswith(f"kernels.cu sm_{arch}: {name} has {expected}")], (arch, name)


def test_the_right_twins_pass(tmp_path):
    right = "".join(kernel(name, body) for name, (_, _, body) in FAULTS.items())
    count, found = check(tmp_path, right.replace("called", "inlined"), sass_check.READ)
    assert found == []
    assert count >= 3 * len(FAULTS)


MANY = """
__global__ void __launch_bounds__(1024, 1) k(const float4* x, float4* y) {
  float4 v[48];
  for (int k = 0; k < 48; ++k) v[k] = x[k];
  __syncthreads();
  for (int k = 0; k < 48; ++k) y[k].x = v[k].x * v[47 - k].w + v[k].y * v[(5 * k + 3) % 48].z;
}
"""


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("Registers are spilled", MANY),
        ("Local memory used", kernel("k", FAULTS["local_array"][1])),
        ("was declared but never referenced", kernel("k", "int unused;")),
        ("error", "nonsense"),
    ],
)
def test_what_the_compiler_says_is_a_failure(tmp_path, expected, text):
    for arch in ("80", "75"):  # one that is read, and one that is only compiled
        _, found = check(tmp_path, text, (arch,))
        assert [f for f in found if expected in f], found


def test_narrow_accesses_are_found(tmp_path):
    def adam(body):
        return f'extern "C" __global__ void adam_step(const float* x, float* y) {{ {body} }}'

    wide = "reinterpret_cast<float4*>(y)[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];"
    assert check(tmp_path, adam(wide))[1] == []
    _, found = check(tmp_path, adam("y[threadIdx.x] = x[threadIdx.x];"), ("90",))
    assert found == ["kernels.cu sm_90: adam_step has no accesses of 16 bytes, only of 4"]


def test_the_names_of_wide_kernels_are_those_of_kernels():
    """One that was renamed would no longer be held to it."""
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    defined = set(re.findall(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+(\w+)\(", text))
    for pattern in sass_check.WIDE:
        for alternative in pattern.replace("gradient\\w*", "gradient").split("|" if "(" not in pattern else "\0"):
            names = re.sub(r"<.*", "", alternative)
            stem, _, ends = names.partition("(")
            for name in [stem + end for end in ends.rstrip(")").split("|")] if ends else [stem]:
                assert name in defined, name
