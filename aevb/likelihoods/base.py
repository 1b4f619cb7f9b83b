"""Base class of the likelihoods p(x|z), their registry, and shared arithmetic.

A class describes one family and is registered under its name. The loss, the models, the command line, imputation and
the tests read the registry. The kernels of the same name are in csrc/formulas/likelihood_list.h.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution

from ..checks.choices import unknown
from .outputs import GaussianOutput, LinearLogits, LinearOutput
from .target import Target, is_mask

Parameter = Tensor | float
Formula = Callable[[Tensor, Target, Any], Tensor]
C = TypeVar("C", bound="type[Likelihood]")

REGISTRY: dict[str, type[Likelihood]] = {}
OWNERS: dict[str, type[Likelihood]] = {}  # by option name


def register(cls: C) -> C:
    """Adds a likelihood's class to `REGISTRY` under its name.

    Its dataclass fields become its `options`, owned by it in `OWNERS`.
    """
    REGISTRY[cls.name] = cls
    cls.options = {field.name: field.default for field in dataclasses.fields(cls)}
    OWNERS.update(dict.fromkeys(cls.options, cls))
    return cls


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Likelihood p(x|z) of data whose elements are independent given z.

    A subclass is a frozen dataclass whose fields are its options. It gives `name`, `params` and `distribution`, and
    overrides methods for which it has a better formula. `mean`, `variance_of`, `sample` and `reference` follow from
    `distribution` by default.
    """

    options: ClassVar[dict[str, Any]]
    """Default of each option, by name."""
    name: ClassVar[str]
    """Name in `FusedELBO(likelihood=)`, on the command line, and of the kernel."""
    params: ClassVar[tuple[str, ...]]
    """Names of a decoder's outputs per element, in the kernel's order."""
    support: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    """Range of x."""
    of_bits: ClassVar[bool] = False
    """Whether x is bits; grey images are then binarized by default."""
    noise: ClassVar[tuple[str, ...]] = ()
    """Noise arguments of `denoise` with a formula for this likelihood."""
    initial: ClassVar[tuple[float, ...]] = (0.0, 0.0)
    """Initial bias of a decoder's last layer, for each parameter."""

    def distribution(self, *params: Tensor) -> Distribution:
        """Returns p(x|z) of each element as a PyTorch distribution."""
        raise NotImplementedError

    # ---- derived from the distribution ----

    def reference(
        self,
        params: tuple[Parameter, ...],
        x: Tensor,
        x_scale: float | None = None,
        weight: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Returns log p(x|z) in plain PyTorch, summed over the last dimension.

        It is computed in float32, or in float64 for float64 parameters, where it is the oracle of the tests. The
        arguments behind the parameters are those of a `Target`.
        """
        params = tuple(computed(p) if isinstance(p, Tensor) else p for p in params)
        first = params[0]
        assert isinstance(first, Tensor)
        if offset is not None:
            params = (first + offset.unsqueeze(-1), *params[1:])
        x = targets(x, x_scale, first.dtype)
        if weight is None:
            return self.element_log_prob(params, x).sum(-1)
        # The inputs are selected, not only the result: a NaN in them would come back in the gradient.
        selected = weight != 0
        params = tuple(torch.where(selected, p, 0.0) if isinstance(p, Tensor) else p for p in params)
        elements = self.element_log_prob(params, torch.where(selected, x, 0.0))
        elements = elements if is_mask(weight) else elements * weight
        return torch.where(selected, elements, 0.0).sum(-1)

    def element_log_prob(self, params: tuple[Parameter, ...], x: Tensor) -> Tensor:
        """Returns log p(x_i|z) of each element, of the parameters' shape."""
        return self.distribution(*tensors(params)).log_prob(x)

    def mean(self, params: tuple[Parameter, ...]) -> Tensor:
        """Returns E[x_i|z]."""
        return self.distribution(*tensors(params)).mean

    def variance_of(self, params: tuple[Parameter, ...]) -> Tensor:
        """Returns Var[x_i|z]."""
        return self.distribution(*tensors(params)).variance

    def sample(self, params: tuple[Parameter, ...], noise: Tensor) -> Tensor:
        """Returns a sample of p(x|z) from standard normals of its shape.

        The normals go through the inverse distribution function.
        """
        # In float64: float32 rounds the probability of normals beyond 5.4 to 1, whose inverse may be infinite.
        wide = self.distribution(*(p.double() for p in tensors(params)))
        return wide.icdf(torch.special.ndtr(noise.double())).to(noise.dtype)

    @property
    def density(self) -> Likelihood:
        """Normalised density p(x|z), for importance weights and log p(x).

        By default it is this likelihood itself.
        """
        return self

    def above_backward(self, variance: float, spread: Tensor, grad: Tensor) -> Tensor:
        """Returns the gradient by `above`'s argument from the upstream gradient."""
        return above_floor_backward(self.spread_of(variance), spread, grad)

    def constant(self, D: int) -> float:
        """Returns `density`'s log p(x|z) minus this likelihood's, for x of D elements."""
        return 0.0

    # ---- a decoder's output ----

    @property
    def is_whole(self) -> bool:
        """Whether a decoder gives one tensor, and the kernel takes one."""
        return len(self.params) == 1

    def parameters(self, recon: Any) -> tuple[Parameter, ...]:
        """Returns the parameters that recon holds.

        Raises:
            ValueError: recon is of another likelihood.
        """
        if isinstance(recon, Tensor) and self.is_whole:
            return (recon,)
        if (
            isinstance(recon, tuple)
            and not isinstance(recon, LinearLogits | LinearOutput | GaussianOutput)
            and len(recon) == len(self.params) > 1
        ):
            return tuple(recon)
        raise ValueError(f"recon is a {type(recon).__name__}; expected {self.expected()}")

    @property
    def has_logits(self) -> bool:
        """Whether a `LinearLogits` may stand for its parameter."""
        return self.params == ("logits",)

    def expected(self) -> str:
        """Returns the description of the recon that `FusedELBO` takes."""
        if self.is_whole:
            return f"a tensor, the {self.params[0]}, with likelihood={self.name!r}"
        return f"a tuple of tensors, ({', '.join(self.params)}), with likelihood={self.name!r}"

    def output(self, first: Tensor, second: Parameter) -> tuple[Parameter, ...]:
        """Returns both parameters as a model's `decode` gives them."""
        return first, second

    def spread_of(self, variance: float) -> float:
        """Returns the second parameter of a distribution with that variance.

        Only a likelihood with a parameter of scale has it.
        """
        raise NotImplementedError

    @property
    def has_spread(self) -> bool:
        """Whether the second parameter is one of scale.

        A model may share such a parameter, fix it, and keep it from 0.
        """
        return type(self).spread_of is not Likelihood.spread_of

    def above(self, variance: float, spread: Tensor) -> Tensor:
        """Returns the second parameter `spread`, kept above the value for `variance`.

        It approaches that value and never reaches it.
        """
        return above_floor(self.spread_of(variance), spread)

    def kernel_arguments(self, params: tuple[Parameter, ...]) -> tuple[Tensor, Tensor | None, str, float]:
        """Returns p0, p1, the kernel's name and its scalar, for op `log_prob`."""
        p0 = params[0]
        assert isinstance(p0, Tensor)
        if len(params) == 1:
            return p0, None, self.name, 0.0
        p1 = params[1]
        if not isinstance(p1, Tensor):
            p1 = torch.full((), finite(self.params[1], p1), dtype=torch.float32, device=p0.device)
        return p0, for_each_element(p1, p0), self.name, 0.0

    def linear_kernel(self, outputs: int, shared: Parameter | None) -> tuple[str, float, Parameter | None]:
        """Returns the kernel's name, its scalar and the shared parameter.

        Args:
            outputs: Numbers that the last layer gives for each element of x.
            shared: A second parameter that does not come from the layer.

        Raises:
            ValueError: Too few or too many parameters.
        """
        if outputs + (shared is not None) != len(self.params):
            more = "" if shared is None else ", and one is shared"
            raise ValueError(
                f"the last layer gives {outputs} numbers for each element of x{more}; expected {len(self.params)} in "
                f"all, {', '.join(self.params)}"
            )
        return self.name, 0.0, shared

    @classmethod
    def formulas(cls) -> dict[str, Formula]:
        """Returns log p(x|z) in plain PyTorch, by kernel name.

        Each is a function of (p0, target, p1 or the scalar).
        """
        made = cls()
        if len(cls.params) == 1:
            return {cls.name: lambda p0, target, _: made.reference((p0,), *target)}
        return {cls.name: lambda p0, target, p1: made.reference((p0, p1), *target)}


def named(likelihood: str, **options: Any) -> Likelihood:
    """Returns the likelihood of that name with the given options.

    An option at its default may be given for any likelihood.

    Args:
        likelihood: A name in `REGISTRY`.
        **options: Options of the likelihoods, by name.

    Raises:
        ValueError: An unknown name, or an option of another likelihood.
    """
    cls = REGISTRY.get(likelihood) if isinstance(likelihood, str) else None
    if cls is None:
        raise unknown("likelihood", likelihood, REGISTRY)
    for option, value in options.items():
        owner = OWNERS[option]
        if owner is not cls and value != owner.options[option]:
            raise ValueError(
                f"{option} is {value}, of the {owner.name.capitalize()} likelihood; expected "
                f"likelihood={owner.name!r} with it, not {likelihood!r}"
            )
    return cls(**{option: value for option, value in options.items() if option in cls.options})


def of(model: Any) -> Likelihood | None:
    """Returns a model's likelihood, or None where it has none.

    It is the object in its `family`, or the likelihood that its `likelihood` names.
    """
    found = getattr(model, "family", None)
    if found is None and (name := getattr(model, "likelihood", None)) in REGISTRY:
        found = for_model(name, getattr(model, "sigmoid_means", False))
    return found


def for_model(likelihood: str, sigmoid_means: bool) -> Likelihood:
    """Returns the likelihood of that name, with sigmoid_means where possible.

    sigmoid_means is ignored where the likelihood has no such option.

    Raises:
        ValueError: An unknown name.
    """
    found = named(likelihood)
    if sigmoid_means and "sigmoid_means" in found.options:
        found = named(likelihood, sigmoid_means=True)
    return found


# ---- arithmetic that formulas share ---------------------------------------------------------------------------------


def computed(t: Tensor) -> Tensor:
    """Returns t in float32, or in float64 where it is float64."""
    return t if t.dtype == torch.float64 else t.float()


def targets(x: Tensor, x_scale: float | None, dtype: torch.dtype) -> Tensor:
    """Returns x times x_scale in a dtype."""
    x = x.to(dtype)
    return x if x_scale is None else x * x_scale


def above_floor(floor: float, t: Tensor) -> Tensor:
    """Returns floor + softplus(t - floor).

    Far below the floor there is still a gradient that leads back.
    """
    return floor + F.softplus(t - floor)


def above_floor_backward(floor: float, t: Tensor, grad: Tensor) -> Tensor:
    """Returns `above_floor`'s gradient by t from the upstream gradient, as autograd does."""
    return torch.ops.aten.softplus_backward(grad, t - floor, 1, 20)


def finite(name: str, value: Any) -> float:
    """Returns a parameter given as a number, as a float.

    Raises:
        ValueError: Not a number, or not finite.
    """
    try:
        is_right = math.isfinite(value)
    except TypeError:
        is_right = False
    if not is_right:
        what = "the logarithm of the variance" if name == "logvar" else f"the {name}"
        raise ValueError(f"{name} is {value!r}; expected a finite number, {what}, or a tensor")
    return float(value)


def tensors(params: tuple[Parameter, ...]) -> list[Tensor]:
    """Returns the parameters as tensors of the first one's dtype and device."""
    first = params[0]
    assert isinstance(first, Tensor)
    return [p if isinstance(p, Tensor) else torch.full((), p, dtype=first.dtype, device=first.device) for p in params]


def for_each_element(p: Tensor, like: Tensor) -> Tensor:
    """Returns p in the shape of `like`, with equal rows stored once.

    A p that does not broadcast to that shape, or is no float, is returned as it is: the op raises then. A float64 is
    rounded beside another dtype.
    """
    if p.dtype == torch.float64 != like.dtype:
        p = p.float()
    if p.shape == like.shape or p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return p
    sizes = zip(reversed(p.shape), reversed(like.shape), strict=False)
    if p.dim() > like.dim() or any(n not in (1, to) for n, to in sizes):
        return p
    p = p.float()  # its gradient is a sum, in float32
    if p.dim() == 0 or p.shape[-1] == 1:  # kernels need the elements of a row to be contiguous
        p = p.expand(*p.shape[:-1], like.shape[-1]).contiguous()
    return p.expand(like.shape)
