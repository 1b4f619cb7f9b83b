"""Samples and KL for a prior, and for a clamped logvar, forward and backward: `python -m benchmarks.priors`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

import aevb

from . import cases
from .likelihoods import times
from .measure import cpu

SIZES = ((100, 20), (1000, 50), (16384, 128))
RANGE = (-30.0, 20.0)  # of diffusers' posteriors


def sample_to_prior(mu, logvar, prior_mu, prior_logvar):
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    terms = ((mu - prior_mu).square() + torch.exp(logvar)) * torch.exp(-prior_logvar) - 1 - logvar + prior_logvar
    return z, 0.5 * terms.sum(-1)


def sample_to_prior_one_exp_less(mu, logvar, prior_mu, prior_logvar):
    sd, inverse = torch.exp(0.5 * logvar), torch.exp(-prior_logvar)
    z = torch.addcmul(mu, sd, torch.randn_like(mu))
    terms = torch.addcmul(sd * sd, mu - prior_mu, mu - prior_mu) * inverse - 1 - logvar + prior_logvar
    return z, 0.5 * terms.sum(-1)


def sample_clamped(mu, logvar):
    """As diffusers' DiagonalGaussianDistribution has it: mode, std, var, sample and kl."""
    logvar = torch.clamp(logvar, *RANGE)
    std, var = torch.exp(0.5 * logvar), torch.exp(logvar)
    return mu + std * torch.randn_like(mu), 0.5 * (mu.pow(2) + var - 1.0 - logvar).sum(-1)


def behind_clamp(mu, logvar):
    return aevb.sample_gaussian(mu, torch.clamp(logvar, *RANGE))


def prior_work(batch: int, dim: int, shared: bool) -> cases.Work:
    def inputs() -> list[Tensor]:
        shape = (dim,) if shared else (batch, dim)
        return [*cases.latents(batch, dim), *(torch.randn(shape, requires_grad=True) for _ in range(2))]

    def to(function):
        return lambda mu, logvar, *prior, **noise: function(mu, logvar, prior=prior, **noise)

    return cases.Work(
        f"sample+KL to {'one learned prior' if shared else 'a prior each'} {batch}x{dim}",
        inputs,
        to(aevb.sample_gaussian),
        to(aevb.reference.sample_gaussian),
        {"as written": sample_to_prior, "addcmul": sample_to_prior_one_exp_less},
        "",
        batch * dim,
        4 * batch * ((8 if shared else 14) * dim + 2),
    )


def clamped_work(batch: int, dim: int, separate: bool = False) -> cases.Work:
    def clamped(function):
        return lambda mu, logvar, **noise: function(mu, logvar, logvar_range=RANGE, **noise)

    return cases.Work(
        f"sample+KL, {'torch.clamp before it' if separate else 'clamped'} {batch}x{dim}",
        lambda: cases.latents(batch, dim),
        behind_clamp if separate else clamped(aevb.sample_gaussian),
        clamped(aevb.reference.sample_gaussian),
        {"diffusers": sample_clamped},
        "",
        batch * dim,
        4 * batch * (8 * dim + 2),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.priors", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{cpu()[0]}, {options.threads} threads, torch {torch.__version__}, float32\n")
    print("| forward and backward | aevb | eager | compile | faster than the best of both |")
    print("|---|--:|--:|--:|--:|")
    for batch, dim in SIZES:
        for work in (
            *(prior_work(batch, dim, shared) for shared in (True, False)),
            *(clamped_work(batch, dim, separate) for separate in (False, True)),
        ):
            found = times(cases.Case(work), options.seconds)
            median = {name: statistics.median(seconds) for name, seconds in found.items()}
            cells = [f"{1e6 * median[name]:,.0f} us" for name in ("aevb", "eager", "compile")]
            best = min(median["eager"], median["compile"])
            print(f"| {work.name} | {' | '.join(cells)} | {best / median['aevb']:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
