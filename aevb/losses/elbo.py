"""The drop-in loss: `FusedELBO`, by any of the estimators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import bounds
from ..checks.arguments import check_beta, converted
from ..checks.batch_dims import checked_batch_dims, latents, matched, samples_of, say_one_datapoint
from ..checks.choices import ESTIMATORS, REDUCTIONS, unknown
from ..checks.errors import check_dense
from ..checks.priors import Prior, Range, checked_range
from ..checks.seeds import Generators
from ..likelihoods import GaussianOutput, Likelihood, LinearLogits, LinearOutput, named
from ..likelihoods import values as ranges
from ..likelihoods.base import Parameter
from ..likelihoods.target import Target, datapoint_weights, real, target_of
from ..ops import decoder_output as parameters
from ..ops import fused_linear as linear_likelihood
from ..ops.autograd import is_batched
from ..ops.gaussian import kl_of, sampled
from ..ops.likelihood import reconstruction_log_prob
from ..ops.negative_elbo import negative_elbo

_is_compiling = torch.compiler.is_compiling


Recon = Tensor | LinearLogits | LinearOutput | GaussianOutput | tuple[Parameter, ...]


# DReG reads the samples' weights from the upstream gradient of the KL, so beta is above 0 where a warm-up begins too.
SMALLEST_BETA = 1e-20


class ELBOTerms(NamedTuple):
    """Loss of a batch, and the terms of the ELBO in it, in nats.

    Each is reduced as the criterion says: 0-d, or (*batch,) with reduction "none". The mean over samples is taken. With
    weights of datapoints each term is weighed as the loss is.
    """

    loss: Tensor
    """What is differentiated, `criterion(...)`."""
    log_likelihood: Tensor
    """log p(x|z), without a gradient."""
    kl: Tensor
    """KL(q(z|x) || p(z)), without a gradient, before beta, free bits and a capacity.

    Of the estimators with a Monte Carlo KL it is log q(z|x) - log p(z).
    """


class _Options(NamedTuple):
    """Arguments of a call that most calls do without."""

    prior: Prior | None
    weight: Tensor | None
    offset: Tensor | None
    datapoint_weight: Tensor | None


def _option(name: str, default: Any, doc: str) -> Any:
    """Returns a property of `FusedELBO` that is an option of its likelihood; setting it makes a new likelihood."""
    return property(
        lambda self: getattr(self.family, name, default), lambda self, value: self._change(**{name: value}), doc=doc
    )


class FusedELBO(nn.Module):
    """The negative evidence lower bound of a VAE with a diagonal Gaussian posterior, fused.

    For one datapoint, with L samples z_l of the posterior (Kingma & Welling 2013, eq. 7 and appendices B, C)::

        loss = beta * KL(N(mu, exp(logvar)) || N(0, I)) - 1/L * sum_l log p(x | z_l)

    It is called in one of two ways::

        criterion(recon, x, mu, logvar)     # the KL is computed here, in the same autograd node

        z, kl = criterion.sample(mu, logvar)
        criterion(decoder(z), x, kl=kl)     # the KL comes from the pass that samples; every estimator

    Shapes. mu's leading dimensions (all but its last, or `batch_dims`) are the batch. x is (*batch, *datapoint) and
    recon (*samples, *batch, *datapoint): everything after the batch is the datapoint, and may be laid out differently
    in the two (recon (B, 784) goes with x (B, 1, 28, 28)). Extra leading dimensions of recon are samples. recon may be
    a `LinearLogits`, or of any likelihood a `LinearOutput`: then the output of a linear last layer is never in memory.

    Likelihoods are those of `aevb.likelihoods`, by name. With likelihood="bernoulli" recon holds logits
    (`bernoulli_log_prob`). With likelihood="gaussian" it is the means of N(mean, variance), or a `GaussianOutput`,
    whose variance may be learned (`gaussian_log_prob`). Of others it is a tensor, or a tuple of their `params`. Of a
    density the loss may be below 0.

    Estimators, with log w_l = log p(x|z_l) - beta (log q(z_l|x) - log p(z_l)):

        =========  ======================  ==============================================================
        "sgvb-b"   the ELBO, KL in closed form, as above (Kingma & Welling 2013, eq. 7)
        "sgvb-a"   the ELBO, 1/L sum_l log w_l (eq. 6)
        "stl"      the same; its gradient by the path through z alone ("sticking the landing", Roeder et al. 2017)
        "iwae"     the importance-weighted bound, log 1/L sum_l w_l (Burda et al. 2015)
        "dreg"     the same; the encoder's gradient doubly reparameterized (Tucker et al. 2018)
        =========  ======================  ==============================================================

    Args:
        beta: weight of the KL: a number, or a 0-d tensor. Change a tensor in place for a warm-up (see
            `linear_warmup`, `cyclical_warmup`): a compiled model then never recompiles.
        reduction: "mean" (over datapoints, of per-datapoint sums), "sum", or "none" for one value a datapoint.
        from_probs: recon holds probabilities (sigmoid outputs) instead of logits. Their logarithms are clamped at -100
            and the gradient is that of `F.binary_cross_entropy`; with reduction="sum" this is the loss of
            pytorch/examples' VAE.
        x_scale: multiplies x: 1/255 for uint8 pixels, 1 for uint8 in {0, 1}. uint8 targets need it.
        validate_args: look at the values: that targets and probabilities lie in [0, 1], logits not all (which warns:
            they may be probabilities), that a Gaussian's x is finite and not far from means of a sigmoid, that beta is
            not negative. None: at the first call that is eager and on a CPU. True: at each, and that recon is finite;
            it costs passes over x and recon, and on a GPU a wait. False: at none. Nothing is looked at under
            `torch.compile` and `torch.func`.
        likelihood: the name of one of `aevb.likelihoods`, "bernoulli" or "gaussian" say.
        variance: of the Gaussian likelihood where recon is a tensor of means: a fixed number.
        sigmoid_means: the Gaussian's means are the sigmoid of what recon holds, as in section 5 of the paper.
        estimator: one of the above.
        num_samples: L, for `sample`: None for one sample without a dimension of its own.
        free_bits: nats that are free in each group of latent dimensions (see `aevb.free_bits`); "sgvb-b" only.
        groups: how many groups; by default each latent dimension is one.
        capacity: nats of KL to aim for: the loss has ``beta |KL - capacity|`` (see `aevb.capacity`); "sgvb-b" only.
        batch_dims: how many leading dimensions are the batch; those of mu that follow are latent: 1 for mu (B, C, H,
            W). By default all but the last; of more than two, a warning says so once. 0: one datapoint, whose kl is
            0-d, as in a function that `torch.func.vmap` maps, where nothing needs to be said.
        logvar_range: None, or (least, greatest), to which logvar is clamped (see `aevb.gaussian_kl`): (-30, 20) as in
            diffusers.

    The result is float32, in nats. recon, mu and logvar may be float32, bfloat16 or float16; x may be soft (in [0, 1];
    for likelihood="gaussian" anything finite), bool, or uint8 with x_scale; the arithmetic is float32.

    Raises:
        ValueError: an unknown reduction, estimator or likelihood, options that do not go together, or with recon,
            neither or both of (mu, logvar) and kl, a kl that is not one number a datapoint, a negative beta, and
            values that are not what they are taken for, where they are looked at.
        RuntimeError: shapes, dtypes or devices that do not fit.
    """

    _beta: Tensor | float
    logvar_range: Range | None = None  # also of what was pickled before there was one

    def __init__(
        self,
        beta: Tensor | float = 1.0,
        reduction: str = "mean",
        from_probs: bool = False,
        x_scale: float | None = None,
        *,
        validate_args: bool | None = None,
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
        if num_samples is not None and not isinstance(num_samples, int):
            num_samples = converted("num_samples", num_samples, int)
        if reduction not in REDUCTIONS:
            raise unknown("reduction", reduction, REDUCTIONS)
        if estimator not in ESTIMATORS:
            raise unknown("estimator", estimator, ESTIMATORS)
        _check_options(estimator, num_samples, free_bits, groups, capacity)
        self.family = named(likelihood, from_probs=from_probs, sigmoid_means=sigmoid_means, variance=variance)
        self._set_beta(beta)  # not by the property, which torch 2.11 cannot trace here
        self.reduction = reduction
        self.x_scale = x_scale
        self.validate_args = validate_args
        self._looked = False
        self.estimator = estimator
        self.num_samples = num_samples
        self.free_bits = free_bits
        self.groups = groups
        self.batch_dims = checked_batch_dims(batch_dims)
        self.logvar_range = None if logvar_range is None else checked_range(logvar_range)
        self.capacity: Tensor | float | None
        if isinstance(capacity, Tensor):
            self.register_buffer("capacity", capacity, persistent=False)
        else:
            self.capacity = capacity

    @property
    def likelihood(self) -> str:
        """The likelihood's name; `family` is the likelihood object with its options."""
        return self.family.name

    @likelihood.setter
    def likelihood(self, value: str) -> None:
        self._change(likelihood=value)

    from_probs = _option("from_probs", False, "Whether a Bernoulli's recon holds probabilities.")
    variance = _option("variance", 1.0, "Of a Gaussian's recon that holds means alone.")
    sigmoid_means = _option("sigmoid_means", False, "Whether a Gaussian's means are the sigmoid of what recon holds.")

    def _change(self, likelihood: str | None = None, **options: Any) -> None:
        """Sets options of the likelihood, or another likelihood, which drops the options that it lacks."""
        found = named(self.likelihood if likelihood is None else likelihood)
        kept = {name: getattr(self.family, name) for name in found.options.keys() & self.family.options.keys()}
        self.family = named(found.name, **{**kept, **options})

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "family" not in state:  # of before there was one
            names = ("likelihood", "from_probs", "variance", "sigmoid_means")
            state = dict(state)
            state["family"] = named(**{name: state.pop(name) for name in names})
        super().__setstate__(state)

    @property
    def beta(self) -> Tensor | float:
        """The weight of the KL. A tensor moves with the module (`.to(device)`) and is no part of its state_dict."""
        return self._beta

    @beta.setter
    def beta(self, value: Tensor | float) -> None:
        self._set_beta(value)

    def _set_beta(self, value: Tensor | float) -> None:
        if isinstance(value, Tensor) and value.dim() != 0:
            raise ValueError(f"beta has shape {tuple(value.shape)}; expected a number or a 0-d tensor")
        if hasattr(self, "_beta"):
            del self._beta
        if isinstance(value, Tensor):
            self.register_buffer("_beta", value, persistent=False)
        else:
            if not isinstance(value, float | int):
                value = converted("beta", value, float)
            check_beta(value)
            self._beta = float(value)

    def sample(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        prior: Prior | None = None,
        seed: Tensor | int | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples the posterior `num_samples` times, with the KL that the estimator needs.

        The two go into the loss as ``criterion(decoder(z), x, kl=kl)``.

        Args:
            mu: the posterior's means, (*batch, latent_dim).
            logvar: the logarithms of its variances, of mu's shape.
            prior: None for N(0, I), or (prior_mu, prior_logvar), as in `aevb.gaussian_kl`.
            seed: as in `aevb.sample_gaussian`.
            generator: as in `aevb.sample_gaussian`.

        Returns:
            z, (*samples, *batch, latent_dim), and kl, in nats and float32:

            * for "sgvb-b" the KL of each datapoint, (*batch,), or with free_bits of each of its groups, (*batch,
              groups);
            * else log q(z|x) - log p(z) of each sample, (*samples, *batch), whose expectation is the KL.
        """
        gradient = ESTIMATORS[self.estimator].gradient
        z, kl = sampled(
            *(mu, logvar, self.num_samples, gradient, self.batch_dims, seed, generator, "FusedELBO"),
            *(prior, self.logvar_range),
        )
        if gradient is not None or self.free_bits is None:
            return z, kl
        return z, self._own_kl(mu, logvar, prior)

    def forward(
        self,
        recon: Recon,
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
        """Returns the loss, float32, in nats: 0-d, or (*batch,) with reduction "none".

        Args:
            recon: the decoder's output, (*samples, *batch, *datapoint); or a `LinearLogits`, `LinearOutput`,
                `GaussianOutput`, or a tuple of the likelihood's parameters.
            x: the data, (*batch, *datapoint).
            mu: the posterior's means, (*batch, latent_dim).
            logvar: the logarithms of its variances, of mu's shape.
            kl: the second result of `sample`, in place of mu and logvar.
            prior: with mu and logvar: None for N(0, I), or (prior_mu, prior_logvar), as in `aevb.gaussian_kl`. With kl
                it was given to `sample`.
            weight: of x's shape, or broadcast to it. bool or uint8 is a mask of the elements that were observed: the
                others take no part in log p(x|z), by selection, so that a NaN there does no harm. Floats, 0 or more,
                weigh the elements. See `aevb.log_prob`. With "iwae" and a mask the loss is that of MIWAE (Mattei &
                Frellsen 2019).
            offset: (*batch,), or broadcast to it: added to the likelihood's first parameter. It gets a gradient.
            datapoint_weight: (*batch,), or broadcast to it: multiplies the loss of each datapoint, its KL included,
                and stays outside of the logarithm of "iwae". "mean" still divides by the number of datapoints.

        Raises:
            ValueError: neither or both of (mu, logvar) and kl; values out of range, where they are looked at.
            RuntimeError: shapes, dtypes or devices that do not fit.
        """
        options = _Options(prior, weight, offset, datapoint_weight)
        return self._parts(recon, x, mu, logvar, kl, options, False)[0]

    def terms(
        self,
        recon: Recon,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        prior: Prior | None = None,
        weight: Tensor | None = None,
        offset: Tensor | None = None,
        datapoint_weight: Tensor | None = None,
    ) -> ELBOTerms:
        """Returns the loss, and the log-likelihood and KL in it, for a log.

        The arguments, the errors and the loss are those of a call of the criterion, and so is the time.
        """
        options = _Options(prior, weight, offset, datapoint_weight)
        return ELBOTerms(*self._parts(recon, x, mu, logvar, kl, options, True))

    def _parts(
        self,
        recon: Recon,
        x: Tensor,
        mu: Tensor | None,
        logvar: Tensor | None,
        kl: Tensor | None,
        options: _Options,
        wants_terms: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, and with wants_terms its terms, else anything."""
        if not (type(recon) is Tensor is type(x)) or not self.family.is_whole:
            self._check_given(recon, x, mu, logvar, kl)
        posterior = self._posterior(recon, x, mu, logvar) if kl is None else None
        if kl is not None:
            _check_only_kl(mu, logvar, options.prior)
        is_linear = isinstance(recon, LinearOutput) or (isinstance(recon, LinearLogits) and self.family.has_logits)
        params = None if is_linear else self.family.parameters(recon)
        if self.reduction not in REDUCTIONS:
            raise unknown("reduction", self.reduction, REDUCTIONS)
        first: Any = recon.h if params is None else params[0]  # type: ignore[union-attr]
        target, datapoint_weight = Target(real(x, first), self.x_scale), options.datapoint_weight
        if not (options.weight is None and options.offset is None):
            weights = options.weight, options.offset, self._batch(posterior, kl)
            target = target_of("FusedELBO", target.x, self.x_scale, *weights)
        if self.validate_args is not False and not _is_compiling() and self._is_wanted(x):
            self._look(params, target)
        if kl is not None:
            self._check_kl(recon, params, x, kl)
        if datapoint_weight is not None:
            datapoint_weight = datapoint_weights("FusedELBO", datapoint_weight, self._batch(posterior, kl))
        is_whole = params is not None and self.family.is_whole and target.is_plain and datapoint_weight is None
        if posterior is not None:
            plain = options.prior is None and self.logvar_range is None and not _is_wider(posterior, first)
            if is_whole and plain and self.free_bits is None and self.capacity is None:
                return self._loss(recon, target, posterior, None, wants_terms)
            kl = self._own_kl(mu, logvar, options.prior)
        assert kl is not None
        kl = _in_dtype_of(kl, first)
        return self._of_kl(recon, params, target, kl, is_whole, datapoint_weight, wants_terms)

    def _own_kl(self, mu: Tensor | None, logvar: Tensor | None, prior: Prior | None) -> Tensor:
        """Returns the KL of mu and logvar, of each group with free bits."""
        assert mu is not None
        assert logvar is not None
        groups = None if self.free_bits is None else self.groups
        if self.free_bits is not None and groups is None:
            shape = matched(mu, logvar)[0].shape
            groups = shape[-1] if self.batch_dims is None else shape[self.batch_dims :].numel()
        return kl_of("FusedELBO", mu, logvar, groups, prior, self.logvar_range, self.batch_dims)

    def _batch(self, posterior: tuple[Tensor, Tensor] | None, kl: Tensor | None) -> torch.Size:
        """Returns the batch shape of the posterior, or of the kl of `sample`."""
        if posterior is not None:
            return posterior[0].shape[:-1]
        assert kl is not None
        if self._per_sample_kl():
            return kl.shape[1:]
        return kl.shape if self.free_bits is None else kl.shape[:-1]

    def _posterior(self, recon: Recon, x: Tensor, mu: Tensor | None, logvar: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns mu and logvar as (*batch, D), where the KL is computed from them."""
        if mu is None or logvar is None:
            raise ValueError("FusedELBO needs mu and logvar, or kl=: criterion(recon, x, mu, logvar)")
        if ESTIMATORS[self.estimator].gradient is not None:
            raise ValueError(
                f"estimator {self.estimator!r} needs the kl of its own samples: z, kl = criterion.sample(mu, "
                "logvar); criterion(decoder(z), x, kl=kl)"
            )
        if not (type(mu) is Tensor is type(logvar)):
            self._check_given(recon, x, mu, logvar, None)
        if mu.dim() == 1 and self.batch_dims is None and x.dim() > 1 and x.shape[0] == mu.shape[0]:
            say_one_datapoint(mu, x)
        mu, logvar = matched(mu, logvar)
        if self.batch_dims is not None or mu.dim() > 2:
            return latents(mu, logvar, self.batch_dims, "FusedELBO")
        return mu, logvar

    def _of_kl(
        self,
        recon: Recon,
        params: tuple[Parameter, ...] | None,
        target: Target,
        kl: Tensor,
        is_whole: bool,
        datapoint_weight: Tensor | None,
        wants_terms: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss and its terms, given the KL.

        `params` are recon's, None where recon is of a linear layer. `is_whole`: the loss's own kernel takes recon.
        """
        if ESTIMATORS[self.estimator].importance_weighted:
            loss, log_prob = self._importance_weighted(recon, params, target, kl, datapoint_weight)
            return loss, log_prob, self._weighed(kl.detach().mean(0), datapoint_weight) if wants_terms else loss
        term = self.kl_term(kl)
        if is_whole:
            loss, log_prob, of_term = self._loss(recon, target, None, term, wants_terms)
            if term is kl:
                return loss, log_prob, of_term
        else:
            loss, log_prob = self._of_rows(recon, params, target, term, datapoint_weight)
        return loss, log_prob, self._weighed(self._mean_kl(kl), datapoint_weight) if wants_terms else loss

    def _mean_kl(self, kl: Tensor) -> Tensor:
        """Returns each datapoint's KL, (*batch,), without a graph, before free bits and a capacity."""
        kl = kl.detach()
        if self._per_sample_kl():
            return kl.mean(0)
        return kl if self.free_bits is None else kl.sum(-1)

    def _weighed(self, of_datapoints: Tensor, datapoint_weight: Tensor | None) -> Tensor:
        return self._reduced(of_datapoints if datapoint_weight is None else datapoint_weight * of_datapoints)

    def _check_given(self, recon, x, mu, logvar, kl) -> None:
        """Raises TypeError for an argument that is no dense tensor, or none made of such."""
        parts = recon if isinstance(recon, tuple) else (recon,)
        given = {"recon": parts[0], "x": x, "mu": mu, "logvar": logvar, "kl": kl}
        check_dense("FusedELBO", **{name: t for name, t in given.items() if t is not None or name in ("recon", "x")})

    def _is_wanted(self, x: Tensor) -> bool:
        """Whether a call with x may look at its values. In a graph nobody asks, since `_looked` would be a guard."""
        return self.validate_args is True or (not self._looked and x.is_cpu)

    def _look(self, params: tuple[Parameter, ...] | None, target: Target) -> None:
        """Looks at the values, where `validate_args` says so; after a fault the next call looks again."""
        output = None if params is None else params[0]
        assert output is None or isinstance(output, Tensor)
        if not ranges.look(self.validate_args, self._looked, target.x, *([] if output is None else [output])):
            return
        strict = self.validate_args is True
        if isinstance(self._beta, Tensor) and (strict or self._beta.device.type == "cpu"):
            check_beta(self._beta.item())
        ranges.check_likelihood(self.family, output, target, strict)
        self._looked = True

    def _check_kl(self, recon: Recon, params: tuple[Parameter, ...] | None, x: Tensor, kl: Tensor) -> None:
        """Raises ValueError unless kl is the one of `sample`, and recon of as many samples.

        Where L = B, shapes alone would not tell.
        """
        if type(kl) is not Tensor:
            check_dense("FusedELBO", kl=kl)
        per_sample, groups = self._per_sample_kl(), self.free_bits is not None
        inner = per_sample or groups  # a dimension that is none of the batch
        dims = kl.dim()
        too_few = dims <= inner and (dims < inner or (self.batch_dims is None and not is_batched()))
        if per_sample and (too_few or kl.shape[0] != self.num_samples):
            expected = f"(num_samples={self.num_samples}, *batch), log q(z|x) - log p(z) of each sample"
        elif groups and (too_few or self.groups not in (None, kl.shape[-1])):
            expected = f"(*batch, groups{'' if self.groups is None else f'={self.groups}'}), for free_bits"
        elif too_few:
            raise ValueError(
                "kl is 0-d, which makes all of x one datapoint; expected one number for each, as aevb.sample_gaussian "
                "and aevb.gaussian_kl give it, no mean or sum of them. Of a single datapoint: FusedELBO(batch_dims=0)"
            )
        else:
            expected = None
        if expected:
            raise ValueError(
                f"kl has shape {tuple(kl.shape)}; expected {expected}, as z, kl = criterion.sample(mu, logvar) gives it"
            )
        if self.batch_dims is not None and dims - inner != self.batch_dims:
            raise ValueError(
                f"kl has shape {tuple(kl.shape)} and batch_dims is {self.batch_dims}; expected one number for each "
                f"datapoint, {self.batch_dims + inner} dimensions"
            )
        if kl.numel() == 0 or (self.num_samples is None and ESTIMATORS[self.estimator].gradient is None):
            return
        batch = kl.shape[1:] if per_sample else kl.shape[:-1] if groups else kl.shape
        samples, wanted = _samples(recon, params, x, len(batch)), self.num_samples or 1
        if samples != wanted:
            raise ValueError(
                f"recon has {samples} samples of each datapoint; expected num_samples={wanted}, those of kl"
            )

    def kl_term(self, kl: Tensor) -> Tensor:
        """Returns each datapoint's KL term, (*batch,), which beta multiplies in the loss.

        It is the mean over samples of the kl of `sample`, with free_bits and capacity applied. The estimators "iwae"
        and "dreg" have no such term.
        """
        if self._per_sample_kl():
            return kl.mean(0)
        if self.free_bits is not None:
            kl = bounds.free_bits(kl, self.free_bits)
        return kl if self.capacity is None else bounds.capacity(kl, self.capacity)

    def _per_sample_kl(self) -> bool:
        return ESTIMATORS[self.estimator].gradient is not None and self.num_samples is not None

    def _weight(self) -> Tensor | float:
        """Returns beta in float32, whatever the module was cast to."""
        beta = self._beta
        return beta.float() if isinstance(beta, Tensor) and beta.dtype != torch.float32 else beta

    def ratio_weight(self) -> Tensor | float:
        """Returns beta as the weight of the log ratio of "iwae" and "dreg"."""
        beta = self._weight()
        if self.estimator != "dreg":
            return beta
        return beta.clamp_min(SMALLEST_BETA) if isinstance(beta, Tensor) else max(beta, SMALLEST_BETA)

    def of_log_prob(self, log_prob: Tensor, kl: Tensor, *, datapoint_weight: Tensor | None = None) -> Tensor:
        """Returns the loss of a likelihood of one's own.

        Args:
            log_prob: log p(x|z) of each sample, (*samples, *batch), in nats.
            kl: the second result of `sample`.
            datapoint_weight: as for a call of the criterion.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        weighted = ESTIMATORS[self.estimator].importance_weighted
        term = kl if weighted else self.kl_term(kl)
        if log_prob.shape[log_prob.dim() - term.dim() :] != term.shape:
            raise ValueError(
                f"log_prob has shape {tuple(log_prob.shape)} and the KL term {tuple(term.shape)}; expected log p(x|z) "
                "of each sample and datapoint, (*samples, *batch)"
            )
        if datapoint_weight is not None:
            datapoint_weight = datapoint_weights("FusedELBO", datapoint_weight, self._batch(None, kl))
        if weighted:
            bound = bounds.importance_weighted_bound(log_prob, kl, self.ratio_weight())
            return self._weighed(-bound, datapoint_weight)
        samples = log_prob.shape[: log_prob.dim() - term.dim()].numel()
        loss = self._weight() * term - log_prob.reshape(samples, *term.shape).mean(0)
        return self._weighed(loss, datapoint_weight)

    def _loss(
        self, recon: Recon, target: Target, posterior: tuple[Tensor, Tensor] | None, kl: Tensor | None, terms: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, _, kernel, _ = self.family.kernel_arguments((recon,))  # type: ignore[arg-type]
        mu, logvar = (None, None) if posterior is None else posterior
        reduction = REDUCTIONS[self.reduction]
        found = negative_elbo(recon, target.x, mu, logvar, kl, self._weight(), reduction, kernel, target.x_scale, terms)
        return found if terms else (found, found, found)

    def _of_rows(
        self,
        recon: Recon,
        params: tuple[Parameter, ...] | None,
        target: Target,
        kl: Tensor,
        datapoint_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss from log p(x|z) of rows or of their sum, and the log-likelihood, without a graph.

        A sum is computed with its gradients in one pass; a gradient of datapoint_weight needs the rows.
        """
        learns_weight = datapoint_weight is not None and datapoint_weight.requires_grad
        if self.reduction == "none" or kl.numel() == 0 or learns_weight:
            log_prob = self._rows_log_prob(self.family, recon, params, target, kl.shape)
            mean = log_prob.reshape(log_prob.shape[: log_prob.dim() - kl.dim()].numel(), *kl.shape).mean(0)
            loss = self._weighed(self._weight() * kl - mean, datapoint_weight)
            return loss, self._weighed(mean.detach(), datapoint_weight)
        count = 1 if self.reduction == "sum" else kl.numel()
        factor: float | Tensor = -1.0 / count
        if datapoint_weight is not None:
            kl, factor = datapoint_weight * kl, factor * datapoint_weight
        value = self._sum_log_prob(recon, params, target, kl, factor)
        return self._weight() * self._reduced(kl) + value, -value.detach()

    def _rows_log_prob(
        self, family: Likelihood, recon: Recon, params: tuple[Parameter, ...] | None, target: Target, batch: torch.Size
    ) -> Tensor:
        """Returns log p(x|z), (*samples, *batch)."""
        if params is not None:
            return parameters.log_prob_of(family, params, target, batch)
        assert isinstance(recon, LinearLogits | LinearOutput)
        return linear_likelihood.rows_log_prob(family, recon, target.flat(batch))

    def _sum_log_prob(
        self,
        recon: Recon,
        params: tuple[Parameter, ...] | None,
        target: Target,
        kl: Tensor,
        factor: float | Tensor,
    ) -> Tensor:
        """Returns the sum over datapoints of factor times the mean over samples of log p(x|z)."""
        if params is not None:
            return parameters.sum_log_prob(self.family, params, target, kl.shape, factor)
        assert isinstance(recon, LinearLogits | LinearOutput)
        samples = _samples(recon, None, target.x, kl.dim())
        factor = factor / samples if samples else float("nan")
        return linear_likelihood.sum_log_prob(self.family, recon, target.flat(kl.shape), factor)

    def _importance_weighted(
        self,
        recon: Recon,
        params: tuple[Parameter, ...] | None,
        target: Target,
        log_ratio: Tensor,
        datapoint_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns minus the importance-weighted bound, and the log-likelihood, without a graph."""
        beta, family, batch = self.ratio_weight(), self.family.density, log_ratio.shape[1:]
        learns_weight = datapoint_weight is not None and datapoint_weight.requires_grad
        count = batch.numel()
        if params is None and self.reduction != "none" and count and not learns_weight:
            assert isinstance(recon, LinearLogits | LinearOutput)
            factor: float | Tensor = -1.0 / (count if self.reduction == "mean" else 1)
            factor = factor if datapoint_weight is None else factor * datapoint_weight
            loss, minus_log_prob = linear_likelihood.sum_importance_weighted_bound(
                family, recon, target.flat(batch), log_ratio, beta, factor
            )
            return loss, -minus_log_prob
        if params is not None and family.is_whole:
            assert isinstance(recon, Tensor)
            log_prob = reconstruction_log_prob(family, recon, target, tuple(log_ratio.shape))
        else:
            params = params if params is None or family is self.family else family.parameters(recon)
            log_prob = self._rows_log_prob(family, recon, params, target, batch)
            # Of a pixel and a datapoint, samples look like either.
            log_prob = log_prob if params is None else log_prob.reshape(log_ratio.shape)
        bound = bounds.importance_weighted_bound(log_prob, log_ratio, beta)
        return self._weighed(-bound, datapoint_weight), self._weighed(log_prob.detach().mean(0), datapoint_weight)

    def _reduced(self, loss: Tensor) -> Tensor:
        return loss if self.reduction == "none" else loss.mean() if self.reduction == "mean" else loss.sum()

    def extra_repr(self) -> str:
        """Returns the options that are not the default, as `print(criterion)` shows them."""
        beta = f"tensor({self._beta.item()})" if isinstance(self._beta, Tensor) else self._beta
        text = f"beta={beta}, reduction={self.reduction!r}"
        text += ", from_probs=True" if self.from_probs else ""
        text += f", x_scale={self.x_scale}" if self.x_scale is not None else ""
        text += f", likelihood={self.likelihood!r}" if self.likelihood != "bernoulli" else ""
        text += f", variance={self.variance}" if self.variance != 1.0 else ""
        text += ", sigmoid_means=True" if self.sigmoid_means else ""
        text += f", estimator={self.estimator!r}" if self.estimator != "sgvb-b" else ""
        for name in ("num_samples", "free_bits", "groups", "capacity", "batch_dims", "logvar_range"):
            value = getattr(self, name)
            text += f", {name}={value}" if value is not None else ""
        return text


def _check_only_kl(mu: Tensor | None, logvar: Tensor | None, prior: Prior | None) -> None:
    """Raises ValueError for a posterior or a prior beside a kl."""
    if mu is not None or logvar is not None:
        raise ValueError("FusedELBO got both kl and (mu, logvar); give it one of the two")
    if prior is not None:
        raise ValueError(
            "FusedELBO got both kl and a prior, which the kl has in it; expected the prior in criterion.sample(mu, "
            "logvar, prior=prior)"
        )


def _in_dtype_of(kl: Tensor, first: Tensor) -> Tensor:
    """Returns the KL in float32, or in float64 beside a first parameter of float64."""
    is_other = kl.dtype in (torch.bfloat16, torch.float16) or kl.dtype == torch.float64 != first.dtype
    return kl.float() if is_other else kl


def _is_wider(posterior: tuple[Tensor, Tensor] | None, first: Tensor) -> bool:
    """Whether the posterior is float64 and the decoder's output is not."""
    return posterior is not None and posterior[0].dtype == torch.float64 != first.dtype


def _samples(recon: Recon, params: tuple[Parameter, ...] | None, x: Tensor, batch: int) -> int:
    """Returns the number of samples of each datapoint in recon, given the number of batch dimensions."""
    if params is None:
        assert isinstance(recon, LinearLogits | LinearOutput)
        return recon.h.shape[: recon.h.dim() - 1 - batch].numel()
    first = params[0]
    assert isinstance(first, Tensor)
    return samples_of(first, x)


def _check_options(
    estimator: str,
    num_samples: int | None,
    free_bits: float | None,
    groups: int | None,
    capacity: Tensor | float | None,
) -> None:
    """Raises ValueError for options of `FusedELBO` that do not go together, or are too small."""
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected None or at least 1")
    if ESTIMATORS[estimator].importance_weighted and num_samples is None:
        raise ValueError(f"estimator {estimator!r} weighs samples against each other; give it num_samples")
    if ESTIMATORS[estimator].gradient is not None and (free_bits is not None or capacity is not None):
        raise ValueError(f"free_bits and capacity need the KL in closed form: estimator 'sgvb-b', not {estimator!r}")
    if groups is not None and free_bits is None:
        raise ValueError(f"groups is {groups}, of free_bits, which are not given")
    if groups is not None and groups < 1:
        raise ValueError(f"groups is {groups}; expected at least 1")
    if free_bits is not None and not free_bits >= 0:
        raise ValueError(f"free_bits is {free_bits}; expected nats from 0 up")
