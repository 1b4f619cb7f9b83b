"""Models of a user's own: any module that encodes x and gives log p(x|z)."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..inference.protocols import encoded, log_prob_observed
from ..ops.linear import floating
from ..ops.plain_modules import weight_of
from .base import BaseVAE

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:Class, which can be made again
GIVEN = re.compile(r".+:.+\(\)")  # module:Class(), an object that was handed over


def check_model(model: object) -> None:
    """Raises TypeError unless the trainer can train this: a module with `encode` and `log_prob`."""
    missing = [name for name in ("encode", "log_prob") if not callable(getattr(model, name, None))]
    if not isinstance(model, nn.Module) or missing:
        lacks = f" without {' and '.join(missing)}" if missing else ", which is no torch.nn.Module"
        raise TypeError(
            f"the model is a {type(model).__name__}{lacks}; expected a torch.nn.Module with encode(x) -> (mu, logvar), "
            "each (B, latent_dim), and log_prob(x, z) -> log p(x|z), (*samples, B), in nats"
        )


def encode(model: Any, x: Tensor, x_scale: float | None, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns mu and logvar of x, to be multiplied by x_scale, which holds 0 where it is missing.

    A model of aevb's takes bits and bytes as they are, any other floating x. One whose `mask_input` is true is given
    the mask too.
    """
    if isinstance(model, BaseVAE):
        return model.encode(x, x_scale, observed=observed) if model.mask_input else model.encode(x, x_scale)
    posterior = encoded(model, floating(x, x_scale, weight_of(model)), observed)
    if not isinstance(posterior, tuple | list) or len(posterior) != 2:
        kind = f"{len(posterior)} values" if isinstance(posterior, tuple | list) else f"a {type(posterior).__name__}"
        raise TypeError(f"{type(model).__name__}.encode gave {kind}; expected (mu, logvar), each (B, latent_dim)")
    mu, logvar = posterior
    return mu.float(), logvar.float()


def log_prob_of(model: Any, x: Tensor, x_scale: float | None, z: Tensor, observed: Tensor | None = None) -> Tensor:
    """Returns log p(x|z) of what is observed of x, to be multiplied by x_scale: (*samples, B), in nats."""
    if isinstance(model, BaseVAE):
        x = x if x_scale is None else floating(x, x_scale, weight_of(model))
        return log_prob_observed(model, x, z, observed)
    weight = weight_of(model)
    log_prob = log_prob_observed(model, floating(x, x_scale, weight), z.to(weight.dtype), observed)
    if tuple(log_prob.shape) != tuple(z.shape[:-1]):
        raise ValueError(
            f"{type(model).__name__}.log_prob gave shape {tuple(log_prob.shape)} for z of {tuple(z.shape)}; expected "
            f"{tuple(z.shape[:-1])}: log p(x|z) of each sample and datapoint, summed over x's elements"
        )
    return log_prob.float()


def class_named(name: str) -> type[nn.Module]:
    """Returns the class of a name such as "mymodule:MyVAE", also of a module in the working directory.

    Raises:
        ValueError: there is no such module, or no such class in it.
    """
    module_name, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"architecture is {name!r}, but there is no module {error.name}; expected one that is installed, or in the "
            "working directory"
        ) from error
    kind = getattr(module, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"architecture is {name!r}, but {module_name} has no torch.nn.Module called {class_name}")
    return kind


def build(name: str, options: Mapping[str, Any]) -> Any:
    """Makes the model of a class, of those options that its constructor takes.

    Raises:
        ValueError: there is no such class, or its constructor wants more.
        TypeError: it is no model.
    """
    kind = class_named(name)
    has_own = kind.__init__ is not nn.Module.__init__
    parameters = inspect.signature(kind).parameters.values() if has_own else ()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name for p in parameters}
    wanted = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if unknown := sorted(set(wanted) - set(options)):
        raise ValueError(
            f"{name} wants {', '.join(unknown)}, which no option of a run gives; expected arguments with a default, or "
            f"some of {', '.join(options)}"
        )
    model = kind(**{key: value for key, value in options.items() if takes_all or key in known})
    check_model(model)
    return model


def name_of(model: nn.Module) -> str:
    """Returns the name of a model that was handed over, by which it cannot be made again."""
    return f"{type(model).__module__}:{type(model).__qualname__}()"


def metadata_of(model: nn.Module) -> dict[str, str]:
    """Returns the header of a file of weights, which names the model."""
    if isinstance(model, BaseVAE):
        return model.metadata()
    return {"model": json.dumps({"class": name_of(model)})}


def load_weights(model: nn.Module, path: Path) -> None:
    """Puts a file's weights into a model.

    Raises:
        ValueError: the file is damaged, or of another model.
    """
    import safetensors
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} does not hold the weights of this {type(model).__name__}: {error}") from error
