"""Plain-PyTorch twins of the fused ops and of `FusedELBO`.

They are the oracle of the tests, and the path for float64 and second derivatives. Each takes the arguments of its fused
twin, with fewer checks. Log-likelihoods, KL divergences and samples are computed in float32, or in float64 for float64
inputs.

Noise comes from `seed` through this module's own Philox, written in tensor arithmetic, or from an explicit `eps`. So
`sample_gaussian(mu, logvar, eps=torch.randn_like(mu))` is the usual reparameterisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bounds
from .checks.batch_dims import datapoints, latents, samples_of, shaped
from .checks.choices import ACTIVATIONS, ESTIMATORS, GRADIENTS, REDUCTIONS, unknown
from .checks.priors import Prior, Range, check_own_parameters, checked_prior, checked_range, clamped, rows_of
from .checks.seeds import Generators, check_generators, int64
from .likelihoods import Bernoulli, Gaussian, Likelihood, named
from .likelihoods.base import Formula, Parameter
from .likelihoods.base import computed as _compute
from .likelihoods.target import Target, target_of

_WORD = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Returns the four output words of Philox4x32-10 (Salmon et al. 2011).

    Args:
        counter: Four counter words: int64 tensors that hold 32-bit words.
        key: Two key words, likewise.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # modulo 2^64: same bits as the unsigned product
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _WORD, p1 & _WORD, ((p0 >> 32) ^ c3 ^ k1) & _WORD, p0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return [c0, c1, c2, c3]


def _words(x: Tensor) -> list[Tensor]:
    return [x & _WORD, (x >> 32) & _WORD]


def normal(seed: Tensor | int, size: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns standard normals of shape `size`, a function of `seed`.

    Element i of a seed's block is output i % 4 of counter i // 4; outputs (0, 1) and (2, 3) are Box-Muller pairs.

    Args:
        seed: An int, or an int64 tensor whose shape is a prefix of `size`.
        size: Shape of the result.
        dtype: Its dtype; the arithmetic is float64.
    """
    seed = int64(seed, "seed")
    n = math.prod(size[seed.dim() :])
    index = torch.arange((n + 3) // 4, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(index)
    word = philox([*_words(index), zero, zero], [k.unsqueeze(-1) for k in _words(seed)])
    pairs = []
    for radius_word, angle_word in (word[:2], word[2:]):
        radius = torch.sqrt(-2.0 * torch.log((radius_word.double() + 0.5) * 2.0**-32))
        angle = angle_word.double() * (2.0 * math.pi * 2.0**-32)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    eps = torch.stack(pairs, -1).flatten(-2)[..., :n]
    return eps.reshape(size).to(dtype)


def mix_seed(seed: Tensor | int, index: Tensor | int) -> Tensor:
    """Plain-PyTorch twin of `aevb.mix_seed`.

    The result holds the first two Philox words of counter (index, 1, 0) under the key `seed`, as an int64.
    """
    device = next((t.device for t in (index, seed) if isinstance(t, Tensor)), None)
    keys, counters = torch.broadcast_tensors(int64(seed, "seed", device), int64(index, "index", device))
    zero = torch.zeros_like(counters)
    low, high, _, _ = philox([*_words(counters), zero + 1, zero], _words(keys))
    return low | (high << 32)


def binarize(images: Tensor, index: Tensor | None = None, seed: Tensor | int = 0, max_value: int = 255) -> Tensor:
    """Plain-PyTorch twin of `aevb.binarize`.

    Bit d is set where word d % 4 of counter (d // 4, 2) is below value * floor(2^32 / max_value). It is always set for
    values from max_value up. The key is ``mix_seed(seed, index)``.
    """
    index = torch.arange(images.shape[0], device=images.device) if index is None else index
    pixels = images[index].long()
    counter = torch.arange((pixels.shape[1] + 3) // 4, device=images.device)
    zero = torch.zeros_like(counter)
    keys = [k.unsqueeze(-1) for k in _words(mix_seed(seed, index))]
    words = torch.stack(philox([*_words(counter), zero + 2, zero], keys), -1).flatten(-2)[..., : pixels.shape[1]]
    return (words < pixels * (2**32 // max_value)) | (pixels >= max_value)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", x_scale: float | None = None
) -> Tensor:
    """Plain-PyTorch twin of `aevb.linear`."""
    x = x if x.is_floating_point() else x.to(weight.dtype)
    out = F.linear(x if x_scale is None else x * x_scale, weight, bias)
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    return out if activation == "none" else torch.tanh(out) if activation == "tanh" else torch.relu(out)


def _noise(mu: Tensor, num_samples: int | None, seed: Tensor | int | None, generator: Generators | None) -> Tensor:
    """Returns standard normals for samples of mu, in its dtype."""
    size = mu.shape if num_samples is None else (num_samples, *mu.shape)
    if seed is None and isinstance(generator, Sequence):
        check_generators(generator, mu)
        each = size[: len(size) - mu.dim()] + mu.shape[1:]
        noise = [torch.randn(each, dtype=mu.dtype, device=mu.device, generator=g) for g in generator]
        return torch.stack(noise, len(size) - mu.dim())
    if seed is None:
        assert not isinstance(generator, Sequence)
        return torch.randn(size, dtype=mu.dtype, device=mu.device, generator=generator)
    return normal(int64(seed, "seed", mu.device).to(mu.device), size, mu.dtype)


def sample_gaussian(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    prior: Prior | None = None,
    logvar_range: Range | None = None,
    batch_dims: int | None = None,
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain-PyTorch twin of `aevb.sample_gaussian`.

    `eps`, of z's shape, takes the place of noise from a seed or generator.
    """
    m, v = _compute(mu), clamped(_compute(logvar), logvar_range)
    z = m + torch.exp(0.5 * v) * (_noise(m, num_samples, seed, generator) if eps is None else eps.to(m.dtype))
    kl = gaussian_kl(mu, logvar, prior=prior, logvar_range=logvar_range, batch_dims=batch_dims)
    return z.to(mu.dtype), kl


def sample_gaussian_log_ratio(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    gradient: str = "total",
    prior: Prior | None = None,
    logvar_range: Range | None = None,
    batch_dims: int | None = None,
    seed: Tensor | int | None = None,
    generator: Generators | None = None,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain-PyTorch twin of `aevb.sample_gaussian_log_ratio`.

    The log-ratio is ``log N(z; mu, exp(logvar)) - log N(z; 0, I)``, or of another prior. `eps`, of z's shape, takes the
    place of noise from a seed or generator.
    """
    if prior is not None and gradient == "doubly_reparameterized":
        check_own_parameters(prior, 1 if batch_dims is None else mu.dim() - batch_dims)
    eps = _noise(_compute(mu), num_samples, seed, generator) if eps is None else eps
    return log_ratio_of(mu, logvar, eps, gradient, prior, logvar_range, batch_dims)


def log_ratio_of(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor,
    gradient: str,
    prior: Prior | None,
    logvar_range: Range | None,
    batch_dims: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_gaussian_log_ratio` of given noise, whatever the prior was computed from."""
    m, v = _latents(_compute(mu), clamped(_compute(logvar), logvar_range), batch_dims)
    eps = eps.to(m.dtype)
    if m.dim() < mu.dim():
        eps = eps.reshape(*eps.shape[: eps.dim() - mu.dim()], *m.shape)
    z = m + torch.exp(0.5 * v) * eps
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    if gradient == "total":
        two_log_q = -(eps * eps) - v
    else:  # mu and logvar are constants in log q(z), but not in z
        v_q = v.detach()
        eps_q = eps + (z - z.detach()) * torch.exp(-0.5 * v_q)  # (z - mu) / sd without rounding
        two_log_q = -(eps_q * eps_q) - v_q
    rows = None if prior is None else _prior_rows(prior, mu, batch_dims)
    if gradient != "doubly_reparameterized":
        log_ratio = 0.5 * (two_log_q + (z * z if rows is None else _two_neg_log_prior(m, v, eps, rows))).sum(-1)
    else:  # the prior's own gradient is that of log p(z), and is not weighed
        of_z, of_prior = z * z, None
        if rows is not None:
            of_z = _two_neg_log_prior(m, v, eps, tuple(t.detach() for t in rows))
            of_prior = 0.5 * _two_neg_log_prior(m.detach(), v.detach(), eps, rows).sum(-1)
        log_ratio = 0.5 * (two_log_q + of_z).sum(-1)
        z, log_ratio = _DoublyReparameterized.apply(z, log_ratio, of_prior)
    return shaped(z, mu, m).to(mu.dtype), log_ratio


def _latents(mu: Tensor, logvar: Tensor, batch_dims: int | None) -> tuple[Tensor, Tensor]:
    return (mu, logvar) if batch_dims is None else latents(mu, logvar, batch_dims)


def _prior_rows(prior: Prior, mu: Tensor, batch_dims: int | None) -> Prior:
    """Returns the prior's mean and logvar in mu's dtype of computation: (D,), or (*batch, D)."""
    dtype = _compute(mu).dtype
    mean, logvar = (
        rows_of(name, t.to(dtype), mu, batch_dims)
        for name, t in zip(("prior_mu", "prior_logvar"), checked_prior(prior, "reference"), strict=True)
    )
    return mean, logvar


def _per_sd(x: Tensor, logvar: Tensor) -> Tensor:
    """Returns x exp(-logvar / 2), which is 0 where x is."""
    return x * torch.exp((-0.5 * logvar).clamp_max(math.log(torch.finfo(x.dtype).max)))


def _two_neg_log_prior(mu: Tensor, logvar: Tensor, eps: Tensor, prior: Sequence[Tensor]) -> Tensor:
    """Returns -2 log p(z) of each dimension, without the constant, for z = mu + exp(logvar / 2) eps."""
    mean, prior_logvar = prior
    return (_per_sd(mu - mean, prior_logvar) + torch.exp(0.5 * (logvar - prior_logvar)) * eps).square() + prior_logvar


def sample_weights(grad: Tensor) -> Tensor:
    """Returns weights, (L, ...), that sum to 1 over the samples.

    Args:
        grad: (L, ...), a multiple of the weights. Where its sum over the samples is 0, the weights are 0.
    """
    total = grad.sum(0, keepdim=True)
    return torch.where(total == 0, 0.0, grad / total)


class _DoublyReparameterized(torch.autograd.Function):
    """Identity that weighs each sample's gradient by its log_ratio's upstream gradient.

    The weights are normalised over the samples (Tucker et al. 2018). `of_prior`, the log_ratio as a function of the
    prior alone, or None, gets the upstream gradient as it is.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z, log_ratio, of_prior):
        return z.view_as(z), log_ratio.view_as(log_ratio)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad_z, grad_log_ratio):
        weight = sample_weights(grad_log_ratio)
        of_q = _Final.apply(weight.unsqueeze(-1) * grad_z, weight * grad_log_ratio)
        return *of_q, grad_log_ratio if ctx.needs_input_grad[2] else None


class _Final(torch.autograd.Function):
    """Identity on a gradient that refuses to be differentiated.

    A doubly reparameterized gradient is an estimate and not the gradient of a function: its derivative would be wrong.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a.view_as(a), b.view_as(b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "the doubly reparameterized gradient has no derivatives by mu and logvar: it is an estimate, with weights "
            "put into it; gradient='total' (estimator 'iwae') has them"
        )


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    groups: int | None = None,
    *,
    prior: Prior | None = None,
    logvar_range: Range | None = None,
    batch_dims: int | None = None,
) -> Tensor:
    """Plain-PyTorch twin of `aevb.gaussian_kl`.

    It is ``0.5 sum_j (mu_j^2 + exp(logvar_j) - 1 - logvar_j)``. With a prior, mu_j is the distance of the means in the
    prior's standard deviations, and logvar_j the difference of the logvars.
    """
    m, v = _latents(_compute(mu), clamped(_compute(logvar), logvar_range), batch_dims)
    if prior is not None:
        mean, prior_logvar = _prior_rows(prior, mu, batch_dims)
        m, v = _per_sd(m - mean, prior_logvar), v - prior_logvar
    kl = 0.5 * (m * m + (torch.expm1(v) - v))
    return (kl if groups is None else kl.unflatten(-1, (groups, kl.shape[-1] // groups))).sum(-1)


def bernoulli_log_prob(
    logits: Tensor,
    x: Tensor,
    x_scale: float | None = None,
    *,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Plain-PyTorch twin of `aevb.bernoulli_log_prob`.

    It is ``sum_i (x_i l_i - log(1 + exp(l_i)))``.
    """
    return Bernoulli().reference((logits,), x, x_scale, weight, offset)


def bernoulli_log_prob_from_probs(probs: Tensor, x: Tensor, x_scale: float | None = None) -> Tensor:
    """Returns the Bernoulli log-likelihood of probabilities instead of logits.

    It is ``sum_i (x_i log p_i + (1 - x_i) log(1 - p_i))``, each log clamped at -100, as by `F.binary_cross_entropy`.
    """
    return Bernoulli(from_probs=True).reference((probs,), x, x_scale)


def gaussian_log_prob(
    mean: Tensor,
    x: Tensor,
    logvar: Tensor | float = 0.0,
    x_scale: float | None = None,
    *,
    sigmoid: bool = False,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Plain-PyTorch twin of `aevb.gaussian_log_prob`.

    It is ``-1/2 sum_i ((x_i - m_i)^2 exp(-logvar_i) + logvar_i + log 2 pi)``.
    """
    return Gaussian(sigmoid_means=sigmoid).reference((mean, logvar), x, x_scale, weight, offset)


def linear_bernoulli_log_prob(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, x_scale: float | None = None
) -> Tensor:
    """Plain-PyTorch twin of `aevb.linear_bernoulli_log_prob`.

    It is `bernoulli_log_prob` of the logits ``h @ weight.T + bias``.
    """
    return bernoulli_log_prob(F.linear(h, weight, bias), x, x_scale)


def elbo(log_prob: Tensor, kl: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """Plain-PyTorch twin of `aevb.elbo`.

    It is the mean over samples of log p(x|z), minus beta times the KL; a KL of each sample is averaged first.
    """
    if kl.dim() == log_prob.dim():
        kl = kl.mean(0)
    return log_prob.mean(0) - beta * kl


def importance_weighted_bound(log_prob: Tensor, log_ratio: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """Plain-PyTorch twin of `aevb.importance_weighted_bound`.

    It is ``log 1/L sum_l exp(log p(x|z_l) - beta log_ratio_l)``.
    """
    log_weight = log_prob - beta * log_ratio
    largest = log_weight.detach().amax(0)
    return largest + torch.log(torch.exp(log_weight - largest).mean(0))


def negative_elbo(
    recon: Tensor,
    x: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    beta: Tensor | float = 1.0,
    reduction: str = "mean",
    from_probs: bool = False,
    x_scale: float | None = None,
    likelihood: str = "bernoulli",
    variance: float = 1.0,
    sigmoid_means: bool = False,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
    datapoint_weight: Tensor | None = None,
) -> Tensor:
    """Returns the negative ELBO, the loss of `FusedELBO` with estimator "sgvb-b".

    It is beta KL - mean over samples of log p(x|z), in nats, reduced over datapoints.
    """
    if kl is None:
        assert mu is not None
        assert logvar is not None
        kl = gaussian_kl(mu, logvar)
    family = named(likelihood, from_probs=from_probs, sigmoid_means=sigmoid_means, variance=variance)
    target = target_of("reference.negative_elbo", x, x_scale, weight, offset, x.shape[: kl.dim()])
    log_prob = _log_likelihood(recon, target, kl.dim(), family)
    return reduced(weighed(beta * kl - log_prob.mean(0), datapoint_weight), reduction)


def weighed(of_datapoints: Tensor, datapoint_weight: Tensor | None) -> Tensor:
    """Returns numbers of datapoints, times their weights where there are any."""
    return of_datapoints if datapoint_weight is None else datapoint_weight * of_datapoints


def _log_likelihood(recon, target: Target, batch: int, family: Likelihood) -> Tensor:
    """Returns log p(x|z), (samples, *batch).

    recon is (*samples, *batch, *datapoint), the target's x (*batch, *datapoint).
    """
    first, *others = family.parameters(recon)
    assert isinstance(first, Tensor)
    rows, x = _flat(first, target.x, batch)
    params: list[Parameter] = [rows]
    for p in others:
        if isinstance(p, Tensor) and p.dim() > 0 and p.shape != x.shape[-1:]:
            p = p.expand_as(first).reshape(rows.shape)
        params.append(p)
    return family.reference(tuple(params), *target.flat(x.shape[:batch]))


def log_prob_of_samples(formula: Formula, recon: Tensor, x: Tensor, batch: int, x_scale: float | None) -> Tensor:
    """Returns log p(x|z), (samples, *batch), for a likelihood with one parameter.

    Args:
        formula: The likelihood's formula, from `Likelihood.formulas`.
        recon: (*samples, *batch, *datapoint), the parameter.
        x: (*batch, *datapoint).
        batch: Number of batch dimensions.
        x_scale: Multiplies x.
    """
    recon, x = _flat(recon, x, batch)
    return formula(recon, Target(x, x_scale), 0.0)


def _flat(recon: Tensor, x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Returns recon as (samples, *batch, D) and x as (*batch, D).

    They are given as (*samples, *batch, *datapoint) and (*batch, *datapoint).
    """
    x = datapoints(x, x.shape[:batch])
    return recon.reshape(samples_of(recon, x), *x.shape), x


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Returns the loss of each datapoint reduced by "none", "mean" or "sum".

    Raises:
        ValueError: An unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


class FusedELBO(nn.Module):
    """Plain-PyTorch twin of `aevb.FusedELBO`, with the same options but validate_args."""

    def __init__(
        self,
        beta: Tensor | float = 1.0,
        reduction: str = "mean",
        from_probs: bool = False,
        x_scale: float | None = None,
        *,
        likelihood: str = "bernoulli",
        variance: float = 1.0,
        sigmoid_means: bool = False,
        estimator: str = "sgvb-b",
        num_samples: int | None = None,
        free_bits: float | None = None,
        groups: int | None = None,
        capacity: Tensor | float | None = None,
        batch_dims: int | None = None,
        logvar_range: Range | None = None,
    ):
        super().__init__()
        for name, value, choices in (
            ("reduction", reduction, REDUCTIONS),
            ("estimator", estimator, ESTIMATORS),
        ):
            if value not in choices:
                raise unknown(name, value, choices)
        # Raises for wrong options.
        named(likelihood, from_probs=from_probs, sigmoid_means=sigmoid_means, variance=variance)
        self.batch_dims = batch_dims
        self.logvar_range = None if logvar_range is None else checked_range(logvar_range)
        self.beta, self.reduction, self.from_probs, self.x_scale = beta, reduction, from_probs, x_scale
        self.likelihood, self.variance, self.sigmoid_means = likelihood, variance, sigmoid_means
        self.estimator, self.num_samples = estimator, num_samples
        self.free_bits, self.groups, self.capacity = free_bits, groups, capacity

    def sample(self, mu: Tensor, logvar: Tensor, *, prior: Prior | None = None, **noise) -> tuple[Tensor, Tensor]:
        """Plain-PyTorch twin of `aevb.FusedELBO.sample`.

        Args:
            mu: (..., D).
            logvar: Of mu's shape.
            prior: (prior_mu, prior_logvar), or None for N(0, I).
            **noise: seed, generator or eps.
        """
        gradient = ESTIMATORS[self.estimator].gradient
        options = {"batch_dims": self.batch_dims, "prior": prior, "logvar_range": self.logvar_range, **noise}
        if gradient is not None:
            return sample_gaussian_log_ratio(mu, logvar, self.num_samples, gradient=gradient, **options)
        return sample_gaussian(mu, logvar, self.num_samples, **options)[0], self._kl(mu, logvar, prior)

    def forward(
        self,
        recon: Tensor,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        prior: Prior | None = None,
        weight: Tensor | None = None,
        offset: Tensor | None = None,
        datapoint_weight: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss, with the KL given or computed."""
        if kl is None:
            assert mu is not None
            assert logvar is not None
            kl = self._kl(mu, logvar, prior)
        if ESTIMATORS[self.estimator].importance_weighted:
            options = {"from_probs": self.from_probs, "sigmoid_means": self.sigmoid_means, "variance": self.variance}
            family = named(self.likelihood, **options)
            target = target_of("reference.FusedELBO", x, self.x_scale, weight, offset, kl.shape[1:])
            log_prob = _log_likelihood(recon, target, kl.dim() - 1, family.density)
            bound = importance_weighted_bound(log_prob, kl, self.beta)
            return reduced(-weighed(bound, datapoint_weight), self.reduction)
        if ESTIMATORS[self.estimator].gradient is not None and self.num_samples is not None:
            kl = kl.mean(0)
        if self.free_bits is not None:
            kl = bounds.free_bits(kl, self.free_bits)
        if self.capacity is not None:
            kl = bounds.capacity(kl, self.capacity)
        return negative_elbo(
            recon,
            x,
            kl=kl,
            beta=self.beta,
            reduction=self.reduction,
            from_probs=self.from_probs,
            x_scale=self.x_scale,
            likelihood=self.likelihood,
            variance=self.variance,
            sigmoid_means=self.sigmoid_means,
            weight=weight,
            offset=offset,
            datapoint_weight=datapoint_weight,
        )

    def _kl(self, mu: Tensor, logvar: Tensor, prior: Prior | None = None) -> Tensor:
        flat, _ = _latents(mu, logvar, self.batch_dims)
        groups = None if self.free_bits is None else flat.shape[-1] if self.groups is None else self.groups
        return gaussian_kl(mu, logvar, groups, prior=prior, logvar_range=self.logvar_range, batch_dims=self.batch_dims)
