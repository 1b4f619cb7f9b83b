"""`binarize`: the probabilities, whose noise it is, and what it refuses."""

import pytest
import torch
from conftest import rand

import aevb
from aevb import reference


def grey(n, dim, max_value, seed=0):
    return (rand(seed, n, dim) * (max_value + 1)).to(torch.uint8).clamp_max(max_value)


@pytest.mark.parametrize("max_value", [255, 254, 16, 1])
def test_a_pixel_is_set_with_its_grey_value_as_the_probability(max_value):
    images = torch.arange(max_value + 1, dtype=torch.uint8).expand(20_000, -1)
    mean = aevb.binarize(images, seed=7, max_value=max_value).double().mean(0)
    p = torch.arange(max_value + 1) / max_value
    assert mean[0] == 0
    assert mean[-1] == 1
    assert ((mean - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt()).all()


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (40, 784), (3, 1271), (0, 5), (4, 0)])
def test_is_the_references(size, device):
    for max_value in (255, 100, 16, 1):
        images = grey(*size, max_value).to(device)
        assert torch.equal(
            aevb.binarize(images, seed=2**40 + 3, max_value=max_value),
            reference.binarize(images, seed=2**40 + 3, max_value=max_value),
        )
    index = (torch.arange(2 * size[0]) * 3 % max(size[0], 1)).to(device)
    found = aevb.binarize(images, index, seed=-5, max_value=1)
    assert found.dtype == torch.bool
    assert torch.equal(found, reference.binarize(images, index, -5, 1))


def test_values_above_the_largest_are_set(device):
    images = torch.arange(256, dtype=torch.uint8, device=device).expand(3, -1)
    for max_value in (1, 2, 100, 254):
        found = aevb.binarize(images, seed=1, max_value=max_value)
        assert bool(found[:, max_value:].all())
        assert torch.equal(found, reference.binarize(images, seed=1, max_value=max_value))


def test_the_noise_belongs_to_the_image_and_the_seed():
    images = grey(50, 100, 255)
    whole = aevb.binarize(images, seed=1)
    index = torch.tensor([3, 49, 3])
    assert torch.equal(aevb.binarize(images, index, seed=1), whole[index])
    assert torch.equal(aevb.binarize(images, index, seed=torch.tensor(1)), whole[index])
    assert not torch.equal(aevb.binarize(images, seed=2), whole)
    # Neighbouring pixels and images are independent of each other.
    bits = aevb.binarize(torch.full((4000, 64), 128, dtype=torch.uint8), seed=3).double() - 0.5
    for a, b in ((bits[:, 1:], bits[:, :-1]), (bits[1:], bits[:-1])):
        assert abs(float((a * b).mean())) < 5 * 0.25 / a.numel() ** 0.5


def test_no_word_serves_the_normals_of_the_same_seed():
    """An image's bits and its z may have the same seed."""
    n = 20_000
    x = aevb.binarize(torch.full((n, 4), 128, dtype=torch.uint8), seed=7)
    eps = reference.normal(aevb.mix_seed(7, torch.arange(n)), (n, 4))
    square = eps.square().sum(-1)  # each word is in a radius, or in an angle
    for d in range(4):
        for statistic in (square, *eps.unbind(-1)):
            a, b = statistic[x[:, d]], statistic[~x[:, d]]
            assert abs(a.mean() - b.mean()) < 5 * (a.var() / len(a) + b.var() / len(b)).sqrt()


def test_views_of_images():
    images = grey(20, 48, 255)
    wide = torch.cat([images, images], 1)[:, :48]
    assert torch.equal(aevb.binarize(wide, seed=1), aevb.binarize(images, seed=1))
    shifted = torch.cat([images.new_zeros(1), images.flatten()])[1:].view(20, 48)
    assert torch.equal(aevb.binarize(shifted, seed=1), aevb.binarize(images, seed=1))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"images": torch.zeros(3, 4)}, r"images has shape \(3, 4\) and dtype float32; expected uint8 \(N, D\)"),
        ({"images": torch.zeros(3, dtype=torch.uint8)}, r"images has shape \(3,\)"),
        ({"index": torch.tensor([0, 3])}, r"index\[1\] is 3; expected 0 to 2, an image of 3"),
        ({"index": torch.tensor([-1])}, r"index\[0\] is -1"),
        ({"index": torch.tensor([0.0])}, "index has shape .* and dtype float32; expected int64"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, r"seed has shape \(3,\)"),
        ({"max_value": 0}, "max_value is 0; expected 1 to 255"),
        ({"max_value": 256}, "max_value is 256"),
        ({"seed": 2**63}, "seed is 9223372036854775808; expected a 64-bit"),
    ],
    ids=str,
)
def test_errors(change, match):
    args = {"images": torch.zeros(3, 4, dtype=torch.uint8), "index": None, "seed": 1}
    with pytest.raises((RuntimeError, ValueError), match=match):
        aevb.binarize(**{**args, **change})


def test_compiles():
    images, index = grey(9, 33, 255), torch.tensor([2, 5])

    def call(images, index, seed):
        return aevb.binarize(images, index, seed=seed).float() + 1

    seed = torch.tensor(5)
    assert torch.equal(torch.compile(call, fullgraph=True)(images, index, seed), call(images, index, seed))
    torch.library.opcheck(torch.ops.aevb.binarize, (images, index, seed, 255))
