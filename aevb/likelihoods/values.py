"""Checks for values of a wrong kind.

Examples are pixels in 0..255, logits given for probabilities, and x given for recon.

A check is a pass over the values, and on a GPU a synchronization. So `validate_args` is None by default: the first
eager call on a CPU is checked. True checks every call, and more. False checks none.

Nothing is checked under `torch.compile`, `torch.export` and `torch.func`, where there are no values. The record of
checked functions is no guard of a compiled function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .. import _torch, likelihoods
from ..checks.errors import check_dense, is_dense, warn
from . import Likelihood
from .target import Target

_functorch_active = _torch.functorch_active
_is_compiling = torch.compiler.is_compiling
_modes = _torch.num_dispatch_modes
_looked: set[str] = set()  # functions whose first call was checked

FEWEST_LOGITS = 4  # fewer may all lie in [0, 1] by chance
FAR = 0.5  # distance from [0, 1] beyond rounding and little noise
NOISE = 10  # standard deviations beyond any noise


def look(validate_args: bool | None, looked: bool, *tensors: Tensor) -> bool:
    """Whether a call outside of compilation checks these values.

    Args:
        validate_args: None, True or False, as in the module's docstring.
        looked: An earlier call of the function was checked.
        *tensors: The values. Dense tensors on a CPU are checked; on another device, only with validate_args=True.
    """
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
    """Whether `look_once` may check a call with x: quick, at every call.

    While compiling it answers False without reading any state that would become a guard.
    """
    return not _is_compiling() and (validate_args is True or (x.is_cpu and function not in _looked))


def look_once(
    function: str, validate_args: bool | None, family: Likelihood, output: Tensor | None, target: Target
) -> None:
    """Runs `check_likelihood` for a function's call.

    Without validate_args only the first call in a process is checked.

    Args:
        function: Name of the function.
        validate_args: None, True (strict) or False.
        family: The likelihood.
        output: Its first parameter, or None where it is not in memory.
        target: x and its weights.
    """
    if look(validate_args, function in _looked, *(t for t in (target.x, output) if t is not None)):
        check_likelihood(family, output, target, validate_args is True)
        _looked.add(function)


def check_bernoulli(recon: Tensor | None, x: Tensor, x_scale: float | None, from_probs: bool, strict: bool) -> None:
    """Checks the targets, and logits or probabilities if in memory.

    Args:
        recon: Logits or probabilities, or None.
        x: Targets.
        x_scale: Multiplies x.
        from_probs: recon holds probabilities.
        strict: Check more (validate_args=True).

    Raises:
        ValueError: See `check_targets`, `check_probabilities` and `check_logits`.
    """
    check_targets(x, x_scale, recon)
    if recon is not None and from_probs:
        check_probabilities(recon, x, strict)
    elif recon is not None:
        check_logits(recon, strict)


def check_gaussian(
    mean: Tensor | None, x: Tensor, x_scale: float | None, sigmoid: bool, strict: bool, family: Likelihood | None = None
) -> None:
    """Checks the targets and means, or with `sigmoid` the targets against 0..1.

    Args:
        mean: The first parameter, or None.
        x: Targets.
        x_scale: Multiplies x.
        sigmoid: The means are sigmoids of `mean`.
        strict: Check that the first parameter is finite.
        family: Another likelihood than the Gaussian.

    Raises:
        ValueError: See `check_finite` and `check_means`.
    """
    family = family or likelihoods.Gaussian()
    check_finite(x, x_scale, family)
    if strict and mean is not None:
        check_means(mean, family)
    if sigmoid:
        check_sigmoid_targets(x, x_scale, mean)


def check_likelihood(family: Likelihood, output: Tensor | None, target: Target, strict: bool) -> None:
    """Checks the targets of any likelihood, and its first parameter.

    Elements that take no part are not looked at.

    Args:
        family: The likelihood.
        output: Its first parameter, or None where it is not in memory.
        target: x and its weights.
        strict: Check more (validate_args=True).

    Raises:
        ValueError: Values outside the support, or not finite; a weight that is negative or not finite.
    """
    x, x_scale = target.selected(), target.x_scale
    if target.weight is not None:
        check_weight(target.weight)
        # Laid out differently, an output has no element that is known to take no part.
        fits = output is not None and output.shape[output.dim() - x.dim() :] == x.shape
        output = torch.where(target.weight != 0, output, 0.0) if fits else None  # type: ignore[arg-type]
    if family.support == (0, 1):
        check_bernoulli(output, x, x_scale, getattr(family, "from_probs", False), strict)
        return
    sigmoid = getattr(family, "sigmoid_means", False)
    check_gaussian(output, x, x_scale, sigmoid, strict, family)


def check_weight(weight: Tensor) -> None:
    """Checks that weights are finite and not negative.

    Raises:
        ValueError: A weight that is; the message names the first.
    """
    ends = _ends(weight) if weight.is_floating_point() else None
    if ends is not None and not (ends[0] >= 0 and ends[1] < math.inf):
        sentence = _first(weight, None, lambda w: (w >= 0) & (w < math.inf), "weight")
        raise ValueError(f"{sentence}; a weight is finite and 0 or more")


# ---- checks of values -----------------------------------------------------------------------------------------------


def check_targets(x: Tensor, x_scale: float | None = None, recon: Tensor | None = None) -> None:
    """Checks that x (times x_scale) lies in [0, 1].

    `recon` is read only to say whether the two may be swapped.

    Raises:
        ValueError: A target outside [0, 1]; the message names the first.
    """
    ends = _ends(x, x_scale)
    if ends is None or (ends[0] >= 0 and ends[1] <= 1):
        return
    sentence = _first(x, x_scale, _between(0, 1))
    raise ValueError(f"{sentence}; a Bernoulli target lies in [0, 1]{_advice(ends, recon)}")


def check_finite(x: Tensor, x_scale: float | None, family: Likelihood) -> None:
    """Checks that x (times x_scale) is finite and in the likelihood's support.

    Raises:
        ValueError: A target that is not; the message names the first.
    """
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
    """Checks that recon lies in [0, 1]; warns of a swapped x.

    With `strict`, NaN is refused too.

    Raises:
        ValueError: A value outside [0, 1].
    """
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
    """Warns of logits that all lie in [0, 1], as probabilities do.

    Raises:
        ValueError: With `strict`, a logit that is not finite.
    """
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
    """Checks that the first parameter, such as the mean, is finite.

    Raises:
        ValueError: A value that is not finite.
    """
    ends = _ends(mean)
    if ends is not None and not (math.isfinite(ends[0]) and math.isfinite(ends[1])):
        sentence = _first(mean, None, torch.isfinite, "recon")
        raise ValueError(f"{sentence}; a {family.name.capitalize()}'s {family.params[0]} is finite")


def check_sigmoid_targets(x: Tensor, x_scale: float | None, mean: Tensor | None = None) -> None:
    """Warns where x is far from sigmoid means in [0, 1]."""
    ends = _ends(x, x_scale)
    if ends is not None and not (ends[0] >= -FAR and ends[1] <= 1 + FAR):
        warn(
            f"x lies in {ends[0]:.4g}..{ends[1]:.4g}, and with sigmoid_means=True the means in 0..1"
            f"{_advice(ends, mean)}"
        )


def check_pixels(model: object, images: Mapping[str, Tensor | None], sigma: float = 0.0) -> None:
    """Checks that images lie in the range of a model's pixels.

    Models with a bounded likelihood, such as Bernoulli, refuse other values. A Gaussian model with sigmoid means allows
    noise, and warns far from [0, 1]. Models without a likelihood are not checked, and compiled code is not either.

    Args:
        model: The model.
        images: Tensors by argument name, or None.
        sigma: Standard deviation of the noise in the images.

    Raises:
        ValueError: A value outside the support.
        TypeError: A tensor that is not dense.
    """
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


# ---- parts of the messages ------------------------------------------------------------------------------------------


def _ends(x: Tensor, x_scale: float | None = None) -> tuple[float, float] | None:
    """Returns the least and the largest value of x times x_scale.

    They are NaN if a value is NaN. The result is None for an empty x, a complex one, or uint8 without x_scale.
    """
    if x.numel() == 0 or x.is_complex() or (x.dtype == torch.uint8 and x_scale is None):
        return None  # the op raises for these
    if x.dtype == torch.bool:
        return 0.0, (1.0 if x_scale is None else x_scale) * float(x.any())
    ends = torch.stack(torch.aminmax(x.detach())).float()
    low, high = (ends if x_scale is None else ends * x_scale).tolist()
    return (low, high) if x_scale is None or x_scale >= 0 else (high, low)


def _between(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda t: (t >= low) & (t <= high)


def _first(x: Tensor, x_scale: float | None, is_right: Callable[[Tensor], Tensor], name: str = "x") -> str:
    """Returns the place and value of the first wrong element."""
    wrong = ~is_right(x.float() if x_scale is None else x.float() * x_scale)
    where = tuple(wrong.nonzero()[0].tolist())
    scale = "" if x_scale is None else f", times x_scale={x_scale}"
    return f"{name}{list(where)} is {x[where].item()}{scale}"


def _advice(ends: tuple[float, float], recon: Tensor | None) -> str:
    """Returns a hint at the cause of a target outside [0, 1]."""
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
