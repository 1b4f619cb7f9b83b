"""Values that are not what they are taken for: pixels of 0..255, logits for probabilities, x for recon.

A look at the values is a pass over them, and on a GPU a wait. So `validate_args` is None by default: the first call
that is eager, on a CPU, looks. True looks at every call and at more; False at none. Nobody looks under `torch.compile`,
`torch.export` and `torch.func`, where there are no values, and what was looked at is no guard of a compiled function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .. import _torch, likelihoods
from ..checks.errors import check_dense, is_dense, warn
from . import Likelihood

_functorch_active = _torch.functorch_active
_is_compiling = torch.compiler.is_compiling
_modes = _torch.num_dispatch_modes
_looked: set[str] = set()  # functions whose first call was looked at

FEWEST_LOGITS = 4  # that may lie in [0, 1] by chance
FAR = 0.5  # from [0, 1], which no rounding and little noise explains
NOISE = 10  # standard deviations that no noise reaches


def look(validate_args: bool | None, looked: bool, *tensors: Tensor) -> bool:
    """Whether a call that is not being compiled looks at these values, `looked` having been an earlier one."""
    if validate_args is False or (validate_args is None and looked):
        return False
    if _functorch_active() or _modes() or torch.jit.is_tracing():
        return False
    return all(
        type(t) in (Tensor, nn.Parameter)
        and is_dense(t)
        and (t.device.type == "cpu" or (validate_args is True and t.device.type != "meta"))
        for t in tensors
    )


def is_wanted(function: str, validate_args: bool | None, x: Tensor) -> bool:
    """Whether a function's call with x may be one that `look_once` looks at: quickly, at every call. In a graph,
    without having read what would be a guard."""
    return not _is_compiling() and (validate_args is True or (x.is_cpu and function not in _looked))


def look_once(function: str, validate_args: bool | None, check: Callable[..., None], *arguments) -> None:
    """``check(*arguments, strict)`` of a function's call: without validate_args, of its first in a process."""
    tensors = (t for t in arguments if isinstance(t, Tensor))
    if look(validate_args, function in _looked, *tensors):
        check(*arguments, validate_args is True)
        _looked.add(function)


def check_bernoulli(recon: Tensor | None, x: Tensor, x_scale: float | None, from_probs: bool, strict: bool) -> None:
    """Targets, and logits or probabilities, where they are in memory."""
    check_targets(x, x_scale, recon)
    if recon is not None and from_probs:
        check_probabilities(recon, x, strict)
    elif recon is not None:
        check_logits(recon, strict)


def check_gaussian(
    mean: Tensor | None, x: Tensor, x_scale: float | None, sigmoid: bool, strict: bool, family: Likelihood | None = None
) -> None:
    """Targets and means, or with `sigmoid` their logits; of another likelihood its targets and first parameter."""
    family = family or likelihoods.Gaussian()
    check_finite(x, x_scale, family)
    if strict and mean is not None:
        check_means(mean, family)
    if sigmoid:
        check_sigmoid_targets(x, x_scale, mean)


def check_likelihood(family: Likelihood, output: Tensor | None, x: Tensor, x_scale: float | None, strict: bool) -> None:
    """Targets, and the first of the parameters, where it is in memory."""
    if family.support == (0, 1):
        check_bernoulli(output, x, x_scale, getattr(family, "from_probs", False), strict)
        return
    sigmoid = getattr(family, "sigmoid_means", False)
    check_gaussian(output, x, x_scale, sigmoid, strict, family)


# ---- what is wrong, in a sentence -----------------------------------------------------------------------------------


def check_targets(x: Tensor, x_scale: float | None = None, recon: Tensor | None = None) -> None:
    """Raises ValueError, naming the first offender, unless x (times x_scale) lies in [0, 1].

    `recon` is looked at to say whether the two may be swapped.
    """
    ends = _ends(x, x_scale)
    if ends is None or (ends[0] >= 0 and ends[1] <= 1):
        return
    sentence = _first(x, x_scale, _between(0, 1))
    raise ValueError(f"{sentence}; a Bernoulli target lies in [0, 1]{_advice(ends, recon)}")


def check_finite(x: Tensor, x_scale: float | None, family: Likelihood) -> None:
    """The same unless x (times x_scale) is finite and in the likelihood's support."""
    ends = _ends(x, x_scale)
    if ends is None:
        return
    if not (math.isfinite(ends[0]) and math.isfinite(ends[1])):
        raise ValueError(f"{_first(x, x_scale, torch.isfinite)}; a {family.name.capitalize()} target is finite")
    low, high = family.support
    if not (low <= ends[0] and ends[1] <= high):
        sentence = _first(x, x_scale, _between(low, high))
        where = f"{low:g} or more" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{sentence}; with likelihood={family.name!r} a target is {where}")


def check_probabilities(recon: Tensor, x: Tensor, strict: bool) -> None:
    """Raises ValueError unless recon lies in [0, 1]; `strict` minds NaN too. Warns where it may be x."""
    ends = _ends(recon)
    if ends is None or (not strict and math.isnan(ends[0])):
        return
    if not (ends[0] >= 0 and ends[1] <= 1):
        sentence = _first(recon, None, _between(0, 1), "recon")
        raise ValueError(
            f"{sentence}; a probability lies in [0, 1]. For logits leave out from_probs=True, which is slower and less "
            "exact"
        )
    bits = ends == (0, 1) and bool(((recon == 0) | (recon == 1)).all())
    if bits and x.is_floating_point() and not ((x == 0) | (x == 1)).any():
        warn("recon holds nothing but 0 and 1, and x neither: they may be swapped. Expected criterion(recon, x, ...)")


def check_logits(logits: Tensor, strict: bool) -> None:
    """Warns of logits that all lie in [0, 1], as probabilities do; `strict` raises where one is not finite."""
    ends = _ends(logits)
    if ends is None:
        return
    if strict and not (math.isfinite(ends[0]) and math.isfinite(ends[1])):
        raise ValueError(f"{_first(logits, None, torch.isfinite, 'recon')}; a logit is finite")
    if 0 <= ends[0] < ends[1] <= 1 and logits.numel() >= FEWEST_LOGITS:
        warn(
            f"every logit lies in [0, 1] ({ends[0]:.3g} to {ends[1]:.3g}), as probabilities do. If the decoder ends in "
            "a sigmoid, leave it out, which is faster and more exact, or say FusedELBO(from_probs=True)"
        )


def check_means(mean: Tensor, family: Likelihood) -> None:
    """Raises ValueError where a mean, or whatever is the first of the parameters, is not finite."""
    ends = _ends(mean)
    if ends is not None and not (math.isfinite(ends[0]) and math.isfinite(ends[1])):
        sentence = _first(mean, None, torch.isfinite, "recon")
        raise ValueError(f"{sentence}; a {family.name.capitalize()}'s {family.params[0]} is finite")


def check_sigmoid_targets(x: Tensor, x_scale: float | None, mean: Tensor | None = None) -> None:
    """Warns where x is far from [0, 1], which is where the means of a sigmoid lie."""
    ends = _ends(x, x_scale)
    if ends is not None and not (ends[0] >= -FAR and ends[1] <= 1 + FAR):
        warn(
            f"x lies in {ends[0]:.4g}..{ends[1]:.4g}, and with sigmoid_means=True the means in 0..1"
            f"{_advice(ends, mean)}"
        )


def check_pixels(model: object, images: Mapping[str, Tensor | None], sigma: float = 0.0) -> None:
    """Raises ValueError where x of a Bernoulli model is not of [0, 1]; a Gaussian's may be so by noise, and warns far
    from it, if its means are of a sigmoid. Of models that say so, outside of graphs. `sigma` is that of noise in the
    images."""
    family = None if _is_compiling() else likelihoods.of(model)
    if family is None:
        return
    low, high = family.support
    must = math.isfinite(low) or math.isfinite(high)
    if not must and not getattr(family, "sigmoid_means", False):
        return
    for name, x in images.items():
        if x is None:
            continue
        check_dense(type(model).__name__, **{name: x})
        ends = _ends(x) if x.is_floating_point() and look(None, False, x) else None
        slack = NOISE * sigma + (0 if must else FAR)
        low, high = family.support if must else (0.0, 1.0)
        if ends is None or math.isnan(ends[0]) or (low - slack <= ends[0] and ends[1] <= high + slack):
            continue
        if must:
            sentence = _first(x, None, _between(low - slack, high + slack), name)
            where = "lie in [0, 1]" if (low, high) == (0, 1) else f"are {low:g} or more"
            raise ValueError(f"{sentence}; the model's pixels {where}{_scaling(ends)}")
        warn(f"{name} lies in {ends[0]:.4g}..{ends[1]:.4g}, and the model's pixels in 0..1{_scaling(ends)}")


def check_beta(beta: float) -> None:
    """Raises ValueError unless beta, the weight of the KL, is 0 or more."""
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta is {beta}; expected a number from 0 up: the loss is beta KL - log p(x|z)")


# ---- how it is said -------------------------------------------------------------------------------------------------


def _ends(x: Tensor, x_scale: float | None = None) -> tuple[float, float] | None:
    """The least and the largest of x times x_scale, NaN if there is one; None of what has none, or is no number yet."""
    if x.numel() == 0 or x.is_complex() or (x.dtype == torch.uint8 and x_scale is None):
        return None  # the op says what is missing
    if x.dtype == torch.bool:
        return 0.0, (1.0 if x_scale is None else x_scale) * float(x.any())
    ends = torch.stack(torch.aminmax(x.detach())).float()
    low, high = (ends if x_scale is None else ends * x_scale).tolist()
    return (low, high) if x_scale is None or x_scale >= 0 else (high, low)


def _between(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda t: (t >= low) & (t <= high)


def _first(x: Tensor, x_scale: float | None, is_right: Callable[[Tensor], Tensor], name: str = "x") -> str:
    """The first of x that is not right."""
    wrong = ~is_right(x.float() if x_scale is None else x.float() * x_scale)
    where = tuple(wrong.nonzero()[0].tolist())
    scale = "" if x_scale is None else f", times x_scale={x_scale}"
    return f"{name}{list(where)} is {x[where].item()}{scale}"


def _advice(ends: tuple[float, float], recon: Tensor | None) -> str:
    """What may be meant by a target outside [0, 1]."""
    of_recon = None if recon is None else _ends(recon)
    if of_recon is not None and 0 <= of_recon[0] < of_recon[1] <= 1:
        return ". recon lies in [0, 1]: the two may be swapped. Expected criterion(recon, x, ...)"
    return _scaling(ends)


def _scaling(ends: tuple[float, float]) -> str:
    low, high = ends
    if low >= 0 and 2 < high <= 256:
        return ". Of 0..255 it is x / 255 (or uint8 with x_scale=1/255)"
    if -1.01 <= low < 0 and high <= 1.01:
        return ". Of [-1, 1] it is (x + 1) / 2"
    return ""
