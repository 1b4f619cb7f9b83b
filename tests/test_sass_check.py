"""tools/sass_check.py, by planted faults: each must be found in a kernel's machine code, and not in the kernel's right
twin. No GPU is needed."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402
import sass  # noqa: E402
import sass_check  # noqa: E402
import sass_roots  # noqa: E402
from sass_check import Work  # noqa: E402

ARCHS = (80, 90)


def missing():
    try:
        sass_check.find_compiler()
        sass.find_disassembler()
    except FileNotFoundError as e:
        return str(e)
    return "" if shutil.which("c++filt") else "c++filt is missing"


needs_tools = pytest.mark.skipif(bool(missing()), reason=missing())

# name: (what is found, the wrong body, the right body), applied to the vector v that a thread copies.
FAULTS = {
    "local_array": (
        "local memory",
        "float a[64] = {}; for (int k = 0; k < 64; ++k) a[k * n % 64] += x[k].x; v.x += a[i % 64];",
        "float a[64] = {}; for (int k = 0; k < 64; ++k) a[k] += x[k].x; v.x += a[3] + a[31];",
    ),
    "float64": ("float64", "v.x = v.x * 0.1;", "v.x = v.x * 0.1f;"),
    "to_float64": ("float64", "v.x = __double2hiint(v.x);", "v.x = __float_as_int(v.x);"),
    "division": ("calls __cuda_sm3x_div_rn_noftz_f32_slowpath", "v.x = v.y / v.x;", "v.x = v.y * rcp_in_range(v.x);"),
    "root": ("calls __cuda_sm20_sqrt_rn_f32_slowpath", "v.x = sqrtf(v.x);", "v.x = sqrt_in_range(v.x);"),
    "division_of_int64": ("calls __cuda_sm20_div_s64", "v.x += (n + i) / (n - i);", "v.x += (n + i) >> (n - i);"),
    "not_inlined": ("calls", "v.x = called(v.x);", "v.x = inlined(v.x);"),
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


COPY = [Work(r"\w+", "x:4 >y:4")]


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles a source leniently, and gives its kernels."""

    def compile_one(text, arch=90):
        monkeypatch.setattr(sass_check, "STRICT", ["-Xptxas", "-v"])
        source = tmp_path / "one.cu"
        source.write_text(PROLOGUE + text)
        build = sass_check.compile_cubin(source, arch, tmp_path)
        assert not build.failures
        return {kernel.name: kernel for kernel in sass.read(build.cubin)}

    return compile_one


def check(tmp_path, text, works, **options):
    source = tmp_path / "kernels.cu"
    source.write_text(PROLOGUE + text)
    return sass_check.check([source], options.pop("archs", ARCHS), (), works, **options)


@needs_tools
def test_every_fault_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sass_check, "STRICT", ["-Xptxas", "-v"])  # or some would not be compiled
    text = "".join(kernel(name, wrong) for name, (_, wrong, _) in FAULTS.items())
    failures = check(tmp_path, text, COPY)
    for arch in ARCHS:
        for name, (expected, _, _) in FAULTS.items():
            assert [f for f in failures if f.startswith(f"kernels.cu sm_{arch}: {name}: {expected}")], (arch, name)


@needs_tools
def test_the_right_twins_pass(tmp_path, capsys):
    text = "".join(kernel(name, right) for name, (_, _, right) in FAULTS.items())
    assert check(tmp_path, text, COPY, archs=(80, 90, 100)) == []
    table = capsys.readouterr().out
    assert all(name in table for name in FAULTS)
    assert max(map(len, table.splitlines())) <= 120


MANY = """
__global__ void __launch_bounds__(1024, 2) k(const float4* x, float4* y) {
  float4 v[24];
  for (int k = 0; k < 24; ++k) v[k] = x[k];
  __syncthreads();
  for (int k = 0; k < 24; ++k) y[k].x = v[k].x * v[23 - k].w + v[k].y * v[(5 * k + 3) % 24].z;
}
"""


@needs_tools
@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("Registers are spilled", MANY),
        ("Local memory used", kernel("k", FAULTS["local_array"][1])),
        ("was declared but never referenced", kernel("k", "int unused;")),
    ],
)
def test_what_the_compiler_says_is_a_failure(tmp_path, expected, text):
    failures = check(tmp_path, text, COPY, archs=(80,))
    assert [f for f in failures if expected in f], failures


ACCESSES = """
__global__ void {name}(const {x}* __restrict__ x, {y}* y, int n) {{
  for (int i = threadIdx.x; i < n; i += 256) {{ {body} }}
}}
"""


@needs_tools
def test_accesses_must_be_wide(tmp_path):
    bodies = {
        "scalar": ("float", "float", "y[i] = 2 * x[i];"),
        "scalar_store": ("float4", "float", "float4 v = x[i]; y[i] = v.x + v.y * v.z * v.w;"),
        "half": ("float2", "float2", "float2 v = x[i]; v.x = v.y; y[i] = v;"),
        "right": ("float4", "float4", "float4 v = x[i]; v.x = v.y; y[i] = v;"),
        "unrolled": ("float4", "float4", "float4 v = x[2 * i], w = x[2 * i + 1]; y[2 * i] = w; y[2 * i + 1] = v;"),
    }
    text = "".join(ACCESSES.format(name=n, x=x, y=y, body=body) for n, (x, y, body) in bodies.items())
    failures = check(tmp_path, text, COPY, archs=(90,))
    found = {f.split(": ")[1] for f in failures if "in vectors of 16 bytes" in f}
    assert found == {"scalar", "scalar_store", "half"}, failures


@needs_tools
def test_narrow_streams_come_as_many_elements_at_a_time(tmp_path):
    bodies = {
        "right": ("uint32_t", "uint32_t b = x[i]; y[i] = make_float4(b & 255, b >> 8 & 255, b >> 16 & 255, b >> 24);"),
        "bytes": ("uint8_t", "y[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);"),
    }
    text = "".join(ACCESSES.format(name=n, x=x, y="float4", body=body) for n, (x, body) in bodies.items())
    failures = check(tmp_path, text, [Work(r"\w+", ">y:4 x:1")], archs=(90,))
    assert [f.split(": ")[1] for f in failures] == ["bytes"]


@needs_tools
def test_a_kernel_must_be_in_the_table(tmp_path):
    text = kernel("k", "v.x = 0;")
    assert "no entry" in check(tmp_path, text, [Work("other", "")], archs=(90,))[0]
    assert check(tmp_path, text, [Work("k", "")], archs=(90,)) == []


@needs_tools
def test_a_kernel_below_its_floor(tmp_path):
    text = ""
    for name, steps in [("slow", 200), ("fast", 2)]:
        body = f"for (int k = 0; k < {steps}; ++k) {{ v.x = v.x * v.x + v.y; v.y = v.y * v.z + v.w; }}"
        text += kernel(name, "#pragma unroll\n" + body).replace("__global__", "template <class T> __global__")
        text += f"template __global__ void {name}<float>(const float4*, float4*, int64_t);"
    failures = check(tmp_path, text, [Work(r"\w+<(?P<T>\w+)>", "x:T >y:T", floor={"fp32": 90})], archs=(90,))
    assert len(failures) == 1
    assert failures[0].startswith("slow<fp32>: ")
    assert "floor is 90%" in failures[0]


@needs_tools
def test_instructions_are_counted_per_element(compiled):
    # Eight rounded products and sums an element, and a rare branch that is not counted.
    steps = "".join(f"v.{c} = v.{c} * v.{c}; v.{c} = v.{c} + 1.5f;" * 4 for c in "xyzw")
    rare = "if (n - i < 7) for (int k = 0; k < n; ++k) v.x = v.x * v.y + n;"
    kernels = compiled(kernel("plain", steps) + kernel("rare", rare + steps))
    costs = {name: sass_check.cost(k, 90, COPY[0], {}) for name, k in kernels.items()}
    for cost in costs.values():
        assert cost.bytes == 8
        assert cost.slots["fma"] - cost.slots["imad"] == pytest.approx(8, abs=0.5)
        assert 8 < cost.slots["issue"] < 18
    assert costs["plain"].all_branches == costs["plain"].slots["issue"]
    assert costs["rare"].all_branches > costs["rare"].slots["issue"] + 1


NESTED = """
__global__ void rows(const float4* x, float4* y, const float* scale, int n, int groups) {
  for (int g = 0; g < groups; ++g) {
    float s = scale[g];
#pragma unroll 1
    for (int k = 0; k < 24; ++k) s = s * s + 0.5f;
#pragma unroll 1
    for (int i = 0; i < n; ++i) { float4 v = x[g * n + i]; v.x *= s; y[g * n + i] = v; }
  }
}
"""


@needs_tools
def test_loops_around_the_hot_one_are_shared_out(compiled):
    kernel = compiled(NESTED)["rows"]
    alone = sass_check.cost(kernel, 90, Work("rows", "x:4 >y:4"), {})
    around = sass_check.cost(kernel, 90, Work("rows", "x:4 >y:4", around=lambda t: (64,)), {})
    whole = sass_check.cost(kernel, 90, Work("rows", "x:4 >y:4", around=lambda t: (64,), whole=640), {})
    outer = kernel.root.children[0]
    inner = next(c for c in outer.children if any(i.bytes == 16 for i in kernel.common_path(c)))
    assert around.slots["issue"] == alone.slots["issue"] + len(kernel.common_path(outer, inner)) / 64
    assert whole.slots["issue"] == around.slots["issue"] + len(kernel.common_path(kernel.root, outer)) / 640


SHARED = """
__global__ void __launch_bounds__(256) tile(const float4* x, float* y, int n) {
  __shared__ float4 tile[512];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float sum = 0;
#pragma unroll 8
  for (int k = 0; k < 8 * n; ++k) sum += reinterpret_cast<float*>(tile)[k * 32 + threadIdx.x % 32];
  y[threadIdx.x] = sum;
}
"""


@needs_tools
def test_a_second_pass_over_shared_memory_is_added(compiled):
    kernel = compiled(SHARED)["tile"]
    once = sass_check.cost(kernel, 90, Work("tile", "x:4"), {})
    twice = sass_check.cost(kernel, 90, Work("tile", "x:4", shared=(8,)), {})
    assert twice.slots["issue"] >= once.slots["issue"] + 2  # a load and an addition
    assert "no loop reads 7" in sass_check.cost(kernel, 90, Work("tile", "x:4", shared=(7,)), {})


LISTING = """
	.section	.text.k,"ax",@progbits
k:
        /*0000*/                   ISETP.GE.AND P0, PT, R0, R2, PT ;
        /*0010*/               @P0 EXIT ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   BRA.U UP0, `(.L_x_2) ;
        /*0040*/                   FADD R4, R4, R5 ;
.L_x_2:
        /*0050*/               @P1 CALL.REL.NOINC `(.L_x_3) ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   BRX R2 -0x80                         (*"BRANCH_TARGETS .L_x_4,.L_x_5"*);
.L_x_4:
        /*0080*/                   STG.E desc[UR4][R2.64], R4 ;
.L_x_5:
        /*0090*/                   EXIT ;
.L_x_6:
        /*00a0*/                   BRA `(.L_x_6);
"""


@pytest.mark.skipif(not shutil.which("c++filt"), reason="c++filt is missing")
def test_every_kind_of_jump_is_followed():
    (kernel,) = sass.parse(LISTING)
    assert kernel.successors[0x20] == [0x50, 0x40]  # the condition is an operand
    assert kernel.successors[0x50] == [0x70, 0x60]  # a call of a label is a jump
    assert kernel.successors[0x70] == [0x80, 0x90]
    (loop,) = kernel.root.children
    assert loop.header == 0x20
    assert loop.blocks == {0x20, 0x40, 0x50, 0x60}
    assert [i.opcode for i in kernel.common_path(loop)] == ["LDG.E.128", "BRA.U", "CALL.REL.NOINC", "BRA"]
    assert not sass_check.forbidden(kernel)


@needs_tools
def test_reciprocal_and_root_are_nvcc_s_own(compiled):
    kernels = compiled(sass_roots.SOURCE)
    assert sass_roots.check(list(kernels.values())) == []
    for name, slow in [("nvcc_rcp", 0), ("nvcc_sqrt", 25)]:  # exponents: subnormal, 2^-102
        assert not sass_roots.takes_fast_path(kernels[name], slow << 23)
        assert sass_roots.takes_fast_path(kernels[name], 127 << 23)


@needs_tools
def test_other_ways_to_a_reciprocal_and_a_root_are_found(compiled):
    text = sass_roots.SOURCE.replace("aevb::rcp_in_range(x)", "2 - x * __frsqrt_rn(x)")
    text = text.replace("aevb::sqrt_in_range(x)", "aevb::sqrt_in_range(x) * 1.0000001f")
    failures = sass_roots.check(list(compiled(text).values()))
    assert [f.split()[0] for f in failures] == ["rcp_in_range", "sqrt_in_range"]


def test_occupancy():
    # 65536 registers, by 8 for each thread and by quarters: 32 are the most for 2048 threads.
    assert sass_check.resident_threads(90, 32, 0, 256) == 2048
    assert sass_check.resident_threads(90, 33, 0, 256) == 1536
    assert sass_check.resident_threads(90, 113, 0, 256) == 512
    assert sass_check.resident_threads(86, 32, 0, 256) == 1536
    assert sass_check.resident_threads(90, 32, 60 * 1024, 256) == 768  # 61 of 228 KiB a block
    assert sass_check.resident_threads(80, 16, 0, 32) == 1024  # 32 blocks


def test_flags_are_those_of_the_build():
    kernels = cuda_toolkit.Kernels(cuda_toolkit.Toolkit("nvcc", "13.0", ("90",), "lib"), ["90"], False)
    assert set(sass_check.FLAGS) <= set(kernels.command("a.cu", "a.o"))
