"""Every likelihood's loop over elements is vectorised: no number of it is computed alone.

A struct may be right and 5 to 15 times slower, as where GCC finds its parameters in an array; nothing else
would say so.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIKELIHOODS = re.findall(
    r"^ *X\((\w+), ([\w<>]+)", (ROOT / "csrc/formulas/likelihood_list.h").read_text(), re.MULTILINE
)
WANTS = ("log_prob", "grad", "both")
WEIGHTINGS = ("", "_mask", "_weights")
PROBE = """
using namespace aevb;
using namespace aevb::cpu;
#define AEVB_ADD(want, weighting, ...)                                                                       \\
  add_elements<__VA_ARGS__, Want::want, Weighting::weighting>(likelihood_of<__VA_ARGS__>(a), at, g, l, p)
#define AEVB_PROBE(name, want, ...)                                                                          \\
  extern "C" void name##_##want(const LikelihoodArgs& a, const Elements& at, Upstream g, float* l, float* p) { \\
    AEVB_ADD(want, none, __VA_ARGS__);                                                                       \\
  }                                                                                                          \\
  extern "C" void name##_##want##_mask(const LikelihoodArgs& a, const Elements& at, Upstream g, float* l,    \\
                                       float* p) {                                                           \\
    AEVB_ADD(want, mask, __VA_ARGS__);                                                                       \\
  }                                                                                                          \\
  extern "C" void name##_##want##_weights(const LikelihoodArgs& a, const Elements& at, Upstream g, float* l, \\
                                          float* p) {                                                        \\
    AEVB_ADD(want, weights, __VA_ARGS__);                                                                    \\
  }
#define AEVB_PROBES(name, Struct, ...)             \\
  AEVB_PROBE(name, log_prob, Struct)  \\
  AEVB_PROBE(name, grad, Struct)      \\
  AEVB_PROBE(name, both, Struct)
"""
# What computes; moves and broadcasts of one number are of the likelihood's own.
ARITHMETIC = re.compile(r"\b(v(?:add|sub|mul|div|sqrt|max|min|fn?m(?:add|sub)\d+)(ss|ps))\b")


def assembly(folder, isa, list_of="AEVB_LIKELIHOODS(AEVB_PROBES)", more=""):
    """The instructions of each probe."""
    region = (ROOT / f"csrc/cpu/isa_{isa}.cpp").read_text()
    assert '#include "kernels.inl"' in region
    source = folder / f"{isa}.cpp"
    source.write_text(
        region.replace('#include "kernels.inl"', f'#include "likelihood_rows.h"\n{PROBE}{more}\n{list_of}')
    )
    target = folder / f"{isa}.s"
    flags = ["-std=c++17", "-O3", "-fno-wrapv", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-fno-trapping-math", f"-I{ROOT / 'csrc/cpu'}", "-w", "-S", "-o", str(target)]
    subprocess.run([*os.environ.get("CXX", "c++").split(), *flags, str(source)], check=True)
    parts = re.split(r"^(\w+):$", target.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def alone(code):
    """Of a probe, the instructions that compute one number, and whether any computes many."""
    found = ARITHMETIC.findall(code)
    return [name for name, kind in found if kind == "ss"], any(kind == "ps" for _, kind in found)


needs_gcc = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not shutil.which("c++"), reason="x86-64 and a C++ compiler"
)


@needs_gcc
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_element_is_computed_alone(tmp_path, isa):
    code = assembly(tmp_path, isa)
    for name, struct in LIKELIHOODS:
        for want in (f"{want}{weighting}" for want in WANTS for weighting in WEIGHTINGS):
            scalars, packed = alone(code[f"{name}_{want}"])
            # What a likelihood makes of its own number is computed once.
            allowed = 40 if "Fixed" in struct else 0
            assert packed, (name, want)
            assert len(scalars) <= allowed, (name, want, scalars)


@needs_gcc
def test_a_struct_that_is_not_vectorised_is_seen(tmp_path):
    """One whose parameters go through memory, element by element."""
    slow = """
struct Slow {
  static constexpr bool kProduct = false;
  static constexpr int kParams = 2;
  float x_scale;
  AEVB_FORMULA NegLogProb add_neg_log_prob(float sum, float x, float a, float b) const {
    volatile float p[2] = {a, b};
    return {sum + p[0] * exp_of(p[1]) + x, 0.0f};
  }
  AEVB_FORMULA LikelihoodGradient grad(float x, float a, float b) const { return {a, b}; }
};
"""
    code = assembly(tmp_path, "avx2", 'AEVB_PROBES(slow, Slow, "a", "b")', slow)
    assert alone(code["slow_log_prob"])[0]
