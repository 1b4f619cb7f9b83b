"""The noise: which number is where, and whether the numbers are good."""

import numpy as np
import pytest
import torch
from conftest import same_bits
from scipy import stats

import aevb
from aevb import _C, reference

FULL = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123, kat_vectors, philox4x32 10
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([FULL] * 4, [FULL] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
EDGE_SEEDS = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, -(2**63), 2**63 - 1, 0x123456789ABCDEF]


def draw(seed, *size, device="cpu", num_samples=None):
    """Standard normals by the public op: z of mu = 0, logvar = 0."""
    zero = torch.zeros(size, device=device)
    return aevb.sample_gaussian(zero, zero, num_samples, seed=seed)[0]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert list(_C.philox(counter, key)) == expected
    words = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [w.item() for w in words] == expected


# ---- which number is where ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", EDGE_SEEDS)
def test_element_i_is_output_i_mod_4_of_counter_i_div_4(seed, device):
    n = 4001
    eps = draw(seed, n, device=device).cpu().double()
    for i in (0, 1, 2, 3, 4, 7, 255, 256, 257, 1023, 1026, n - 1):
        key = seed % 2**64
        word = _C.philox([i // 4, 0, 0, 0], [key & FULL, key >> 32])
        radius_word, angle_word = word[i % 4 // 2 * 2], word[i % 4 // 2 * 2 + 1]
        radius = np.sqrt(-2 * np.log((radius_word + 0.5) / 2**32))
        angle = 2 * np.pi * angle_word / 2**32
        assert eps[i].item() == pytest.approx(radius * (np.sin(angle) if i % 2 else np.cos(angle)), rel=1e-6, abs=1e-12)
    expected = reference.normal(seed, (n,))
    assert ((eps - expected).abs() <= 1e-6 * expected.abs() + 1e-12).all()


def test_relative_accuracy_of_many(device):
    n = 4_000_000
    expected = reference.normal(77, (n,))
    eps = draw(77, n, device=device).cpu().double()
    pairs = expected.view(-1, 2).square().sum(1).sqrt()
    assert pairs.min() < 2e-3  # tiny radii are among them
    assert pairs.max() > 5
    assert (eps - expected).abs().div_(expected.abs() + 1e-9).max() <= 1e-6


def test_blocks_do_not_depend_on_the_width_of_a_row(device):
    flat = draw(5, 1020, device=device)
    for shape in [(1020, 1), (340, 3), (51, 20), (17, 60), (2, 510), (4, 5, 51), (3, 4, 85, 1)]:
        assert same_bits(draw(5, *shape, device=device).flatten(), flat)
    assert same_bits(draw(5, 255, device=device), flat[:255])
    assert same_bits(draw(5, 51, 5, device=device, num_samples=4).flatten(), flat)


@pytest.mark.parametrize("block", [(1,), (3,), (41,), (7, 5), (257,), (2, 1271)])
@pytest.mark.parametrize("prefix", [(3,), (2, 3), (50,)])
def test_each_seed_numbers_its_own_block(block, prefix, device):
    count = int(np.prod(prefix))
    seeds = torch.tensor((EDGE_SEEDS * count)[:count]).reshape(prefix)  # some repeat next to each other or apart
    seeds.view(-1)[1:2] = seeds.view(-1)[0]
    z = draw(seeds.to(device), *prefix, *block, device=device)
    blocks = [draw(s, *block, device=device) for s in seeds.flatten().tolist()]
    assert same_bits(z, torch.stack(blocks).reshape(z.shape))
    expected = reference.normal(seeds, z.shape)
    assert ((z.cpu().double() - expected).abs() <= 1e-6 * expected.abs() + 1e-12).all()


def test_seeds_of_samples(device):
    seeds = torch.tensor([9, -4, 2**40], device=device)
    z = draw(seeds, 4, 5, device=device, num_samples=3)
    assert same_bits(z, torch.stack([draw(s, 4, 5, device=device) for s in seeds.tolist()]))
    seeds = aevb.mix_seed(seeds[:, None], torch.arange(4, device=device))
    z = draw(seeds, 4, 5, device=device, num_samples=3)
    assert same_bits(z, draw(seeds.flatten(), 12, 5, device=device).view(3, 4, 5))
    strided = torch.stack([seeds, seeds + 1], -1)[..., 0].t().contiguous().t()
    assert not strided.is_contiguous()
    assert same_bits(draw(strided, 4, 5, device=device, num_samples=3), z)


def test_same_seed_same_bits_and_other_seeds_differ(device):
    a = draw(42, 100, 20, device=device)
    assert same_bits(a, draw(42, 100, 20, device=device))
    assert same_bits(a, draw(torch.tensor(42, device=device), 100, 20, device=device))
    for other in (43, 42 + 2**32, -42, 42 - 2**63):
        assert (a == draw(other, 100, 20, device=device)).float().mean() < 1e-3


def test_generators_govern_the_noise(device):
    zero = torch.zeros(50, 7, device=device)
    sample = lambda **kw: aevb.sample_gaussian(zero, zero, **kw)[0]  # noqa: E731
    torch.manual_seed(3)
    a, b = sample(), sample()
    torch.manual_seed(3)
    assert same_bits(a, sample())
    assert same_bits(b, sample())
    assert not same_bits(a, b)
    one, two = (torch.Generator(device).manual_seed(3) for _ in range(2))
    assert same_bits(sample(generator=one), sample(generator=two))
    assert not same_bits(sample(generator=one), sample(generator=torch.Generator(device).manual_seed(4)))


# ---- mix_seed -------------------------------------------------------------------------------------------------------


def test_mix_seed_is_the_references():
    g = torch.Generator().manual_seed(0)
    seeds, index = (torch.randint(-(2**63), 2**63 - 1, (100_000,), generator=g) for _ in range(2))
    assert torch.equal(aevb.mix_seed(seeds, index), reference.mix_seed(seeds, index))
    edges = torch.tensor(EDGE_SEEDS)
    assert torch.equal(aevb.mix_seed(edges[:, None], edges), reference.mix_seed(edges[:, None], edges))
    low, high, _, _ = _C.philox([5, 0, 1, 0], [9, 0])
    assert aevb.mix_seed(9, 5).item() % 2**64 == low | high << 32


def test_mix_seed_broadcasts(device):
    seeds, index = torch.arange(3, device=device)[:, None], torch.arange(4, device=device)
    table = aevb.mix_seed(seeds, index)
    assert table.shape == (3, 4)
    assert table.dtype == torch.int64
    assert all(table[s, i] == aevb.mix_seed(s, i).item() for s in range(3) for i in range(4))
    assert torch.equal(aevb.mix_seed(2, index), table[2])
    assert torch.equal(aevb.mix_seed(seeds, 1), table[:, 1:2])
    assert torch.equal(aevb.mix_seed(seeds.expand(3, 4), index[::2].repeat_interleave(2)), table[:, [0, 0, 2, 2]])
    assert aevb.mix_seed(torch.zeros(0, dtype=torch.int64, device=device), index[:1]).shape == (0,)


def test_mix_seed_has_no_collisions():
    table = aevb.mix_seed(torch.arange(1000)[:, None], torch.arange(1000))
    assert table.unique().numel() == 1_000_000
    assert not torch.isin(torch.arange(1000), table).any()


# ---- quality: 10^7 draws, one seed ----------------------------------------------------------------------------------

ROWS, WIDTH = 10_000, 1_000


@pytest.fixture(scope="module")
def draws():
    return draw(20131220, ROWS, WIDTH).numpy()


def z_score_of_mean(values, mean, variance):
    return (values.mean(dtype=np.float64) - mean) * np.sqrt(values.size / variance)


def test_kolmogorov_smirnov(draws):
    assert stats.kstest(draws.ravel(), "norm", method="asymp").pvalue > 1e-3


@pytest.mark.parametrize("order", range(1, 7))
def test_moments(draws, order):
    moment = lambda k: float(np.prod(range(1, k, 2))) if k % 2 == 0 else 0.0  # noqa: E731  (k - 1)!!
    power = draws.astype(np.float64) ** order
    assert abs(z_score_of_mean(power, moment(order), moment(2 * order) - moment(order) ** 2)) < 4


@pytest.mark.parametrize("sigma", [4, 5])
@pytest.mark.parametrize("side", [-1, 1])
def test_tail_counts(draws, sigma, side):
    count, expected = int((side * draws > sigma).sum()), draws.size * stats.norm.sf(sigma)
    assert stats.poisson.cdf(count, expected) > 1e-3
    assert stats.poisson.sf(count - 1, expected) > 1e-3


def test_the_largest_are_as_far_out_as_they_should_be(draws):
    largest = np.abs(draws).max()
    assert 0.001 < np.exp(-2 * draws.size * stats.norm.sf(largest)) < 0.999  # the chance of none beyond it
    assert largest > 5


def test_no_quadrant_or_output_is_preferred(draws):
    quads = draws.reshape(-1, 4)
    for output in range(4):
        assert abs(z_score_of_mean(np.sign(quads[:, output]), 0, 1)) < 4
        assert abs(z_score_of_mean(quads[:, output], 0, 1)) < 4
        assert abs(z_score_of_mean(quads[:, output].astype(np.float64) ** 2, 1, 2)) < 4
    angles = np.arctan2(quads[:, 1::2], quads[:, ::2]).ravel()
    assert stats.kstest(angles[::5] / (2 * np.pi) + 0.5, "uniform", method="asymp").pvalue > 1e-3


def uncorrelated(a, b):
    """Asserts that a and b, standard normals, and their squares, have no correlation beyond 4.5 sigma."""
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    assert abs(z_score_of_mean(a * b, 0, 1)) < 4.5
    assert abs(z_score_of_mean((a * a - 1) * (b * b - 1), 0, 4)) < 4.5


@pytest.mark.parametrize("lag", range(1, 9))
def test_no_serial_correlation_within_a_row(draws, lag):
    uncorrelated(draws[:, lag:], draws[:, :-lag])


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_no_correlation_across_rows(draws, lag):
    uncorrelated(draws[lag:], draws[:-lag])


@pytest.mark.parametrize("seed", [0, 123456, 2**32 - 500, -500])
def test_no_correlation_across_consecutive_seeds(seed):
    z = draw(torch.arange(seed, seed + 1000), 1000, 1000)
    uncorrelated(z[1:], z[:-1])


def test_no_correlation_across_outputs_of_mix_seed():
    here = draw(aevb.mix_seed(7, torch.arange(1001)), 1001, 1000)
    next_seed = draw(aevb.mix_seed(8, torch.arange(1001)), 1001, 1000)
    uncorrelated(here[1:], here[:-1])  # (s, i) with (s, i + 1)
    uncorrelated(here, next_seed)  # (s, i) with (s + 1, i)
    uncorrelated(here[1:], next_seed[:-1])
    uncorrelated(here, draw(7, 1001, 1000))  # and with the noise of s itself
    assert stats.kstest(here.numpy().ravel(), "norm", method="asymp").pvalue > 1e-3


def test_first_numbers_of_mixed_seeds_are_normal():
    z = draw(aevb.mix_seed(3, torch.arange(1_000_000)), 1_000_000, 2).numpy()
    for column in z.T:
        assert stats.kstest(column, "norm", method="asymp").pvalue > 1e-3
        uncorrelated(column[1:], column[:-1])
    uncorrelated(z[:, 0], z[:, 1])
