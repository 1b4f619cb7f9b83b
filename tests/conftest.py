"""What the tests share: devices, dtypes, seeded numbers, and the one way in which results are held to the reference.

AEVB_CUDA_DRY=1 runs on CPU tensors what is marked `cuda`, so that the tests for a GPU can be tried without one;
AEVB_CUDA_DRY=20 only every 20th of those tests.
"""

import os
import signal
from collections.abc import Callable, Iterable

if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    # A worker's threads, and those of the processes that it starts, are its share of the cores: too many wait for each
    # other. Before torch is imported, which reads it.
    cores = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from torch import Tensor

from aevb import _C
from aevb.likelihoods import values as ranges

HAS_CUDA = torch.cuda.is_available() and _C.build_info()["cuda"].startswith("built")
DRY = int(os.environ.get("AEVB_CUDA_DRY") or 0)
GPU = "cpu" if DRY else "cuda"  # the device of the tests that are for a GPU alone
GPU_PARAM = [pytest.param(GPU, marks=pytest.mark.cuda)]
DEVICES = GPU_PARAM if DRY else ["cpu", *(GPU_PARAM if HAS_CUDA else [])]
HALF_DTYPES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF_DTYPES]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def functions_were_called_before(monkeypatch):
    """Whatever test is the first: a function's first call in a process is looked at."""
    monkeypatch.setattr(ranges, "_looked", {"bernoulli_log_prob", "gaussian_log_prob", "linear_bernoulli_log_prob"})


def pytest_collection_modifyitems(items):
    if DRY > 1:
        items[:] = items[::DRY]


def randn(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def rand(seed: int, *size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding float64 `x` to `dtype` may cost; nothing for float32, whose rounding is part of the tolerance."""
    if dtype == torch.float32:
        return torch.zeros_like(x)
    info = torch.finfo(dtype)
    binade = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1)
    return 0.5 * info.eps * binade.clamp_min(info.tiny)


def close_by_magnitude(actual: Tensor, expected: Tensor, magnitudes: Tensor, rtol: float = 1e-6) -> float:
    """Asserts |actual - expected| <= rtol * magnitudes, the sum of the magnitudes of the terms, or what rounding to a
    half-precision dtype costs more. Beyond the range of the dtype both must be the same inf; NaN must meet NaN.

    `expected` is float64. Magnitudes below float32's smallest normal count as that. Returns the worst relative error.
    """
    assert actual.shape == expected.shape
    assert expected.dtype == torch.float64
    actual, expected, magnitudes = (t.detach().cpu() for t in (actual, expected, magnitudes))
    stored = expected.to(actual.dtype)
    finite = stored.isfinite()
    torch.testing.assert_close(actual[~finite], stored[~finite], rtol=0, atol=0, equal_nan=True)
    error = (actual.double() - expected)[finite].abs()
    scale = magnitudes.double().abs().expand_as(expected)[finite].clamp_min(2.0**-126)
    excess = error - half_ulp(expected[finite], actual.dtype)
    worst = (excess / scale).nan_to_num(nan=float("inf")).max().item() if excess.numel() else 0.0
    assert worst <= rtol, f"relative error {worst:.3g} of the sum of magnitudes; allowed {rtol:.3g}"
    return worst


def check_every_isa(results: Callable[[], Iterable[Tensor]]) -> None:
    """Holds the results to the same bits on every instruction set, with one thread and with two."""
    before, found = (_C.cpu_isa(), torch.get_num_threads()), []
    try:
        for isa in _C.build_info()["isas"].split(", "):
            for threads in (1, 2):
                _C.set_cpu_isa(isa)
                torch.set_num_threads(threads)
                found.append(list(results()))
    finally:
        _C.set_cpu_isa(before[0])
        torch.set_num_threads(before[1])
    for others in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], others, strict=True))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True where a and b have the same shape, dtype and bits; any NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    a, b = (torch.where(t.isnan(), torch.full_like(t, float("nan")), t).contiguous() for t in (a, b))
    return torch.equal(a.view(integer), b.view(integer))
