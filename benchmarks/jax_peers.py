"""The ops in JAX, jitted, with the settings that are fast on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from . import cases
from .cases import SAMPLES, Call, Case, timed

IMPLEMENTATIONS = ("threefry2x32", "rbg")  # of random bits; which is faster depends on the size


def kl(mu, logvar):
    return 0.5 * (mu * mu + jnp.exp(logvar) - 1 - logvar).sum(-1)


def sample(key, mu, logvar):
    return mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, mu.shape), kl(mu, logvar)


def sample_log_ratio(key, mu, logvar):
    eps = jax.random.normal(key, (SAMPLES, *mu.shape))
    z = mu + jnp.exp(0.5 * logvar) * eps
    return z, 0.5 * (z * z - eps * eps - logvar).sum(-1)


def softplus(logits):
    return jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def bernoulli(logits, x):
    return ((x * logits - jax.nn.softplus(logits)).sum(-1),)


def bernoulli_by_hand(logits, x):
    return ((x * logits - softplus(logits)).sum(-1),)


def loss(logits, x, mu, logvar):
    return (((jax.nn.softplus(logits) - x * logits).sum() + kl(mu, logvar).sum()) / mu.shape[0],)


def loss_by_hand(logits, x, mu, logvar):
    return (((softplus(logits) - x * logits).sum() + kl(mu, logvar).sum()) / mu.shape[0],)


FUNCTIONS: dict[str, dict[str, Callable]] = {
    "sample": {"as written": sample},
    "sample_log_ratio": {"as written": sample_log_ratio},
    "bernoulli": {"jax.nn.softplus": bernoulli, "log1p(exp)": bernoulli_by_hand},
    "loss": {"jax.nn.softplus": loss, "log1p(exp)": loss_by_hand},
}


def ways(case: Case) -> dict[str, Call]:
    """Each way as a call that waits for its results, checked and warm."""
    inputs = [jnp.asarray(t.detach().numpy()) for t in case.inputs]
    upstream = tuple(jnp.asarray(t.numpy()) for t in case.upstream)
    calls: dict[str, Call] = {}
    for way, function in FUNCTIONS[case.work.jax].items():
        for implementation in IMPLEMENTATIONS if case.has_noise else IMPLEMENTATIONS[:1]:
            run = (with_noise if case.has_noise else without_noise)(function, case.wanted)
            state: dict[str, Any] = {"key": jax.random.key(0, impl=implementation)}

            def call(run=run, state=state):
                outputs, found, state["key"] = run(state["key"], inputs, upstream)
                jax.block_until_ready(found)
                return outputs, found

            outputs, found = call()
            case.check([torch.from_numpy(np.array(a)) for a in (*outputs, *found)])
            name = f"{way}, {implementation}" if case.has_noise else way
            calls[name] = call
            timed(call, 0.05)
    return calls


def gradients(function: Callable, wanted: list[int], inputs, upstream):
    """Values and gradients of function(*inputs)."""

    def of_wanted(*some):
        given = list(inputs)
        for i, t in zip(wanted, some, strict=True):
            given[i] = t
        return function(*given)

    outputs, pull_back = jax.vjp(of_wanted, *(inputs[i] for i in wanted))
    return outputs, pull_back(upstream)


def with_noise(function: Callable, wanted: list[int]) -> Callable:
    """Values, gradients and the next key, in one jitted function."""

    @jax.jit
    def run(key, inputs, upstream):
        key, drawn = jax.random.split(key)
        return *gradients(partial(function, drawn), wanted, inputs, upstream), key

    return run


def without_noise(function: Callable, wanted: list[int]) -> Callable:
    """The same for what draws nothing: a key costs as much as a small op."""
    jitted = jax.jit(partial(gradients, function, wanted))
    return lambda key, inputs, upstream: (*jitted(inputs, upstream), key)


cases.OTHERS["jax"] = ways
