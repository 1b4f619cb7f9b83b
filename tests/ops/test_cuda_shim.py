"""The emulation of CUDA on the CPU (emulation/cuda_shim.h), by planted bugs: each must be caught, and the same kernel
without its bug must pass."""

import ctypes
import os
import re
import subprocess

import numpy as np
import pytest
from emulation import build

SOURCE = build.HERE / "planted_bugs.cu"
ORDERS = [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]
MAX = 4096


class Kernels:
    """planted_bugs.cu as a library. Its functions give what went wrong, or None."""

    def __init__(self, path):
        self.control = build.Control(path)
        self._library = ctypes.CDLL(str(path))

    def __getattr__(self, name):
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p

        def call(*arguments):
            pointers = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments]
            error = function(*pointers)
            return error.decode() if error else None

        return call

    def run(self, name, right):
        """What the kernel wrote, or what went wrong."""
        out = np.full(MAX, -1, np.float32)
        return self.planted(name.encode(), right, out, MAX) or out

    def results(self, name, right):
        """What it wrote in each order, without what it did not write."""
        results = []
        for order, seed in ORDERS:
            with self.control.order(order, seed):
                result = self.run(name, right)
            assert isinstance(result, np.ndarray), result
            results.append(result[result != -1])
        return results


@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def kernels(request):
    flags = ["-DAEVB_EMULATION_UCONTEXT"] if request.param == "ucontext" else []
    return Kernels(build.library("planted_bugs", [SOURCE], sanitize=False, extra_flags=flags))


def line_of(kernel, text):
    """The lines of a kernel's source on which the text stands."""
    lines = SOURCE.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if f"void {kernel}(" in line)
    end = lines.index("}", begin)
    return [i + 1 for i in range(begin, end) if text in lines[i]]


# ---- bugs that show as results


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing_barrier", [*range(127, -1, -1)] * 2),
        ("missing_second_barrier", [300 + 3 * i for i in range(127, -1, -1)]),
        ("missing_warp_barrier", [*range(31, -1, -1)]),
        ("order_of_blocks", [i // 32 for i in range(256)]),
    ],
)
def test_results_that_depend_on_the_order_differ(kernels, name, expected):
    for result in kernels.results(name, True):
        assert result.tolist() == expected
    wrong = kernels.results(name, False)
    assert any(not np.array_equal(result, wrong[0], equal_nan=True) for result in wrong[1:])


def test_unwritten_shared_memory_is_nan_in_every_block(kernels):
    for result in kernels.results("unwritten_shared", True):
        assert result.tolist() == [*range(32)] * 2
    for result in kernels.results("unwritten_shared", False):
        assert result[:8].tolist() == [*range(8)]
        assert np.isnan(result[8:]).all()
        assert len(result) == 64


def test_reads_beside_a_shared_array_are_nan(kernels):
    for result in kernels.results("shared_read_behind", True):
        assert result.tolist() == [*range(32)]
    for result in kernels.results("shared_read_behind", False):
        assert result[:31].tolist() == [*range(1, 32)]
        assert np.isnan(result[31:]).all()
        assert len(result) == 32


# ---- bugs that are errors

ERRORS = {
    "shared_write_behind": (r"a thread wrote at byte 128 of the shared array s, which has 128", "AEVB_SHARED"),
    "shared_write_before": (r"a thread wrote at byte -4 of the shared array s, which has 128", "AEVB_SHARED"),
    "divergent_barrier": (r"16 threads of the block's 64 wait at .*48 threads returned \(the first is 16\)", "__sync"),
    "different_barriers": (r"others of its block wait at the barrier at planted_bugs.cu:\d+ ", "__sync"),
    "barriers_in_a_loop": (r"wait at .*threads returned", "__sync"),
    "barrier_or_shuffle": (
        r"deadlock: 16 threads of .* \(the first is 0\), 16 threads of .* \(the first is 16\)",
        "__sync",
    ),
    "mask_without_caller": (r"the mask 0x0000ffff has not the lane that calls, (1[6-9]|[23]\d) .*thread \1", "__shfl"),
    "mask_with_returned_lanes": (r"deadlock: 16 threads of .*16 threads returned \(the first is 16\)", "__shfl"),
    "mask_past_the_block": (r"the mask 0xffffffff has lanes past the block's end .*thread 3[2-9]\)", "__shfl"),
    "read_outside_the_mask": (r"reads lane 20, which is not in the mask 0x0000ffff", "__shfl"),
    "different_masks": (r"this lane has the mask 0xffff.* wait at .* with 0xffff", "__shfl"),
    "different_masks_deadlock": (r"deadlock: 16 threads of .*16 threads returned \(the first is 16\)", "__shfl"),
    "different_shuffles": (
        r"this lane has the mask 0xffffffff, and others of it wait at planted_bugs.cu:\d+",
        "__shfl",
    ),
    "odd_width": (r"a shuffle of width 12; a power of two up to 32 is possible", "__shfl"),
}


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_line_block_and_thread(kernels, name, order, seed):
    pattern, call = ERRORS[name]
    with kernels.control.order(order, seed):
        error = kernels.run(name, False)
        right = kernels.run(name, True)  # the machine is usable after an error
    assert isinstance(error, str), "not caught"
    assert re.search(pattern, error), error
    where = re.match(r"CUDA emulation: planted_bugs\.cu:(\d+): ", error)
    assert where, error
    assert int(where[1]) in line_of(name, call)
    assert re.search(r"\(block 0(, thread \d+)?\)$", error), error
    assert ("thread" in error.rsplit("(")[-1]) == ("shared array" not in error)
    assert isinstance(right, np.ndarray), right
    assert (right != -1).sum() >= 16


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_an_exception_of_a_kernel_passes_and_leaves_the_machine_usable(kernels, order, seed):
    with kernels.control.order(order, seed):
        for _ in range(3):
            assert kernels.run("exception", False) == "thrown by a kernel"
            assert kernels.run("missing_warp_barrier", True)[:33].tolist() == [*range(31, -1, -1), -1]  # fewer threads
            assert kernels.run("exception", True)[:128].tolist() == [i ^ 1 for i in range(128)]


# ---- the order, and launches


def tickets(kernels, grid, threads):
    out = np.full((grid, threads, 2), -1, np.int32)
    assert kernels.run_tickets(ctypes.c_int64(grid), ctypes.c_int64(threads), out) is None
    return out


def test_orders_are_what_they_say(kernels):
    grid, threads = 3, 70
    numbers = np.arange(grid * 2 * threads).reshape(grid, 2, threads).swapaxes(1, 2)  # block, before or after, thread
    with kernels.control.order("forward"):
        assert np.array_equal(tickets(kernels, grid, threads), numbers)
    with kernels.control.order("reverse"):
        assert np.array_equal(tickets(kernels, grid, threads), numbers[::-1, ::-1])


def test_shuffled_orders_follow_the_seed(kernels):
    grid, threads = 30, 70
    seen = []
    for seed in [1, 1, 2, 3]:
        with kernels.control.order("shuffled", seed):
            seen.append(tickets(kernels, grid, threads))
        out = seen[-1]
        assert np.array_equal(np.sort(out, axis=None), np.arange(grid * threads * 2))
        assert (out[:, :, 0].max(1) < out[:, :, 1].min(1)).all()  # the barrier holds
        blocks = out[:, :, 0].min(1).argsort()
        assert 0 < (np.diff(blocks) > 0).sum() < grid - 1
        assert len({tuple(block[:, phase].argsort()) for block in out for phase in (0, 1)}) == 2 * grid
    assert np.array_equal(seen[0], seen[1])
    first_blocks = {int(out[:, 0, 0].argmin()) for out in seen}
    assert len(first_blocks) > 1
    assert not np.array_equal(seen[1], seen[2])


@pytest.mark.parametrize("grid", [1, 2, 3, 30, 97, 1024])
def test_every_block_runs_once(kernels, grid):
    for order, seed in ORDERS:
        with kernels.control.order(order, seed):
            out = tickets(kernels, grid, 1)
        assert np.array_equal(np.sort(out, axis=None), np.arange(grid * 2))


def test_launch_limits(kernels):
    def run(grid, threads):
        return kernels.run_nothing(ctypes.c_int64(grid), ctypes.c_int64(threads))

    for threads in [1, 31, 32, 33, 1023, 1024]:
        assert run(3, threads) is None
    for grid in [0, -1, 2**31, 2**32, 2**32 + 1]:
        assert f"a launch with {grid} blocks; 1 to 2147483647 are possible" in run(grid, 32)
    for threads in [0, -1, 1025, 2**32 + 1]:
        assert f"a launch with {threads} threads a block; 1 to 1024 are possible" in run(1, threads)
    assert kernels.run_nothing_2d(7, 1) is None
    assert "one dimension" in kernels.run_nothing_2d(7, 2)


def test_launches_are_recorded(kernels):
    with kernels.control.record() as launches:
        tickets(kernels, 3, 70)
        tickets(kernels, 5, 7)
        kernels.run_nothing(ctypes.c_int64(0), ctypes.c_int64(32))  # not launched
    assert launches == [(3, 70), (5, 7)]
    with kernels.control.record() as launches:
        pass
    assert launches == []


# ---- CUDA's functions


def shuffled_lane(kind, lane, operand, width):
    """The lane whose value a shuffle gives, by the CUDA programming guide."""
    segment = lane // width * width
    if kind == "idx":
        return segment + operand % width  # outside of [0, width - 1]: modulo width
    if kind == "up":
        return lane - operand if lane - operand >= segment else lane
    if kind == "down":
        return lane + operand if lane + operand < segment + width else lane
    other = lane ^ operand  # earlier groups can be read, later ones cannot
    return other if other < segment + width else lane


@pytest.mark.parametrize("kind", ["idx", "up", "down", "xor"])
def test_shuffles_of_every_width(kernels, kind):
    number = ["idx", "up", "down", "xor"].index(kind)
    for i, (width, operand) in enumerate((w, o) for w in [1, 2, 4, 8, 16, 32] for o in range(32)):
        out = np.empty((2, 32), np.int32)
        with kernels.control.order(*ORDERS[i % 4]):
            assert kernels.run_shuffle_numbers(number, operand, width, ctypes.c_uint32(0xFFFFFFFF), out) is None
        expected = [shuffled_lane(kind, lane, operand, width) for lane in range(32)]
        assert out.tolist() == [expected, [32 + lane for lane in expected]], (width, operand)


@pytest.mark.parametrize(
    ("kind", "operand", "width", "expected"),
    [
        (0, 9, 8, [1] * 8 + [9] * 8 + [17] * 8 + [25] * 8),
        (0, -1, 32, [31] * 32),
        (1, 2, 8, [0, 1, 0, 1, 2, 3, 4, 5]),
        (2, 2, 8, [2, 3, 4, 5, 6, 7, 6, 7]),
        (2, 16, 32, [*range(16, 32), *range(16, 32)]),
        (3, 1, 32, [1, 0, 3, 2]),
        (3, 8, 8, [*range(0, 8), *range(0, 8), *range(16, 24), *range(16, 24)]),
    ],
)
def test_shuffles_written_out(kernels, kind, operand, width, expected):
    out = np.empty(64, np.int32)
    assert kernels.run_shuffle_numbers(kind, operand, width, ctypes.c_uint32(0xFFFFFFFF), out) is None
    assert out[: len(expected)].tolist() == expected


@pytest.mark.parametrize("mask", [0x1, 0x80000000, 0xFFFF, 0xF0F0F0F0, 0x7FFFFFFF])
def test_shuffles_of_part_of_a_warp(kernels, mask):
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    out = np.empty((2, 32), np.int32)
    assert kernels.run_shuffle_numbers(0, lanes[0], 32, ctypes.c_uint32(mask), out) is None
    assert out.tolist() == [[lanes[0] + first if lane in lanes else -1 for lane in range(32)] for first in (0, 32)]


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_shuffles_of_other_types_and_of_halves_in_turn(kernels, order, seed):
    out = np.empty((4, 32))
    with kernels.control.order(order, seed):
        assert kernels.run_shuffle_types(out) is None
    assert out[0].tolist() == [(lane + 4 if lane < 28 else lane) + 0.1 for lane in range(32)]
    assert out[1].tolist() == [2**40 + (lane - 4 if lane >= 4 else lane) for lane in range(32)]
    assert out[2].tolist() == [-0.5 * (lane ^ 3) for lane in range(32)]
    assert out[3].tolist() == [(lane ^ 19) + 100 * (lane ^ 17) + 10000 * (lane ^ 16) for lane in range(32)]


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0xFF00, 0x80000001])
def test_votes(kernels, mask):
    for predicates in [0, 0xFFFFFFFF, 0x00FF0100, 0x80000001, mask]:
        out = np.zeros((32, 3), np.uint32)
        assert kernels.run_votes(ctypes.c_uint32(mask), ctypes.c_uint32(predicates), out) is None
        ballot = mask & predicates
        for lane in range(32):
            expected = [ballot, ballot != 0, ballot == mask] if mask >> lane & 1 else [0, 0, 0]
            assert out[lane].tolist() == expected


@pytest.mark.parametrize("threads", [1, 33, 128])
def test_barriers_that_count(kernels, threads):
    for order, seed in ORDERS:
        for predicates in [np.zeros, np.ones, np.arange]:
            p = predicates(threads, dtype=np.int32)
            out = np.zeros((threads, 3), np.int32)
            with kernels.control.order(order, seed):
                assert kernels.run_block_votes(p, threads, out) is None
            assert out.tolist() == [[(p != 0).sum(), (p != 0).any(), (p != 0).all()]] * threads


def test_intrinsics(kernels):
    out = np.zeros(6, np.uint64)
    assert kernels.run_intrinsics(out) is None
    products = (2**32 - 2) * (2**32 - 3) >> 32, (2**64 - 2) * (2**64 - 3) >> 64
    index = 100 * 1 + 1000 * 1 + 10000 * 32
    assert out.tolist() == [*products, 0xBFC00000, 0x7FC12345, sum(products) % 2**64, index]


# ---- what the sanitizers catch


@pytest.fixture(scope="module")
def sanitized():
    if not build.has_sanitizers():
        pytest.skip("the compiler has no AddressSanitizer and UBSan")
    path = build.program("planted_bugs", [SOURCE], sanitize=True, extra_flags=["-DAEVB_PROGRAM"])
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")}

    def run(name, n, *which):
        """The exit status, what it wrote about each run, and what the sanitizers wrote."""
        command = [str(path), name, str(n), *which]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        about_ucontext = r"==\d+==WARNING: ASan doesn't fully support makecontext/swapcontext .*\n"
        return result.returncode, result.stdout.splitlines(), re.sub(about_ucontext, "", result.stderr)

    return run


@pytest.mark.parametrize(
    ("name", "n", "report"),
    [
        ("global_write_behind", 100, "AddressSanitizer: heap-buffer-overflow.*WRITE of size 4"),
        ("global_read_behind", 100, "AddressSanitizer: heap-buffer-overflow.*READ of size 4"),
        ("shared_write_behind", 32, r"index 32 out of bounds for type 'float \[32\]'"),  # by the array's name
        ("shared_write_before", 32, "AddressSanitizer: use-after-poison.*WRITE of size 4"),  # by a pointer
        ("shared_read_behind", 32, "AddressSanitizer: use-after-poison.*READ of size 4"),
        ("misaligned", 68, "runtime error: (store to|member access within) misaligned address .*float4"),
    ],
)
def test_sanitizers_report(sanitized, name, n, report):
    status, output, errors = sanitized(name, n, "right", "wrong")
    assert status != 0
    assert output == ["done, 0 NaN"]
    assert re.search(report, errors, re.DOTALL), errors
    assert f"{SOURCE.name}:" in errors  # the line


CAUGHT_BY_THE_SHIM = [name for name in ERRORS if not name.startswith("shared")]


@pytest.mark.parametrize("name", ["missing_second_barrier", "unwritten_shared", "exception", *CAUGHT_BY_THE_SHIM])
def test_sanitizers_are_content_with_fibers(sanitized, name):
    """Threads that wait, and those that are given up after an error."""
    status, output, errors = sanitized(name, MAX, "right", "wrong", "right")
    assert (status, errors) == (0, "")
    caught = name == "exception" or name in ERRORS
    wrong = "error, 0 NaN" if caught else f"done, {56 if name == 'unwritten_shared' else 0} NaN"
    assert output == ["done, 0 NaN", wrong, "done, 0 NaN"]
