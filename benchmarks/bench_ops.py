"""`pytest benchmarks`: forward and backward of each op, by each provider, grouped by the work."""

from __future__ import annotations

import functools

import pytest
import torch

from . import cases
from .measure import has_jax, providers

if has_jax():
    from . import jax_peers  # noqa: F401  it adds itself to cases.py


@functools.lru_cache(maxsize=1)
def case(work: cases.Work) -> cases.Case:
    return cases.Case(work)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(cases.THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(max_time=0.5)
@pytest.mark.parametrize(
    ("work", "name"),
    [(work, name) for work in cases.WORK for name in providers()],
    ids=str,
)
def test_forward_backward(benchmark, work, name):
    provider = case(work).provider(name)  # checked against the reference here
    benchmark.group = work.name
    benchmark.extra_info["settings"] = provider.settings
    benchmark(provider.call)
