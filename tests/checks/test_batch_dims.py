"""Which dimensions are the batch: said with batch_dims, else said once; and a KL that is not one number a datapoint."""

import re
import warnings

import pytest
import torch
from conftest import rand, randn, same_bits

import aevb
from aevb import reference
from aevb.checks import batch_dims

ESTIMATORS = [("sgvb-b", None), ("sgvb-b", 3), ("sgvb-a", 3), ("stl", None), ("iwae", 3), ("dreg", 3)]
MU, LOGVAR, X, LOGITS = randn(1, 2, 3, 8, 4), 0.3 * randn(2, 2, 3, 8, 4), rand(3, 2, 3, 8, 8), randn(4, 2, 3, 8, 8)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(batch_dims, "_said", set())


def flat(t, batch_dims=1):
    return t.flatten(batch_dims)


@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3])
def test_ops(batch_dims):
    for t in (MU, LOGVAR):
        t.requires_grad_()
    mu, logvar = flat(MU, batch_dims), flat(LOGVAR, batch_dims)
    kl = aevb.gaussian_kl(MU, LOGVAR, batch_dims=batch_dims)
    assert kl.shape == MU.shape[:batch_dims]
    assert same_bits(kl, aevb.gaussian_kl(mu, logvar, batch_dims=batch_dims))
    torch.testing.assert_close(kl.double(), reference.gaussian_kl(MU.double(), LOGVAR.double(), batch_dims=batch_dims))
    for L in (None, 3):
        for sample in (aevb.sample_gaussian, aevb.sample_gaussian_log_ratio):
            z, found = sample(MU, LOGVAR, L, batch_dims=batch_dims, seed=5)
            wanted = sample(mu, logvar, L, batch_dims=batch_dims, seed=5)
            assert z.shape == (*([] if L is None else [L]), *MU.shape)
            assert same_bits(z.flatten(z.dim() - 4 + batch_dims), wanted[0])
            assert same_bits(found, wanted[1])
            g, h = randn(6, *z.shape), randn(7, *found.shape)
            for a, b in zip(
                torch.autograd.grad((z, found), (MU, LOGVAR), (g, h)),
                torch.autograd.grad(wanted, (MU, LOGVAR), (g.view_as(wanted[0]), h)),
                strict=True,
            ):
                assert same_bits(a, b)
            eps = reference.normal(5, tuple(z.shape))
            twin = getattr(reference, sample.__name__)
            for a, b in zip((z, found), twin(MU, LOGVAR, L, batch_dims=batch_dims, eps=eps), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_groups_of_all_latent_dimensions():
    kl = aevb.gaussian_kl(MU, LOGVAR, 6, batch_dims=1)
    assert same_bits(kl, aevb.gaussian_kl(flat(MU), flat(LOGVAR), 6))
    assert kl.shape == (2, 6)


def test_the_noise_is_that_without_batch_dims():
    seeds = torch.tensor([3, 4])
    with pytest.warns(UserWarning, match="48 datapoints"):
        z, _ = aevb.sample_gaussian(MU, LOGVAR, seed=seeds)
    assert same_bits(z, aevb.sample_gaussian(MU, LOGVAR, batch_dims=1, seed=seeds)[0])
    channels_last = MU.contiguous(memory_format=torch.channels_last)
    assert same_bits(z, aevb.sample_gaussian(channels_last, LOGVAR, batch_dims=1, seed=seeds)[0])


@pytest.mark.parametrize(("estimator", "num_samples"), ESTIMATORS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_loss(reduction, estimator, num_samples):
    options = {"reduction": reduction, "estimator": estimator, "num_samples": num_samples, "batch_dims": 1}
    found, flat_found = [], []
    for mu, logvar, results in ((MU, LOGVAR, found), (flat(MU), flat(LOGVAR), flat_found)):
        mu, logvar = (t.detach().requires_grad_() for t in (mu, logvar))
        criterion = aevb.FusedELBO(**options)
        z, kl = criterion.sample(mu, logvar, seed=3)
        assert z.shape[z.dim() - mu.dim() :] == mu.shape
        z = z.reshape(*z.shape[: z.dim() - mu.dim()], 2, 96)
        logits = 2 * torch.cat([z, -z], -1).unflatten(-1, (3, 8, 8))
        loss = criterion(logits, X, kl=kl)
        results += [loss, *torch.autograd.grad(loss.sum(), (mu, logvar))]
        if estimator == "sgvb-b":
            results.append(criterion(logits.detach(), X, mu, logvar))
    for a, b in zip(found, flat_found, strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-5, atol=1e-4)
    assert found[0].shape == ((2,) if reduction == "none" else ())


def test_the_loss_is_of_two_datapoints_and_not_of_48():
    loss = aevb.FusedELBO(batch_dims=1)(LOGITS, X, MU, LOGVAR)
    by_hand = -aevb.bernoulli_log_prob(LOGITS.flatten(1), X.flatten(1)) + aevb.gaussian_kl(flat(MU), flat(LOGVAR))
    torch.testing.assert_close(loss, by_hand.mean())
    reference_loss = reference.FusedELBO(batch_dims=1)(LOGITS, X, MU, LOGVAR)
    torch.testing.assert_close(loss, reference_loss)
    with pytest.warns(UserWarning, match="read mu of shape"):
        of_48 = aevb.FusedELBO()(LOGITS, X, MU, LOGVAR)
    torch.testing.assert_close(of_48, by_hand.sum() / 48)


def test_free_bits_of_all_latent_dimensions():
    criterion = aevb.FusedELBO(free_bits=0.2, groups=4, batch_dims=1)
    z, kl = criterion.sample(MU, LOGVAR, seed=1)
    assert kl.shape == (2, 4)
    torch.testing.assert_close(criterion(LOGITS, X, kl=kl), criterion(LOGITS, X, MU, LOGVAR))
    assert z.shape == MU.shape


# ---- what is said ---------------------------------------------------------------------------------------------------

READERS = {
    "sample_gaussian": lambda: aevb.sample_gaussian(MU, LOGVAR),
    "sample_gaussian_log_ratio": lambda: aevb.sample_gaussian_log_ratio(MU, LOGVAR),
    "gaussian_kl": lambda: aevb.gaussian_kl(MU, LOGVAR),
    "FusedELBO": lambda: aevb.FusedELBO()(LOGITS, X, MU, LOGVAR),
    "FusedELBO, sample": lambda: aevb.FusedELBO().sample(MU, LOGVAR),
    "FusedELBO, sample, free bits": lambda: aevb.FusedELBO(free_bits=0.1).sample(MU, LOGVAR),
}


@pytest.mark.parametrize("reader", READERS)
def test_more_than_two_dimensions_are_said_once(reader):
    with pytest.warns(UserWarning, match="read mu of shape") as said:
        READERS[reader]()
    (warning,) = said
    assert str(warning.message).startswith(
        f"{reader.partition(',')[0]} read mu of shape (2, 3, 8, 4) as 48 datapoints of 4 latent dimensions"
    )
    assert "batch_dims=3 says that this is meant; batch_dims=1 means 2 datapoints of 96" in str(warning.message)
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        READERS[reader]()


def test_nothing_is_said_where_it_is_clear():
    mu, logvar = MU.flatten(0, 2), LOGVAR.flatten(0, 2)
    x, logits = X.flatten(0, 2), LOGITS.flatten(0, 2)
    model = aevb.VAE(8, 5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch_dims in (None, 1):
            aevb.FusedELBO(batch_dims=batch_dims)(logits, x, mu, logvar)
            aevb.sample_gaussian(mu, logvar, batch_dims=batch_dims)
            aevb.gaussian_kl(mu, logvar, batch_dims=batch_dims)
        aevb.sample_gaussian(MU, LOGVAR, batch_dims=3)
        model(X)  # whose last dimension is the datapoint
        torch.func.vmap(lambda m, v: aevb.gaussian_kl(m, v))(MU, LOGVAR)
        torch.compile(aevb.gaussian_kl, fullgraph=True, backend="aot_eager")(MU, LOGVAR)


def test_a_batch_without_a_latent_dimension_is_said():
    with pytest.warns(UserWarning, match=r"as one datapoint of 5 latent dimensions.*mu\.unsqueeze\(-1\)") as said:
        aevb.FusedELBO()(randn(1, 5, 7), rand(2, 5, 7), randn(3, 5), randn(4, 5))
    assert said[0].filename == __file__
    batch_dims._said.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aevb.FusedELBO()(randn(1, 35), rand(2, 35), randn(3, 5), randn(4, 5))
        aevb.FusedELBO(batch_dims=0)(randn(1, 5, 7), rand(2, 5, 7), randn(3, 5), randn(4, 5))


# ---- a KL of the whole batch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduced", [torch.mean, torch.sum])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["logits", "linear", "gaussian", "probabilities"])
def test_a_kl_of_the_whole_batch(kind, reduction, reduced):
    mu, logvar, x = randn(1, 6, 4), randn(2, 6, 4), rand(3, 6, 9)
    _, kl = aevb.sample_gaussian(mu, logvar)
    options = {"from_probs": True} if kind == "probabilities" else {}
    options |= {"likelihood": "gaussian"} if kind == "gaussian" else {}
    recon = rand(4, 6, 9) if kind == "probabilities" else randn(4, 6, 9)
    if kind == "linear":
        recon = aevb.LinearLogits(randn(4, 6, 5), randn(5, 9, 5))
    criterion = aevb.FusedELBO(reduction=reduction, **options)
    criterion(recon, x, kl=kl)
    with pytest.raises(ValueError, match="kl is 0-d, which makes all of x one datapoint; expected one number for each"):
        criterion(recon, x, kl=reduced(kl))
    with pytest.raises(ValueError, match="kl is 0-d"):
        torch.compile(criterion, backend="aot_eager")(recon, x, kl=reduced(kl))


def test_a_single_datapoint():
    mu, logvar, x, logits = randn(1, 4), randn(2, 4), rand(3, 9), randn(4, 9)
    criterion = aevb.FusedELBO(batch_dims=0)
    _, kl = criterion.sample(mu, logvar, seed=1)
    assert kl.shape == ()
    by_hand = aevb.gaussian_kl(mu, logvar) - aevb.bernoulli_log_prob(logits, x)
    torch.testing.assert_close(criterion(logits, x, kl=kl), by_hand)
    torch.testing.assert_close(criterion(logits, x, mu, logvar), by_hand)
    many = aevb.FusedELBO(batch_dims=0, estimator="iwae", num_samples=3)
    _, ratio = many.sample(mu, logvar, seed=1)
    assert ratio.shape == (3,)
    of_batch = aevb.FusedELBO(estimator="iwae", num_samples=3)
    L = logits.expand(3, 9)
    torch.testing.assert_close(many(L, x, kl=ratio), of_batch(L.unsqueeze(1), x[None], kl=ratio[:, None]))


@pytest.mark.parametrize(("estimator", "num_samples"), [("sgvb-b", None), ("iwae", 3)])
def test_in_torch_func_a_datapoint_is_one(estimator, num_samples):
    mu, logvar, x = randn(1, 6, 4), randn(2, 6, 4), rand(3, 6, 9)
    recon = randn(4, 6, *([] if num_samples is None else [num_samples]), 9)
    criterion = aevb.FusedELBO(estimator=estimator, num_samples=num_samples)

    def loss(recon, x, mu, logvar):
        _, kl = criterion.sample(mu, logvar, seed=3)
        return criterion(recon, x, kl=kl)

    found = torch.func.vmap(loss, randomness="same")(recon, x, mu, logvar)
    single = aevb.FusedELBO(estimator=estimator, num_samples=num_samples, batch_dims=0)
    for i in range(6):
        _, kl = single.sample(mu[i], logvar[i], seed=3)
        torch.testing.assert_close(found[i], single(recon[i], x[i], kl=kl))


# ---- what cannot be -------------------------------------------------------------------------------------------------


def test_bad_batch_dims():
    for bad in (-1, 1.5, True, "x"):
        with pytest.raises(ValueError, match=rf"batch_dims is {re.escape(repr(bad))}; expected (how many|a whole)"):
            aevb.FusedELBO(batch_dims=bad)
        with pytest.raises(ValueError, match="batch_dims is"):
            aevb.sample_gaussian(MU, LOGVAR, batch_dims=bad)
    for call in (aevb.sample_gaussian, aevb.sample_gaussian_log_ratio, aevb.gaussian_kl):
        with pytest.raises(ValueError, match=r"batch_dims is 4; expected \(\*batch, \*latent\): at least 5 dimensions"):
            call(MU, LOGVAR, batch_dims=4)
        with pytest.raises(ValueError, match=r"mu has shape \(2, 3, 8, 4\) and logvar \(2, 4, 8, 3\)"):
            call(MU, LOGVAR.transpose(1, 3), batch_dims=1)
    with pytest.raises(ValueError, match=r"kl has shape \(2, 3\) and batch_dims is 1; expected one number for each"):
        aevb.FusedELBO(batch_dims=1)(LOGITS, X, kl=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"seed has shape \(2, 3\) and batch_dims is 1; expected \(\) or \(\*batch,\)"):
        aevb.sample_gaussian(MU, LOGVAR, batch_dims=1, seed=torch.zeros(2, 3, dtype=torch.int64))
    assert "batch_dims=1" in repr(aevb.FusedELBO(batch_dims=1))
