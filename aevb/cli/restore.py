"""Commands for damaged images: `aevb impute` and `aevb denoise`.

Test images are the bits that the run is evaluated on, since its likelihood is of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..inference.imputation import Restoration
from ..inference.noise_models import add_gaussian, flip_bits
from ..inference.protocols import encoded
from ..ops import mix_seed
from ..training import pictures
from ..training.trainer import Trainer
from .files import Answer, Out, at_least_1, npy, png
from .images import ImageFile, grey_pixels, has_bits, if_another, mask_of, pixels, training_moments
from .options import DenoiseOptions, Flat, ImputeOptions, ModelOptions, OutputOptions, RestorationOptions
from .page import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINARIZED = {
    "dynamic": "whose bits are drawn with the grey values as probabilities",
    "threshold": "whose bits are set where the grey value is above half",
}
PICTURED = 20  # restored images in a picture


def impute(options: Flat[ImputeOptions], output: Flat[OutputOptions], model: Flat[ModelOptions]) -> Answer:
    """Restore missing pixels from the others, by the posterior given these.

    Leaves impute.png in the run folder. With --data or --save-array also impute.npy, the restored images, (N, pixels).

    Where the run's data have missing values, these are filled: impute.npy is then the whole array, in the data's order
    and units. With --mask, and for complete data, the command hides pixels of test images itself, and prints the errors
    of their restoration. These are against the binarized images where the run binarizes grey ones.

    Example: aevb impute runs/digits --mask random --missing 0.7
    """
    trainer = model.load()
    target = _out(trainer, "impute", options.data, options.mask, output, _fills_own(trainer, options))
    return _written(target, imputed(trainer, options), output.invert)


def denoise(options: Flat[DenoiseOptions], output: Flat[OutputOptions], model: Flat[ModelOptions]) -> Answer:
    """Restore clean images from noisy ones, by the clean image's posterior.

    Leaves denoise.png in the run folder. With --data or --save-array also denoise.npy, the clean images, (N, pixels).

    The noise must be known: --flip or --sigma. The command adds it to test images itself, and prints the errors of
    their restoration. These are against the binarized images where the run binarizes grey ones.

    Example: aevb denoise runs/digits --flip 0.2
    """
    trainer = model.load()
    target = _out(trainer, "denoise", options.data, options.mask, output)
    return _written(target, denoised(trainer, options), output.invert)


def imputed(trainer: Trainer, options: ImputeOptions) -> Restored:
    """Restore missing pixels of a file's images, or of test images.

    Args:
        trainer: The run.
        options: The images, the mask and the method. Pixels of test images are hidden here.

    Raises:
        ValueError: A part without missing pixels of its own, or with a mask or file besides.
    """
    count = 100 if options.images is None else options.images
    at_least_1(images=count)
    if _fills_own(trainer, options):
        return _filled(trainer, options)
    data = options.data
    if options.part is not None:
        raise ValueError(
            f"part is {options.part!r}, and {_what_else(trainer, options)}; expected a part of a run whose data have "
            "missing values, without --mask and --data"
        )

    def observe(count: int) -> Tensor:
        return mask_of(trainer, options.mask or "lower", count, options.missing, options.seed)

    given = _to_restore(trainer, data, count, observe, given_clean=True, own_alone=options.mask is None)
    found = trainer.model.impute(given.x, given.observed, **_method(options), fill=_start(trainer), clean=given.clean)
    scores = _scores(trainer, given, found, given.known & ~given.observed)
    mask = options.mask or ("NaN" if given.own else "lower")
    what = f"{'images' if data else 'test images'}, missing pixels ({mask}) restored"
    return Restored(trainer, _name(trainer, data), what, "masked", given.x, given.observed, found, scores, given.grey)


def _fills_own(trainer: Trainer, options: ImputeOptions) -> bool:
    """Whether what is filled are the missing values of the run's own data."""
    return bool(trainer.dataset.observed) and options.mask is None and options.data is None


def _what_else(trainer: Trainer, options: ImputeOptions) -> str:
    if options.data is not None:
        return f"data {options.data!r}"
    return f"mask {options.mask!r}" if options.mask else f"no value of {trainer.dataset.name} is missing"


def _filled(trainer: Trainer, options: ImputeOptions) -> Restored:
    """Fill the missing values of the run's own data.

    Raises:
        ValueError: The images have none.
    """
    dataset = trainer.dataset
    images, masks = _own_images(trainer, options.part)
    images, masks = images[: options.images], masks[: options.images]
    rows = (~masks.all(1)).nonzero().flatten()
    what = f"{options.part} images" if options.part else "images"
    if len(rows) == 0:
        raise ValueError(f"the {what} have no missing pixel; expected another part, or --mask")
    x, observed, grey = (
        pixels(trainer, images[rows]),
        masks[rows].to(trainer.device),
        grey_pixels(trainer, images[rows]),
    )
    found = trainer.model.impute(x, observed, **_method(options), fill=_start(trainer))
    unit = dataset.largest or dataset.max_value
    array = images.float() if unit == dataset.max_value else images / dataset.max_value * unit
    array[rows] = torch.where(masks[rows], array[rows], unit * found.mean.cpu())
    lacking = f"{float((~masks).double().mean()):.1%} of the pixels of {len(images):,}"
    what = f"{what}, missing pixels ({lacking}) filled"
    return Restored(trainer, dataset.name, what, "masked", x, observed, found, None, grey, array)


def _own_images(trainer: Trainer, part: str | None) -> tuple[Tensor, Tensor]:
    """Returns the images of a part, or of all in the order of the data, and their masks."""
    dataset = trainer.dataset
    found = {name: getattr(dataset, f"{name}_images") for name in ("train", "validation", "test")}
    names = [name for name, images in found.items() if images is not None and part in (None, name)]
    if not names:
        raise ValueError(f"{dataset.name} has no {part} part; expected 'train' or 'test'")
    images = torch.cat([found[name][:] for name in names])
    masks = torch.cat(
        [dataset.observed.get(name, torch.ones(1, 1, dtype=torch.bool).expand(found[name].shape)) for name in names]
    )
    if part is None and dataset.rows is not None:
        order = torch.cat([dataset.rows[name] for name in names]).argsort()
        images, masks = images[order], masks[order]
    return images, masks


def _start(trainer: Trainer) -> Tensor | float:
    """Returns the encoder's first input where pixels are missing: what it was given in training, or the mean."""
    return 0.0 if "train" in trainer.dataset.observed else training_moments(trainer)[0]


def denoised(trainer: Trainer, options: DenoiseOptions) -> Restored:
    """Restore a file's noisy images, or test images with noise.

    Args:
        trainer: The run.
        options: The images, the noise, the mask and the method. The noise of test images is added here.

    Raises:
        ValueError: The run's likelihood says nothing of such noise.
    """
    count = 100 if options.images is None else options.images
    at_least_1(images=count)
    data, mask, flip, sigma, seed = options.data, options.mask, options.flip, options.sigma, options.seed
    if sigma is not None and "sigma" in trainer.model.family.noise and not knows_noise(trainer):
        raise ValueError(
            f"sigma is {sigma:g}, and the run's images are grey values under a Bernoulli likelihood, which says "
            "nothing of a value's noise; expected a run with --likelihood gaussian, or of bits: --binarize dynamic"
        )

    def observe(count: int) -> Tensor:
        if mask is None:
            return torch.ones(count, trainer.dataset.data_dim, dtype=torch.bool, device=trainer.device)
        return mask_of(trainer, mask, count, 0.5, seed)

    given = _to_restore(trainer, data, count, observe, given_clean=False)
    x, observed, clean, grey = given.x, given.observed, given.clean, given.grey
    if clean is not None:
        x = _noisy(clean, flip, sigma, int(mix_seed(seed, 1)))
    found = trainer.model.denoise(
        x, flip=flip, sigma=sigma, observed=observed, **_method(options), fill=_start(trainer), clean=clean
    )
    scores = _scores(trainer, replace(given, x=x), found, given.known)
    if scores is not None and mask is None:
        scores.add_noisy(x, flip, sigma)
    noise = f"bits flipped with probability {flip:g}" if flip is not None else f"Gaussian noise of sigma {sigma:g}"
    what = f"{'images' if data else 'test images'}, {noise}"
    return Restored(trainer, _name(trainer, data), what, "noisy", x, observed, found, scores, grey)


@dataclass(frozen=True, eq=False)
class Restored:
    """Restored images, with their errors and a picture.

    Attributes:
        trainer: The run.
        name: Name of the data set or file.
        what: A phrase for the images and their damage, for titles.
        given: The damage in a word, "masked" or "noisy".
        x: Images as the model is given them, (N, data_dim).
        observed: Pixels that are observed, bool, (N, data_dim).
        found: The posterior's answer.
        scores: Errors, where the clean images are known.
        grey: Images as they are, without noise where that is known.
        array: What is written as an array, (N, data_dim); by default the means.
    """

    trainer: Trainer
    name: str
    what: str
    given: str
    x: Tensor
    observed: Tensor
    found: Restoration
    scores: _Scores | None
    grey: Tensor
    array: Tensor | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.x)} {self.what}", *([str(self.scores)] if self.scores is not None else [])]
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """Returns sentences about the samples of z."""
        lines = []
        effective, accepted = self.found.effective_sample_size, self.found.acceptance_rate
        if effective is not None:
            lines.append(f"effective samples, median: {float(effective.median()):.1f}")
        if accepted is not None:
            lines.append(f"proposals accepted: {float(accepted.mean()):.1%}")
        return lines

    @property
    def against(self) -> str:
        """Name of the images that the errors are against."""
        return f"against {self.scores.against}" if self.scores is not None else ""

    def table(self) -> Table:
        """Returns the errors as a table, for a page."""
        rows = {} if self.scores is None else self.scores.rows
        cells = {name: [f"{error:.4f}", f"{log_prob:.4f}"] for name, (error, log_prob) in rows.items()}
        return Table(cells, ("squared error", "log-likelihood (nats)"), True, "; ".join([self.what, *self.notes()]))

    def figure(self, count: int = PICTURED, invert: bool = False, bare: bool = False) -> Figure:
        """Draw rows of images: clean, binarized, damaged, and restored.

        Args:
            count: Number of images at most.
            invert: Show them inverted.
            bare: Draw no text, which is to stand beside the picture.
        """
        given, grey, missing = self.x[:count].nan_to_num(), self.grey[:count].nan_to_num(), ~self.observed[:count]
        hidden = {self.given: missing}
        if self.scores is None:
            rows = {self.given: grey}
            if (binarized := if_another(given, grey)) is not None:
                rows["binarized"], hidden["binarized"] = binarized, missing
        else:
            rows = {"clean": grey}
            if (binarized := if_another(self.scores.clean[:count], grey)) is not None:
                rows["binarized"] = binarized
            rows |= {self.given: given, "one pass": self.scores.one_pass[:count]}
        rows["restored"] = self.found.mean[:count]
        look = pictures.ImageStyle(self.trainer.dataset.image_shape, invert, bare)
        return pictures.mosaic(f"{self.name}: {self.what}", rows, look, missing=hidden)


def _out(
    trainer: Trainer, name: str, data: str | None, mask: str | None, output: OutputOptions, own: bool = False
) -> Out:
    inputs = [data, mask, trainer.config.mask]
    return Out.of_images(trainer, name, output, inputs=inputs, array=data is not None or own)


def _method(options: RestorationOptions) -> dict[str, Any]:
    """The options of `VAE.impute` and `VAE.denoise` that are the method's."""
    return {name: getattr(options, name) for name in ("method", "steps", "num_samples", "seed")}


@dataclass(frozen=True, eq=False)
class _Given:
    """Images to restore.

    Attributes:
        x: The images, (N, data_dim).
        observed: Which pixels are observed, bool, (N, data_dim).
        clean: The clean images, where they are known: x again.
        grey: The images as they are, before they were binarized.
        known: Which pixels of the clean images are known, bool, (N, data_dim).
        own: Whether pixels are missing in the images themselves.
    """

    x: Tensor
    observed: Tensor
    clean: Tensor | None
    grey: Tensor
    known: Tensor
    own: bool


def _to_restore(
    trainer: Trainer,
    data: str | None,
    images: int,
    observe: Callable[[int], Tensor],
    given_clean: bool,
    own_alone: bool = False,
) -> _Given:
    """Returns images of a file, or test images as the run is evaluated on them, which are clean.

    What is missing in the images themselves is missing besides what `observe` hides; with `own_alone` in its place.
    """
    if data is None:
        index = pictures.examples(trainer.dataset, images).to(trainer.device)
        held_out = trainer.held_out["test"]
        x, own = held_out.x(index).float(), held_out.observed(index)
        observed = observe(len(x))
        known = torch.ones_like(observed) if own is None else own
        grey = grey_pixels(trainer, trainer.dataset.test_images[index.cpu()])
        return _Given(x, observed & known, x, grey, known, own is not None)
    file = ImageFile(trainer, data)
    own = file.holes() if trainer.config.missing == "nan" else None
    observed = own if own is not None and own_alone else observe(len(file))
    if own is not None:
        observed = observed & own
    file.hide(observed)
    if given_clean:
        file.check()
    rows = torch.from_numpy(file.array)
    grey = file.floats(rows)
    x = file.clean(rows) if given_clean else grey
    return _Given(x, observed, None, grey, observed, own is not None)


def _scores(trainer: Trainer, given: _Given, found: Restoration, wanted: Tensor) -> _Scores | None:
    """Returns the errors of what is wanted, by method, where the clean images are known."""
    if given.clean is None:
        return None
    scores = _Scores(trainer, given.clean, wanted, given.grey)
    mean, spread = training_moments(trainer)
    scores.add_restored(found)
    scores.add_one_pass(torch.where(given.observed, given.x, _start(trainer)), given.observed)
    scores.add_mean_image(mean, spread)
    return scores


def knows_noise(trainer: Trainer) -> bool:
    """Whether noise has a model under the likelihood: Gaussian values, or bits."""
    family = trainer.model.family
    return "sigma" in family.noise and (has_bits(trainer) or not family.of_bits)


def _name(trainer: Trainer, data: str | None) -> str:
    return trainer.dataset.name if data is None else Path(data).name


def _noisy(clean: Tensor, flip: float | None, sigma: float | None, seed: int) -> Tensor:
    if flip is not None:
        return flip_bits(clean, flip, seed=seed)
    return clean if sigma is None else add_gaussian(clean, sigma, seed=seed)


def _written(target: Out, restored: Restored, invert: bool) -> Answer:
    array = restored.found.mean if restored.array is None else restored.array
    files = target.write(png=png(lambda: restored.figure(invert=invert)), npy=npy(array))
    return Answer(files, str(restored))


class _Scores:
    """Errors of the pixels that were missing or noisy, by method.

    They are the mean squared error and the log-likelihood, averages per pixel. The log-likelihood is of each pixel by
    itself, log p(x_i), under a method's prediction. Both are of the images that the run is evaluated on, `clean`, which
    may be the binarized `grey` ones.
    """

    one_pass: Tensor

    def __init__(self, trainer: Trainer, clean: Tensor, wanted: Tensor, grey: Tensor):
        self.model, self.clean, self.wanted = trainer.model, clean, wanted
        self.of_bits = self.model.family.of_bits
        self.training_images = len(trainer.dataset.train_images)
        self.rows: dict[str, tuple[float, float]] = {}  # squared error and log-likelihood, by method
        is_grey = if_another(clean, grey) is None
        self.against = "the clean images" if is_grey else f"the binarized images, {_BINARIZED[trainer.config.binarize]}"

    def __str__(self) -> str:
        lines = [f"{'per pixel':26}{'squared error':>14}{'log-likelihood (nats)':>24}"]
        lines += [f"{name:26}{error:14.4f}{log_prob:24.4f}" for name, (error, log_prob) in self.rows.items()]
        return "\n".join([*lines, f"both against {self.against}"])

    def add_restored(self, found: Restoration) -> None:
        """Add the restoration."""
        assert found.log_prob is not None
        self._add("restored", found.mean, found.log_prob)

    @torch.no_grad()
    def add_one_pass(self, start: Tensor, observed: Tensor) -> None:
        """Add the decoder's mean at the encoder's, one pass."""
        z, _ = encoded(self.model, start.clamp(0, 1) if self.of_bits else start, observed)
        self.one_pass = self.model.mean(z)
        self._add("one encode-decode pass", self.one_pass, self.model.pixel_log_prob(self.clean, z))

    def add_mean_image(self, mean: Tensor, variance: Tensor) -> None:
        """Add the mean of the training images, with their variance."""
        n = self.training_images
        p = (mean * n + 1) / (n + 2)  # so that no pixel is impossible
        if self.of_bits:
            log_prob = self.clean * p.log() + (1 - self.clean) * (-p).log1p()
        else:
            log_prob = _normal_log_prob(self.clean, mean, variance.clamp_min(1e-6))
        self._add("the mean training image", mean.expand_as(self.clean), log_prob)

    def add_noisy(self, noisy: Tensor, flip: float | None, sigma: float | None) -> None:
        """Add the noisy image, with every clean value as likely."""
        if self.of_bits:
            strength = math.log1p(-flip) - math.log(flip) if flip is not None else 0.5 / (sigma or 1) ** 2
            log_prob = F.logsigmoid((2 * self.clean - 1) * (2 * noisy - 1) * strength)
        else:
            log_prob = _normal_log_prob(self.clean, noisy, torch.tensor((sigma or 1) ** 2))
        self._add("the noisy image as it is", noisy, log_prob)

    def _add(self, name: str, restored: Tensor, log_prob: Tensor) -> None:
        errors = (restored - self.clean).square()[self.wanted]
        self.rows[name] = (float(errors.double().mean()), float(log_prob[self.wanted].double().mean()))


def _normal_log_prob(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, variance.sqrt(), validate_args=False).log_prob(x)
