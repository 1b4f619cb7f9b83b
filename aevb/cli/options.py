"""Options of the commands, each with its default and help text.

A command's parameters are groups of options, classes of this module. A field is an option, and its docstring the
option's help. A line of these docstrings is a line of `--help`, so they break where sentences end.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from ..checks.arguments import converted
from ..inference.imputation import Method
from ..models import BaseVAE
from ..training.trainer import Trainer
from .images import Part

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]
"""A group whose flags have no prefix: `--num`, not `--options.num`."""


@dataclass(frozen=True)
class Options:
    """Base of the groups: values become the types of their fields.

    Raises:
        ArgumentTypeError: A value has no plain meaning as its field's type, as 2.5 images.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, converted(name, getattr(self, name), hint))


# ---- shared by commands ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions(Options):
    """The run folder."""

    run: tyro.conf.Positional[str]
    """The run folder."""


@dataclass(frozen=True)
class ModelOptions(RunOptions):
    """The run folder, and the epoch of its model."""

    best: bool = False
    """The model of the best epoch by the validation images, not the last one's."""

    def load(self) -> Trainer:
        """Returns the run's trainer, with these weights."""
        trainer = Trainer.load(self.run, best=self.best)
        if not isinstance(trainer.model, BaseVAE):
            raise ValueError(
                f"{self.run} is a run of {trainer.config.architecture}, which has encode and log_prob alone; expected "
                "a run of aevb's own models, or aevb.Trainer.load in Python"
            )
        return trainer


@dataclass(frozen=True)
class ProgressOptions(Options):
    """The progress bar."""

    progress: bool = True
    """The progress bar; --no-progress for none."""


@dataclass(frozen=True)
class SeedOptions(Options):
    """The seed of an answer."""

    seed: int = 0
    """All that is random follows from it: draws, noise, masks, the choice of images."""


@dataclass(frozen=True)
class InvertOptions(Options):
    """The look of pictures."""

    invert: bool = False
    """Show the images inverted, 0 as white."""


@dataclass(frozen=True)
class OutputOptions(InvertOptions):
    """Files of an answer that is a picture and an array."""

    save_array: bool = False
    """Write the images as an array too, a .npy file."""
    out: str | None = None
    """A .png or .npy file, written alone, or a folder, in place of the run folder."""


@dataclass(frozen=True)
class DataOptions(Options):
    """The images that a run is asked about."""

    part: Part | None = None
    """Part of the data set; by default test."""
    data: str | None = None
    """Other images of the same shape: a .npy file, or a data set as `aevb train` takes it."""


# ---- one command's ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResumeOptions(ProgressOptions):
    """Options of `aevb resume`: changes to the run's own."""

    epochs: int | None = None
    """Passes over the training images in all, if not as many as it began with."""
    patience: int | None = None
    """Epochs without a better ELBO of the validation images, if not as many as it began with."""
    device: str | None = None
    """Where to train, if not where it began."""
    threads: int | None = None
    """Threads to train with."""
    invert: bool = False
    """Show images inverted in the pictures, 0 as white, if not as it began."""

    def changes(self) -> dict[str, Any]:
        """Returns the options of training that change, by name."""
        options = dataclasses.asdict(self) | {"invert": self.invert or None}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class EvaluateOptions(ProgressOptions, SeedOptions):
    """Options of `aevb evaluate`."""

    num_samples: int = 5000
    """Samples of z for each image, for log p(x)."""
    images: int | None = None
    """Only the first so many test images."""


@dataclass(frozen=True)
class ReconstructOptions(DataOptions):
    """Options of `aevb reconstruct`."""

    images: int = 40
    """Number of images in the picture."""


@dataclass(frozen=True)
class SampleOptions(SeedOptions):
    """Options of `aevb sample`."""

    num: int = 100
    """Number of images."""


@dataclass(frozen=True)
class EmbedOptions(SeedOptions, DataOptions):
    """Options of `aevb embed`."""

    num_samples: int | None = None
    """Draws of each posterior, for an array z, (num_samples, N, dimensions); none by default."""
    out: str | None = None
    """A .npz file, a .npy file (mu alone), a .png file (the map), or a folder, in place of the run folder."""


@dataclass(frozen=True)
class RestorationOptions(SeedOptions):
    """Options of `aevb impute` and `aevb denoise`."""

    data: str | None = None
    """A .npy file of images to restore, in place of test images; values of missing pixels are not used."""
    images: int | None = None
    """Number of images, without --data; by default 100 test images, or all whose own missing pixels are filled."""
    method: Method = "gradient"
    """Either "gradient", which refines each posterior by Adam and weighs its samples;
    or "gibbs", which goes on from there by Metropolis-within-Gibbs."""
    steps: int = 50
    """Steps of Adam."""
    num_samples: int = 500
    """Samples of z for each image."""


@dataclass(frozen=True)
class MaskOptions(Options):
    """The missing pixels."""

    mask: str | None = None
    """Missing pixels: "lower", "upper", "left", "right" (halves), "random", or a .npy file.
    The file has one mask, or one an image, with 1 or True where a pixel is observed.
    By default what is missing in the data itself, and "lower" where nothing is."""
    missing: float = 0.5
    """The fraction of the pixels that "random" hides."""


@dataclass(frozen=True)
class ImputeOptions(RestorationOptions, MaskOptions):
    """Options of `aevb impute`."""

    part: Part | None = None
    """Part of the data set whose own missing pixels are filled; by default all of them, in the order of the data."""


@dataclass(frozen=True)
class NoiseOptions(Options):
    """The noise, and pixels that are missing besides."""

    flip: float | None = None
    """The probability with which each bit was flipped."""
    sigma: float | None = None
    """The standard deviation of Gaussian noise on pixels in [0, 1]."""
    mask: str | None = None
    """Pixels that are missing as well: see `aevb impute --help`."""


@dataclass(frozen=True)
class DenoiseOptions(RestorationOptions, NoiseOptions):
    """Options of `aevb denoise`."""


@dataclass(frozen=True)
class ManifoldOptions(Options):
    """Options of `aevb manifold`."""

    num: int = 20
    """Images in a row, and rows."""


@dataclass(frozen=True)
class TraverseOptions(Options):
    """Options of `aevb traverse`."""

    image: int = 0
    """The number of a test image."""
    dims: tuple[int, ...] | None = None
    """Dimensions of z; by default the dimensions of largest KL, the most informative first."""
    num_dims: int = 10
    """Number of dimensions, without --dims."""
    steps: int = 11
    """Values of each dimension."""


@dataclass(frozen=True)
class InterpolateOptions(SeedOptions):
    """Options of `aevb interpolate`."""

    pairs: int | None = None
    """Number of pairs; by default 8, or as many as there are."""
    steps: int = 9
    """Images of each pair, the reconstructions of both ends included."""
    spherical: bool = False
    """Interpolate along a great circle."""


@dataclass(frozen=True)
class ReportOptions(SeedOptions, InvertOptions):
    """Options of `aevb report`."""

    out: str | None = None
    """A .html file, or a folder, in place of the run folder."""
