"""The CUDA kernels, compiled for the CPU by tests/emulation, against the CPU kernels: bit for bit."""

import pytest
import torch
from conftest import randn, same_bits
from emulation.build import SANITIZED, emulated_control, emulated_ops
from kernel_cases import SEED, cases


def run(ops, case):
    results = getattr(ops, case.op).default(*case.args)
    return results if isinstance(results, tuple) else (results,)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The calls are small: on a busy machine, waiting for each other costs threads more than all the rest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def every_case():
    return list(cases())


def differing(every_case, gpus=(132,)):
    """The cases whose results on the emulated kernels are not those of the CPU kernels."""
    wrong = []
    for case in every_case:
        expected = run(torch.ops.aevb, case)
        for size in gpus:
            with emulated_control().multiprocessors(size):
                if not all(map(same_bits, run(emulated_ops(), case), expected)):
                    wrong.append(f"{case}, {size} multiprocessors")
    return wrong


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_same_bits(order, every_case):
    """In every order of threads and blocks, and as work is cut for a small GPU and a large one."""
    assert len(every_case) > 7000
    if SANITIZED:  # ten times slower; what an order may change is seen without
        every_case = every_case[:: 3 if order == "forward" else 31]
    with emulated_control().order(order, seed=7):
        assert differing(every_case, (1, 132) if order == "forward" else (132,)) == []


def test_the_comparison_can_fail():
    """Kernels under another seed give other bits."""
    mu, logvar = randn(1, 7, 20), randn(2, 7, 20)
    here, there = (
        ops.sample_gaussian_forward(mu, logvar, torch.tensor(seed), None)
        for ops, seed in ((torch.ops.aevb, SEED), (emulated_ops(), SEED + 1))
    )
    assert not same_bits(here[0], there[0])
    assert same_bits(here[1], there[1])


def test_long_rows_are_shared_between_blocks():
    x, logits = torch.rand(1, 1_000_000), randn(3, 1, 1_000_000)
    with emulated_control().record() as launches:
        emulated_ops().log_prob_forward(logits, x, None, None, None, "bernoulli_logits", 0.0, None)
    assert launches[0].grid * launches[0].threads >= 10_000
    with emulated_control().record() as launches:
        emulated_ops().sample_gaussian_forward(logits, logits, torch.tensor(1), None)
    assert launches[0].grid >= 400


def test_short_rows_take_one_launch_each():
    """Sums are joined in a second launch only where rows are long."""
    logits, x = randn(4, 100, 784), torch.rand(100, 784)
    mu, logvar = randn(5, 100, 20), randn(6, 100, 20)
    with emulated_control().record() as launches:
        emulated_ops().log_prob_forward(logits, x, None, None, None, "bernoulli_logits", 0.0, None)
        emulated_ops().sample_gaussian_forward(mu, logvar, torch.tensor(1), 5)
        emulated_ops().sample_gaussian_log_ratio_forward(mu, logvar, torch.tensor(1), 5, 0)
    assert len(launches) == 3
    with emulated_control().record() as launches:
        emulated_ops().negative_elbo_forward(logits, x, mu, logvar, None, 1.0, 1, "bernoulli_logits", None)
    assert len(launches) == 3


def test_many_samples_are_shared_between_blocks():
    mu, logvar = randn(7, 20, 20), randn(8, 20, 20)
    args = (mu, logvar, torch.tensor(SEED), 5000)
    with emulated_control().record() as launches:
        z, kl = emulated_ops().sample_gaussian_forward(*args)
    assert launches[0].grid >= 400
    assert all(map(same_bits, (z, kl), torch.ops.aevb.sample_gaussian_forward(*args)))


@pytest.mark.parametrize("batch", [1, 20, 100])
def test_many_log_ratios_are_shared_between_blocks(batch):
    """And of very few datapoints between the threads of a block."""
    mu, logvar = randn(9, batch, 20), randn(10, batch, 20)
    args = (mu, logvar, torch.tensor(SEED), 5000, 0)
    with emulated_control().record() as launches:
        found = emulated_ops().sample_gaussian_log_ratio_forward(*args)
    assert len(launches) == 1
    assert launches[0].grid >= 25
    assert 5000 * batch * 20 / launches[0].grid <= 50 * launches[0].threads  # elements of a block
    assert all(map(same_bits, found, torch.ops.aevb.sample_gaussian_log_ratio_forward(*args)))
