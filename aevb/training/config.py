"""Options of a training run, all in one place."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ..checks.arguments import ArgumentTypeError, converted
from ..checks.choices import ESTIMATORS, PriorName
from ..data import is_name
from ..likelihoods import REGISTRY
from ..models.own import GIVEN
from ..models.own import NAME as OWN_CLASS

if TYPE_CHECKING:
    LikelihoodName = str
    EstimatorName = str
else:
    LikelihoodName = Literal[tuple(REGISTRY)]
    EstimatorName = Literal[tuple(ESTIMATORS)]


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run: command line, Python API and config.json.

    A value is converted to its field's type where its meaning is plain: a path, a NumPy number, "1e-3", or 8 for (8,).

    Raises:
        ValueError: a value is of another type or out of range; the text is a sentence that names the option.
    """

    # --help keeps the line breaks of these docstrings, so they break where sentences end.

    data: str = "digits"
    """What to train on: "digits" ships with aevb; "mnist", "fashion-mnist", "freyfaces" are downloaded;
    or a path: .npy, .npz, .mat, .amat, an IDX file, a directory of MNIST's four, a folder of images."""
    validation: float = 0.0
    """Part of the training images held out to choose the best epoch by, and to stop early; a set's own is kept."""
    split_seed: int = 0
    """The permutation by which test and validation images are held out, where a data set has none of its own."""
    missing: Literal["nan"] | None = None
    """nan: a NaN in the data is a missing value. The likelihood is then of what was observed."""
    mask: str | None = None
    """A .npy file, bool or 0 and 1: 1 or True where a value is observed; of the data's shape, or one mask for all.
    Where the data have parts of their own, a .npz file with a mask for each: train, test, validation."""
    mask_input: bool = False
    """Give the encoder the mask too, beside the values. Without it a missing value is a 0 to the encoder."""
    out: str | None = None
    """The run folder. By default runs/<data>, or runs/<data>-2, -3, ... where a run is there already."""
    overwrite: bool = False
    """Delete the run that the folder holds. Without this a run that is there is kept, and no new one starts."""
    resume: bool = False
    """Go on with the run in the folder (by default runs/<data>), to the bit as if it had never stopped.
    The options must be those that it began with. Where there is no run, start it."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 100
    """Images a step (the paper's M), of all processes together."""
    architecture: str = "mlp"
    """mlp: fully connected tanh layers, as in the paper; conv: a small convolutional encoder and decoder;
    or a class of your own, mymodule:MyVAE, with encode(x) and log_prob(x, z)."""
    hidden_dims: tuple[int, ...] = (500,)
    """Units of the encoder's tanh layers, from the image on; the decoder has the same in reverse."""
    channels: tuple[int, ...] = (32, 64)
    """Of "conv": channels of the encoder's layers, each halving the image; the decoder has the same in reverse."""
    latent_dim: int = 20
    """Dimensions of z."""
    prior: PriorName = "standard"
    """p(z): standard, N(0, I); learned, a Gaussian whose mean and variance in each dimension are learned too."""
    likelihood: LikelihoodName = "bernoulli"
    """p(x|z): bernoulli for bits, and for grey values as their probabilities; gaussian and laplace for grey values;
    exponential for intensities; mse, half the squared error."""
    variance: Literal["learned", "shared"] | float = "learned"
    """Of gaussian and laplace: learned for each pixel and z, as in the paper; one learned number for all; or fixed."""
    optimizer: Literal["adam", "adagrad"] = "adam"
    """The paper used Adagrad."""
    learning_rate: float = 1e-3
    """Step size; for Adagrad try the paper's 0.01, 0.02 or 0.1."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate falls to 0 over the epochs, if it does."""
    learning_rate_warmup: int = 0
    """Steps in which the learning rate grows from 0, before the schedule."""
    clip_norm: float | None = None
    """The gradient's norm, over all weights, is scaled down to this where it is larger."""
    estimator: EstimatorName = "sgvb-b"
    """The loss: the ELBO with its KL in closed form (sgvb-b), from samples (sgvb-a),
    or that with the gradient of the path alone (stl); the importance-weighted bound (iwae),
    or that with the doubly reparameterized gradient (dreg)."""
    num_samples: int = 1
    """Samples of z for each image and step (the paper's L, the k of importance-weighted autoencoders)."""
    beta: float = 1.0
    """Weight of the KL divergence in the loss. The ELBO reported always has weight 1;
    the bound of iwae and dreg, reported while they train, has this weight."""
    warmup_epochs: int = 0
    """Epochs in which the weight of the KL grows from 0 to beta."""
    warmup_cycles: int = 1
    """How often it does so within these epochs. More than 1: in the first half of each cycle, then it stays."""
    free_bits: float | None = None
    """Nats of KL that are free in each dimension of z, so that fewer dimensions collapse; sgvb-b only."""
    capacity: float | None = None
    """Nats of KL to aim for: the loss has beta times the KL's distance from it; sgvb-b only."""
    binarize: Literal["auto", "dynamic", "threshold", "none"] = "auto"
    """What becomes of grey pixels: set with their grey value as the probability, anew at each step (dynamic);
    set where above half (threshold); or grey as they are (none).
    By default dynamic for the Bernoulli likelihood, none for all others."""
    patience: int | None = None
    """Stop after so many epochs without a better ELBO of the validation images."""
    seed: int = 0
    """Everything random follows from it: one seed, one result, to the bit, on the same machine and threads."""
    deterministic: bool = False
    """Refuse operations whose bits may differ from run to run; slower on a GPU. On a CPU there are none."""
    device: str = "cpu"
    """Where to train: "cpu", "cuda", "cuda:1". On a GPU a step is captured in a CUDA graph."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the matrix products; losses, KLs and weights are float32.
    bf16 is faster where the processor has instructions for it: AMX or AVX512-BF16, a GPU."""
    threads: int | None = None
    """Threads to train with. By default PyTorch's number, but one where a step is too little work to be shared."""
    checkpoint_seconds: float = 30.0
    """Seconds between two checkpoints: of work that a kill may cost, beside the step or evaluation it is in."""
    invert: bool = False
    """Show images inverted in the pictures, 0 as white: digits dark on white."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too; needs `pip install "aevb[tensorboard]"`."""
    progress: bool = True
    """The progress bar; --no-progress for none."""

    def __post_init__(self) -> None:
        if isinstance(self.data, os.PathLike) and is_name(os.fspath(self.data)):
            object.__setattr__(self, "data", os.path.join(os.curdir, self.data))  # a path, not the data set's name
        for name, hint in _hints().items():
            object.__setattr__(self, name, converted(name, getattr(self, name), hint))
        if self.binarize == "auto":
            object.__setattr__(self, "binarize", "dynamic" if self._is_of_bits() else "none")
        for name in ("epochs", "batch_size", "latent_dim", "num_samples", "warmup_cycles"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_epochs", "learning_rate_warmup", "checkpoint_seconds"):
            self._expect(name, 0 <= getattr(self, name) < math.inf, "a number from 0 up")
        for name in ("threads", "patience"):
            self._expect(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name, what in (("hidden_dims", "units"), ("channels", "channels")):
            sizes = getattr(self, name)
            self._expect(name, bool(sizes) and min(sizes) >= 1, f"the {what} of each layer, at least 1")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            self._expect(name, value is None or 0 < value < math.inf, "a positive number")
        self._expect("beta", 0 <= self.beta < math.inf, "a number from 0 up")
        self._expect("validation", 0 <= self.validation < 1, "a fraction from 0 up, below 1")
        self._expect("seed", -(2**63) <= self.seed < 2**63, "a 64-bit signed integer")
        self._expect("split_seed", 0 <= self.split_seed < 2**32, "0 to 2**32 - 1")
        own = OWN_CLASS.fullmatch(self.architecture) or GIVEN.fullmatch(self.architecture)
        self._expect(
            "architecture", bool(own) or self.architecture in ("mlp", "conv"), "'mlp', 'conv' or 'mymodule:MyVAE'"
        )
        for name, choices in _choices().items():
            self._expect(name, getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}")
        self._check_combinations()

    def _is_of_bits(self) -> bool:
        return self.likelihood not in REGISTRY or REGISTRY[self.likelihood].of_bits

    def _check_combinations(self) -> None:
        if ESTIMATORS[self.estimator].importance_weighted and self.num_samples == 1:
            raise ValueError(
                f"num_samples is 1 and the estimator {self.estimator!r}, which weighs samples against each other; "
                "expected at least 2"
            )
        if self.warmup_cycles > 1 and self.warmup_epochs == 0:
            raise ValueError(f"warmup_cycles is {self.warmup_cycles}, of warmup_epochs=0; expected warmup_epochs too")
        for name in ("free_bits", "capacity"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf and self.estimator == "sgvb-b"):
                raise ValueError(
                    f"{name} is {value} and the estimator {self.estimator!r}; expected a number from 0 up, and 'sgvb-b'"
                )
        if not isinstance(self.variance, str):
            self._expect("variance", 0 < self.variance < math.inf, "'learned', 'shared' or a positive number")
        if not self._is_of_bits() and self.binarize != "none":
            raise ValueError(
                f"binarize is {self.binarize!r} and the likelihood {self.likelihood!r}, of grey values; expected 'none'"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite are both set; expected one of them: go on with a run, or delete it")

    def _expect(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    @classmethod
    def of(cls, options: Mapping[str, Any], where: object) -> TrainConfig:
        """Returns the config with the options of a config.json.

        Args:
            options: the contents of config.json.
            where: the file, which the error's text names.

        Raises:
            ValueError: an option is unknown, of another type or out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"{where} has options that aevb does not know: {', '.join(unknown)}")
        try:
            return cls(**options)
        except ArgumentTypeError as error:
            raise ValueError(f"{where} has an option of another type than aevb's: {error}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


@functools.cache
def _hints() -> dict[str, Any]:
    """Types of the options, by name."""
    return get_type_hints(TrainConfig)


@functools.cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """Choices of the options of a Literal type, by name."""
    return {name: get_args(hint) for name, hint in _hints().items() if get_origin(hint) is Literal}


# Options that may change when a run is resumed: where and how long it runs, not the numbers it computes.
MAY_CHANGE = frozenset(
    (
        *("out", "overwrite", "resume", "epochs", "patience", "device", "threads"),
        *("checkpoint_seconds", "invert", "tensorboard", "progress"),
    )
)


def check_same_run(begun: TrainConfig, now: TrainConfig, where: object) -> None:
    """Raises ValueError if a resumed run would not be the same run.

    Args:
        begun: the options that the run began with.
        now: the options that it is to resume with.
        where: the run's folder, which the error's text names.

    Raises:
        ValueError: an option outside `MAY_CHANGE` differs, or `epochs` under a schedule that ends with them. The text
            names the option.
    """
    for field in dataclasses.fields(TrainConfig):
        before, after = getattr(begun, field.name), getattr(now, field.name)
        if field.name not in MAY_CHANGE and before != after:
            raise ValueError(
                f"{field.name} is {after!r}, but the run in {where} began with {before!r}; expected the same options, "
                "or another folder"
            )
    if begun.schedule != "constant" and begun.epochs != now.epochs:
        raise ValueError(
            f"epochs is {now.epochs}, but the run in {where} began with {begun.epochs}, at whose end its schedule "
            f"{begun.schedule!r} has the learning rate at 0; expected the same number"
        )
