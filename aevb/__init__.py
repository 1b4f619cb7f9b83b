"""aevb: variational autoencoders in PyTorch, with fused, exact and reproducible ELBO kernels.

After Kingma & Welling, *Auto-Encoding Variational Bayes* (2013). The ops and `FusedELBO` drop into any PyTorch model;
`VAE` and `Trainer` are the paper's model and algorithm; `aevb.reference` has every function in plain PyTorch.

* A loss for a model of yours: `FusedELBO`; its recon may be a `LinearLogits`, `LinearOutput` or `GaussianOutput`.
* The loss in parts: `sample_gaussian`, `sample_gaussian_log_ratio`, `gaussian_kl`; `bernoulli_log_prob`,
  `gaussian_log_prob`, `linear_bernoulli_log_prob`; of any of `likelihoods` `log_prob`, `linear_log_prob` and
  `sample_likelihood`; `elbo`, `importance_weighted_bound`; `free_bits`, `capacity`, `linear_warmup`, `cyclical_warmup`.
* A model and its training: `VAE`, `ConvVAE` (both `BaseVAE`), `TrainConfig`, `Trainer`; `load` gives a run's model;
  `data.load`, a data set. `linear` and `binarize` are a layer and dynamic binarization by themselves.
* What it is worth: `log_marginal_likelihood`, `diagnostics`, `Evaluation`.
* What is raised: `NotFiniteError`, `CheckpointError`, `RunFolderError`, and PyTorch's and Python's own.
* Seeds for datapoints, steps and ranks: `mix_seed`. What this installation has: `build_info`.
"""

import torch  # noqa: F401  the kernels link against it, so it comes first

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"aevb's kernels could not be loaded ({error}). If this is a checkout of aevb, build them with `pip install .`"
    ) from error

from . import diagnostics, likelihoods, reference
from .bounds import capacity, cyclical_warmup, elbo, free_bits, importance_weighted_bound, linear_warmup
from .inference.marginal_likelihood import log_marginal_likelihood
from .info import build_info
from .likelihoods import GaussianOutput, LinearLogits, LinearOutput
from .losses.elbo import FusedELBO
from .models import VAE, BaseVAE, ConvVAE
from .ops import (
    bernoulli_log_prob,
    binarize,
    gaussian_kl,
    gaussian_log_prob,
    log_prob,
    mix_seed,
    sample_gaussian,
    sample_gaussian_log_ratio,
    sample_likelihood,
)
from .ops.fused_linear import linear_bernoulli_log_prob, linear_log_prob
from .ops.linear import linear
from .training.checkpoint import CheckpointError
from .training.config import TrainConfig
from .training.metrics import Evaluation, NotFiniteError
from .training.run_dir import RunFolderError, load
from .training.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "BaseVAE",
    "CheckpointError",
    "ConvVAE",
    "Evaluation",
    "FusedELBO",
    "GaussianOutput",
    "LinearLogits",
    "LinearOutput",
    "NotFiniteError",
    "RunFolderError",
    "TrainConfig",
    "Trainer",
    "bernoulli_log_prob",
    "binarize",
    "build_info",
    "capacity",
    "cyclical_warmup",
    "diagnostics",
    "elbo",
    "free_bits",
    "gaussian_kl",
    "gaussian_log_prob",
    "importance_weighted_bound",
    "likelihoods",
    "linear",
    "linear_bernoulli_log_prob",
    "linear_log_prob",
    "linear_warmup",
    "load",
    "log_marginal_likelihood",
    "log_prob",
    "mix_seed",
    "reference",
    "sample_gaussian",
    "sample_gaussian_log_ratio",
    "sample_likelihood",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "__doc__", "data"])
