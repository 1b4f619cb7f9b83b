"""Negative ELBO of a decoder's output as one autograd node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..checks.choices import REDUCTIONS
from .autograd import DifferentiableOp, GradientInForward, fake_gradient, kept_graph, times
from .likelihood import FORMULAS

_ops = torch.ops.aevb


_REDUCTION_NAMES = {code: name for name, code in REDUCTIONS.items()}


def _scaled_beta(beta, beta_scale):
    return beta_scale if beta is None else beta * beta_scale


def _elbo_formula(recon, x, mu_or_kl, logvar, beta, beta_scale, reduction, likelihood, x_scale):
    return _terms_formula(recon, x, mu_or_kl, logvar, beta, beta_scale, reduction, likelihood, x_scale)[0]


def _terms_formula(recon, x, mu_or_kl, logvar, beta, beta_scale, reduction, likelihood, x_scale):
    kl = mu_or_kl if logvar is None else reference.gaussian_kl(mu_or_kl, logvar)
    log_prob = reference.log_prob_of_samples(FORMULAS[likelihood], recon, x, kl.dim(), x_scale).mean(0)
    terms = _scaled_beta(beta, beta_scale) * kl - log_prob, log_prob.detach(), kl.detach()
    return tuple(reference.reduced(term, _REDUCTION_NAMES[reduction]) for term in terms)


def _elbo_fake(recon, x, mu_or_kl, logvar, beta, beta_scale, reduction, *_):
    batch = mu_or_kl.shape if logvar is None else mu_or_kl.shape[:-1]
    return recon.new_empty(batch if reduction == REDUCTIONS["none"] else (), dtype=torch.float32)


def _terms_fake(*args):
    return tuple(_elbo_fake(*args) for _ in range(3))


@torch.library.register_fake("aevb::negative_elbo_terms_and_grad")
def _(recon, *args):
    return *_terms_fake(recon, *args), fake_gradient(recon, recon, True)


@torch.library.register_fake("aevb::negative_elbo_and_grad")
def _(recon, *args):
    return _elbo_fake(recon, *args), fake_gradient(recon, recon, True)


@torch.library.register_fake("aevb::negative_elbo_backward_")
def _(recon, x, mu_or_kl, logvar, *_):
    return fake_gradient(mu_or_kl, recon, True), fake_gradient(logvar, recon, True)


def _elbo_grad(tensors, options, grad_recon, grad):
    """Returns the gradients of recon, mu or KL, and logvar, or None.

    grad_recon was computed for an upstream gradient of 1, with which `loss.backward()` begins. Any other upstream
    gradient multiplies it. In half precision that would round twice, so the result is None and the backward kernel
    runs. On a GPU the host would have to wait for the upstream gradient, so the kernel itself tests for 1.
    """
    if grad.is_cpu:
        if grad_recon.dtype != torch.float32 and float(grad) != 1:
            return None
        _, grad_mu_or_kl, grad_logvar = _elbo_backward(*tensors, *options, grad, 6)
        (grad_recon,) = times((grad_recon,), grad)
    elif kept_graph():
        grad_recon, grad_mu_or_kl, grad_logvar = _elbo_backward(*tensors, *options, grad, 7)
    else:
        grad_mu_or_kl, grad_logvar = _elbo_backward_unless_1(*tensors, *options, grad, grad_recon)
    return grad_recon, grad_mu_or_kl, None if tensors[3] is None else grad_logvar


_elbo_backward = _ops.negative_elbo_backward.default
_elbo_backward_unless_1 = _ops.negative_elbo_backward_.default


def _is_reduced(*args):
    return args[6] != REDUCTIONS["none"]


_negative_elbo = DifferentiableOp(
    "negative_elbo",
    5,
    (0, 2, 3),
    _elbo_formula,
    _elbo_fake,
    only_needed=True,
    in_forward=GradientInForward(_is_reduced, _ops.negative_elbo_and_grad.default, _elbo_grad),
)
_negative_elbo_terms = DifferentiableOp(
    "negative_elbo_terms",
    5,
    (0, 2, 3),
    _terms_formula,
    _terms_fake,
    only_needed=True,
    in_forward=GradientInForward(_is_reduced, _ops.negative_elbo_terms_and_grad.default, _elbo_grad),
    results=3,
    backward="negative_elbo_backward",
)


def negative_elbo(
    recon, x, mu, logvar, kl, beta, reduction: int, likelihood: str, x_scale: float | None, terms: bool = False
) -> Any:
    """Returns the loss of `FusedELBO`, one autograd node from its arguments.

    `reduction` is a value of REDUCTIONS. With `terms`: the loss, and its log-likelihood and KL, without a gradient.
    """
    beta, beta_scale = (beta, 1.0) if isinstance(beta, Tensor) else (None, float(beta))
    of_posterior = (mu, logvar) if kl is None else (kl, None)
    op = _negative_elbo_terms if terms else _negative_elbo
    return op(recon, x, *of_posterior, beta, beta_scale, reduction, likelihood, x_scale)
