"""What is timed of the ops, who does it, and how many bytes it has to move."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import aevb

from .. import cases

M = 2**20
SIZES = (1 * M, 4 * M, 16 * M, 64 * M, 256 * M)  # elements
TARGET_SIZE = 64 * M  # where the peers are timed too
LATENT_WIDTH, PIXELS, LATENTS = 128, 784, 20  # of rows; the loss has 20 latents for 784 pixels
X_SCALE = 1 / 255
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}

Function = Callable[..., Any]

# Bytes that an element of the large tensors has to move through memory: each input read once, each result written once.
# e and t are the bytes of an element of the inputs and of the targets; what belongs to rows comes on top (ROW_BYTES).
OF_LATENTS = LATENTS / PIXELS
ELEMENT_BYTES: dict[tuple[str, str], Callable[[int, int], float]] = {
    ("sample_gaussian", "forward"): lambda e, t: 3 * e,  # mu, logvar -> z
    ("sample_gaussian", "backward"): lambda e, t: 5 * e,  # mu, logvar, grad z -> grad mu, grad logvar
    ("sample_gaussian_log_ratio", "forward"): lambda e, t: 3 * e,  # the same
    ("sample_gaussian_log_ratio", "backward"): lambda e, t: 5 * e,
    ("gaussian_kl", "forward"): lambda e, t: 2 * e,  # mu, logvar ->
    ("gaussian_kl", "backward"): lambda e, t: 4 * e,  # mu, logvar -> grad mu, grad logvar
    ("bernoulli_log_prob", "forward"): lambda e, t: e + t,  # logits, x ->
    ("bernoulli_log_prob", "backward"): lambda e, t: 2 * e + t,  # logits, x -> grad logits
    ("gaussian_log_prob, fixed", "forward"): lambda e, t: e + t,  # mean, x ->
    ("gaussian_log_prob, fixed", "backward"): lambda e, t: 2 * e + t,  # mean, x -> grad mean
    ("gaussian_log_prob, learned", "forward"): lambda e, t: 2 * e + t,  # mean, logvar, x ->
    ("gaussian_log_prob, learned", "backward"): lambda e, t: 4 * e + t,  # mean, logvar, x -> two gradients
    ("FusedELBO", "forward"): lambda e, t: e + t + 2 * e * OF_LATENTS,  # logits, x, mu, logvar ->
    ("FusedELBO", "forward with gradient"): lambda e, t: 2 * e + t + 2 * e * OF_LATENTS,  # the same -> grad logits
    ("FusedELBO", "backward"): lambda e, t: 2 * e + t + 4 * e * OF_LATENTS,  # the same -> three gradients
    # The gradient of the logits is taken in the forward pass; what is left are those of mu and logvar.
    ("FusedELBO", "forward+backward"): lambda e, t: 2 * e + t + 6 * e * OF_LATENTS,
    ("normal", "forward"): lambda e, t: e,  # -> eps
}
SAMPLING = ("sample_gaussian", "sample_gaussian_log_ratio")
LATENT_OPS = (*SAMPLING, "gaussian_kl")
GAUSSIAN = ("gaussian_log_prob, fixed", "gaussian_log_prob, learned")
ROW_BYTES = {**dict.fromkeys((*LATENT_OPS, "bernoulli_log_prob", *GAUSSIAN), 4), "FusedELBO": 0, "normal": 0}
FIXED_LOGVAR = -0.7


# ---- the peers in PyTorch that benchmarks/cases.py has not ----------------------------------------------------------


def sample_log_ratio(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    eps = torch.randn_like(mu)
    z = mu + torch.exp(0.5 * logvar) * eps
    return z, 0.5 * (z * z - eps * eps - logvar).sum(-1)


def gaussian_fixed(mean: Tensor, x: Tensor) -> Tensor:
    constant = 0.5 * (FIXED_LOGVAR + math.log(2 * math.pi))
    return -(0.5 * math.exp(-FIXED_LOGVAR) * (x - mean) ** 2 + constant).sum(-1)


def gaussian_learned(mean: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
    return -0.5 * ((x - mean) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(-1)


def with_uint8(function: Function) -> Function:
    """A peer for pixels: it makes targets of them first."""

    def scaled(logits, x, *rest):
        return function(logits, x.to(logits.dtype) * X_SCALE, *rest)

    return scaled


# ---- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One op at one size: rows of `width` elements of `dtype`, targets of dtype `targets`."""

    op: str
    dtype: str
    targets: str | None
    rows: int
    width: int

    @classmethod
    def of(cls, op: str, dtype: str, targets: str | None, elements: int) -> Work:
        """About so many elements, in whole rows."""
        width = elements if op == "normal" else LATENT_WIDTH if op in LATENT_OPS else PIXELS
        return cls(op, dtype, targets, max(1, elements // width), width)

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype}" + (f", {self.targets} targets" if self.targets else "")

    @property
    def elements(self) -> int:
        return self.rows * self.width

    @property
    def x_scale(self) -> float | None:
        return X_SCALE if self.targets == "uint8" else None

    def bytes(self, direction: str) -> float:
        """That one call has to move."""
        e, t = (DTYPES[d].itemsize if d else 0 for d in (self.dtype, self.targets))
        whole = (self.op, direction) in ELEMENT_BYTES
        directions = [direction] if whole else direction.split("+")
        return sum(self.rows * (self.width * ELEMENT_BYTES[self.op, d](e, t) + ROW_BYTES[self.op]) for d in directions)

    def inputs(self, device: str) -> list[Tensor]:
        """Random tensors; those of `dtype` that are differentiated ask for a gradient."""
        rows, width, dtype = self.rows, self.width, DTYPES[self.dtype]

        def normal(*size: int) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device, requires_grad=True)

        if self.op == "normal":
            return [torch.randint(-(2**63), 2**63 - 1, (), device=device)]
        if self.op in LATENT_OPS:
            return [normal(rows, width), normal(rows, width)]
        assert self.targets
        if self.targets == "uint8":
            x = torch.randint(0, 256, (rows, width), dtype=torch.uint8, device=device)
        else:
            x = torch.rand(rows, width, dtype=DTYPES[self.targets], device=device)
        if self.op == "gaussian_log_prob, learned":
            return [normal(rows, width), normal(rows, width), x]
        if self.op != "FusedELBO":
            return [normal(rows, width), x]
        return [normal(rows, width), x, normal(rows, LATENTS), normal(rows, LATENTS)]

    def upstream(self, device: str) -> list[Tensor]:
        """Of a loss 1, as `loss.backward()` has it."""
        row = torch.randn(self.rows, device=device)
        if self.op in SAMPLING:
            return [torch.randn(self.rows, self.width, dtype=DTYPES[self.dtype], device=device), row]
        return [torch.ones((), device=device)] if self.op == "FusedELBO" else [row]

    # The bare ops, without autograd: what the kernels themselves take.

    def bare(self, inputs: list[Tensor], seed: Tensor, upstream: list[Tensor]) -> dict[str, Callable[[], Any]]:
        """By direction."""
        ops, call = torch.ops.aevb, functools.partial
        if self.op == "normal":
            return {"forward": call(ops.normal.default, inputs[0], [self.elements])}
        arguments: tuple[Any, ...]
        if self.op == "sample_gaussian":
            name, arguments = "sample_gaussian", (*inputs, seed, None)
        elif self.op == "sample_gaussian_log_ratio":
            name, arguments, upstream = self.op, (*inputs, seed, None, 0), [*upstream, None]  # type: ignore[list-item]
        elif self.op == "gaussian_kl":
            name, arguments = "gaussian_kl", (*inputs,)
        elif self.op == "bernoulli_log_prob":
            name, arguments = "log_prob", (*inputs, None, None, None, "bernoulli_logits", 0.0, self.x_scale)
            upstream = [*upstream, 1]  # type: ignore[list-item]
        elif self.op in GAUSSIAN:
            mean, *logvar, x = inputs
            likelihood = ("gaussian", logvar[0]) if logvar else ("gaussian_fixed", None)
            name, arguments = (
                "log_prob",
                (mean, x, likelihood[1], None, None, likelihood[0], FIXED_LOGVAR, self.x_scale),
            )
            upstream = [*upstream, 3 if logvar else 1]  # type: ignore[list-item]
        else:
            name, arguments = "negative_elbo", (*inputs, None, 1.0, 1, "bernoulli_logits", self.x_scale)
            upstream = [*upstream, 7]  # type: ignore[list-item]
        forward, backward = (getattr(ops, f"{name}_{d}").default for d in ("forward", "backward"))
        found: dict[str, Callable[[], Any]] = {
            "forward": call(forward, *arguments),
            "backward": call(backward, *arguments, *upstream),
        }
        if self.op == "FusedELBO":
            found["forward with gradient"] = call(ops.negative_elbo_and_grad.default, *arguments)
        return found

    # The providers, as functions of the inputs.

    def aevb(self) -> Function:
        if self.op in LATENT_OPS:
            return getattr(aevb, self.op)
        if self.op == "gaussian_log_prob, fixed":
            return lambda mean, x: aevb.gaussian_log_prob(mean, x, FIXED_LOGVAR, self.x_scale)
        if self.op == "gaussian_log_prob, learned":
            return lambda mean, logvar, x: aevb.gaussian_log_prob(mean, x, logvar, self.x_scale)
        if self.op == "bernoulli_log_prob":
            return functools.partial(aevb.bernoulli_log_prob, x_scale=self.x_scale)
        return aevb.FusedELBO(x_scale=self.x_scale)

    def peers(self) -> dict[str, Function]:
        """The ways to write the op in PyTorch, the plainest first."""
        ways: dict[str, dict[str, Function]] = {
            "sample_gaussian": {"as written": cases.sample, "one exp, addcmul": cases.sample_one_exp},
            "sample_gaussian_log_ratio": {"as written": sample_log_ratio},
            "gaussian_kl": {"as written": lambda mu, logvar: 0.5 * cases.kl_terms(mu, logvar).sum(-1)},
            "bernoulli_log_prob": {
                "binary_cross_entropy_with_logits": cases.bernoulli,
                "softplus": cases.bernoulli_softplus,
            },
            "gaussian_log_prob, fixed": {"as written": gaussian_fixed},
            "gaussian_log_prob, learned": {"as written": gaussian_learned},
            "FusedELBO": {"binary_cross_entropy_with_logits": cases.loss, "softplus": cases.loss_softplus},
        }
        scaled = with_uint8 if self.targets == "uint8" else lambda f: f
        return {way: scaled(f) for way, f in ways[self.op].items()}

    # What all of them must give.

    def reference(self, inputs: list[Tensor], eps: Tensor | None) -> tuple[Tensor, ...]:
        """Outputs in float64, of some of the rows."""
        r = aevb.reference
        if self.op == "sample_gaussian":
            return r.sample_gaussian(inputs[0], inputs[1], eps=eps)
        if self.op == "sample_gaussian_log_ratio":
            return r.sample_gaussian_log_ratio(inputs[0], inputs[1], eps=eps)
        if self.op == "gaussian_kl":
            return (r.gaussian_kl(inputs[0], inputs[1]),)
        if self.op == "bernoulli_log_prob":
            return (r.bernoulli_log_prob(inputs[0], inputs[1], self.x_scale),)
        if self.op in GAUSSIAN:
            mean, *logvar, x = inputs
            return (r.gaussian_log_prob(mean, x, logvar[0] if logvar else FIXED_LOGVAR, self.x_scale),)
        return (r.FusedELBO(reduction="sum", x_scale=self.x_scale)(*inputs) / self.rows,)


def outputs_of(function: Function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    found = function(*inputs)
    return found if isinstance(found, tuple) else (found,)


def differentiated(inputs: list[Tensor]) -> list[Tensor]:
    return [t for t in inputs if t.requires_grad]


def gradients(function: Function, inputs: list[Tensor], upstream: list[Tensor]) -> Any:
    return torch.autograd.grad(outputs_of(function, inputs), differentiated(inputs), upstream)


# ---- the plan -------------------------------------------------------------------------------------------------------

Kind = tuple[str, str, str | None]  # op, dtype of the inputs, dtype of the targets
KINDS: list[Kind] = [  # with peers, the most wanted first
    ("FusedELBO", "float32", "float32"),
    ("sample_gaussian", "float32", None),
    ("bernoulli_log_prob", "float32", "float32"),
    ("gaussian_kl", "float32", None),
    ("gaussian_log_prob, learned", "float32", "float32"),
    ("gaussian_log_prob, fixed", "float32", "float32"),
    ("sample_gaussian_log_ratio", "float32", None),
    ("FusedELBO", "bfloat16", "uint8"),
    ("sample_gaussian", "bfloat16", None),
    ("bernoulli_log_prob", "bfloat16", "uint8"),
    ("gaussian_kl", "bfloat16", None),
]
ALONE: list[Kind] = [
    ("normal", "float32", None),
    ("bernoulli_log_prob", "float32", "uint8"),
    ("bernoulli_log_prob", "float32", "bfloat16"),
    ("bernoulli_log_prob", "bfloat16", "float32"),
    ("bernoulli_log_prob", "bfloat16", "bfloat16"),
]
SMALL = [  # from Python
    Work("sample_gaussian", "float32", None, 100, 20),
    Work("bernoulli_log_prob", "float32", "float32", 100, 784),
    Work("FusedELBO", "float32", "float32", 100, 784),
    Work("FusedELBO", "float32", "float32", 1000, 784),
]


def with_peers(quick: bool) -> list[Work]:
    return [Work.of(*kind, 2**15 if quick else TARGET_SIZE) for kind in KINDS]


def alone(quick: bool) -> Iterator[Work]:
    """The most wanted first."""
    target, sizes = (2**15, (2**13, 2**15)) if quick else (TARGET_SIZE, SIZES)
    yield from (Work.of(*kind, target) for kind in ALONE)
    for size in sizes:
        if size != target:
            yield from (Work.of(*kind, size) for kind in (*KINDS, *ALONE))
