"""Answers of images with noise or missing pixels: `aevb impute` and `aevb denoise`.

Test images are the bits that the run is evaluated on, since these are what its likelihood is of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks.arguments import takes_plain_values
from ..inference.imputation import Method, Restoration
from ..inference.noise_models import add_gaussian, flip_bits
from ..ops import mix_seed
from ..training import pictures
from ..training.trainer import Trainer
from .files import Answer, Out, Run, at_least_1, forms, npy, png
from .images import ImageFile, grey_pixels, has_bits, if_another, mask_of, training_moments
from .page import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINARIZED = {
    "dynamic": "whose bits are drawn with the grey values as probabilities",
    "threshold": "whose bits are set where the grey value is above half",
}
PICTURED = 20  # restored images in a picture


@takes_plain_values
def impute(
    run: Run,
    out: str | None = None,
    *,
    data: str | None = None,
    invert: bool = False,
    best: bool = False,
    save_array: bool = False,
    **options: Any,
) -> Answer:
    """Missing pixels from the others: `aevb impute`. `options` are those of `imputed`."""
    trainer = Trainer.load(run, best=best)
    target = _out(trainer, "impute", out, data, save_array, options.get("mask"))
    return _written(target, imputed(trainer, data=data, **options), invert)


@takes_plain_values
def denoise(
    run: Run,
    out: str | None = None,
    *,
    data: str | None = None,
    invert: bool = False,
    best: bool = False,
    save_array: bool = False,
    **options: Any,
) -> Answer:
    """Clean images from noisy ones: `aevb denoise`. `options` are those of `denoised`."""
    trainer = Trainer.load(run, best=best)
    target = _out(trainer, "denoise", out, data, save_array, options.get("mask"))
    return _written(target, denoised(trainer, data=data, **options), invert)


@takes_plain_values
def imputed(
    trainer: Trainer,
    *,
    data: str | None = None,
    mask: str = "lower",
    missing: float = 0.5,
    images: int = 100,
    method: Method = "gradient",
    steps: int = 50,
    num_samples: int = 500,
    seed: int = 0,
) -> Restored:
    """Images of a file with their missing pixels restored, or test images whose pixels are hidden here."""
    at_least_1(images=images)
    given = _to_restore(trainer, data, images, lambda n: mask_of(trainer, mask, n, missing, seed), True)
    x, observed, clean, grey = given
    fill, spread = training_moments(trainer)
    found = trainer.model.impute(
        x, observed, method=method, steps=steps, num_samples=num_samples, seed=seed, fill=fill, clean=clean
    )
    scores = None
    if clean is not None:
        scores = _Scores(trainer, clean, ~observed, grey)
        scores.add_restored(found)
        scores.add_one_pass(torch.where(observed, x, fill))
        scores.add_mean_image(fill, spread)
    what = f"{'images' if data else 'test images'}, missing pixels ({mask}) restored"
    return Restored(trainer, _name(trainer, data), what, "masked", x, observed, found, scores, grey)


@takes_plain_values
def denoised(
    trainer: Trainer,
    *,
    data: str | None = None,
    mask: str | None = None,
    flip: float | None = None,
    sigma: float | None = None,
    images: int = 100,
    method: Method = "gradient",
    steps: int = 50,
    num_samples: int = 500,
    seed: int = 0,
) -> Restored:
    """Noisy images of a file, cleaned, or test images to which the noise is added here."""
    at_least_1(images=images)
    if sigma is not None and "sigma" in trainer.model.family.noise and not knows_noise(trainer):
        raise ValueError(
            f"sigma is {sigma:g}, and the run's images are grey values under a Bernoulli likelihood, which says "
            "nothing of a value's noise; expected a run with --likelihood gaussian, or of bits: --binarize dynamic"
        )

    def observe(count: int) -> Tensor:
        if mask is None:
            return torch.ones(count, trainer.dataset.data_dim, dtype=torch.bool, device=trainer.device)
        return mask_of(trainer, mask, count, 0.5, seed)

    x, observed, clean, grey = _to_restore(trainer, data, images, observe, given_clean=False)
    if clean is not None:
        x = _noisy(clean, flip, sigma, int(mix_seed(seed, 1)))
    fill, spread = training_moments(trainer)
    found = trainer.model.denoise(
        x,
        flip=flip,
        sigma=sigma,
        observed=observed,
        method=method,
        steps=steps,
        num_samples=num_samples,
        seed=seed,
        fill=fill,
        clean=clean,
    )
    scores = None
    if clean is not None:
        scores = _Scores(trainer, clean, torch.ones_like(observed), grey)
        scores.add_restored(found)
        scores.add_one_pass(torch.where(observed, x, fill))
        scores.add_mean_image(fill, spread)
        if mask is None:
            scores.add_noisy(x, flip, sigma)
    noise = f"bits flipped with probability {flip:g}" if flip is not None else f"Gaussian noise of sigma {sigma:g}"
    what = f"{'images' if data else 'test images'}, {noise}"
    return Restored(trainer, _name(trainer, data), what, "noisy", x, observed, found, scores, grey)


@dataclass(frozen=True, eq=False)
class Restored:
    """Images before and after: the numbers, a text, a picture."""

    trainer: Trainer
    name: str
    what: str
    given: str
    """What the images were, in a word."""
    x: Tensor
    observed: Tensor
    found: Restoration
    scores: _Scores | None
    grey: Tensor
    """The images as they are, without noise where that is known."""

    def __str__(self) -> str:
        lines = [f"{len(self.x)} {self.what}", *([str(self.scores)] if self.scores is not None else [])]
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """What there is to say of the samples."""
        lines = []
        effective, accepted = self.found.effective_sample_size, self.found.acceptance_rate
        if effective is not None:
            lines.append(f"effective samples, median: {float(effective.median()):.1f}")
        if accepted is not None:
            lines.append(f"proposals accepted: {float(accepted.mean()):.1%}")
        return lines

    @property
    def against(self) -> str:
        """Of which images the errors are."""
        return f"against {self.scores.against}" if self.scores is not None else ""

    def table(self) -> Table:
        """The numbers, for a page."""
        rows = {} if self.scores is None else self.scores.rows
        cells = {name: [f"{error:.4f}", f"{log_prob:.4f}"] for name, (error, log_prob) in rows.items()}
        return Table(cells, ("squared error", "log-likelihood (nats)"), True, "; ".join([self.what, *self.notes()]))

    def figure(self, count: int = PICTURED, invert: bool = False, bare: bool = False) -> Figure:
        """Rows of images as they are, binarized, as given, and restored."""
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
        look = pictures.Look(self.trainer.dataset.image_shape, invert, bare)
        return pictures.mosaic(f"{self.name}: {self.what}", rows, look, missing=hidden)


def _out(
    trainer: Trainer, name: str, out: str | None, data: str | None, save_array: bool, mask: str | None = None
) -> Out:
    return Out(trainer, name, out, (".png", ".npy"), forms(save_array or data is not None), [data, mask])


def _to_restore(
    trainer: Trainer, data: str | None, images: int, observe: Callable[[int], Tensor], given_clean: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Images to restore, which pixels are observed, clean images, and grey ones.

    The images of a file, or of the test part as the run is evaluated on it: these again, since they are clean. All as
    they are, grey, before they were binarized.
    """
    if data is None:
        index = pictures.examples(trainer.dataset, images).to(trainer.device)
        x = trainer.held_out["test"].x(index).float()
        rows = trainer.dataset.test_images[index.cpu()]
        return x, observe(len(x)), x, grey_pixels(trainer, rows)
    file = ImageFile(trainer, data)
    observed = observe(len(file))
    file.hide(observed)
    if given_clean:
        file.check()
    rows = torch.from_numpy(file.array)
    grey = file.floats(rows)
    return file.clean(rows) if given_clean else grey, observed, None, grey


def knows_noise(trainer: Trainer) -> bool:
    """Whether the likelihood is of what noise can be added to: Gaussian values, or bits."""
    family = trainer.model.family
    return "sigma" in family.noise and (has_bits(trainer) or not family.of_bits)


def _name(trainer: Trainer, data: str | None) -> str:
    return trainer.dataset.name if data is None else Path(data).name


def _noisy(clean: Tensor, flip: float | None, sigma: float | None, seed: int) -> Tensor:
    if flip is not None:
        return flip_bits(clean, flip, seed=seed)
    return clean if sigma is None else add_gaussian(clean, sigma, seed=seed)


def _written(target: Out, restored: Restored, invert: bool) -> Answer:
    files = target.write(png=png(lambda: restored.figure(invert=invert)), npy=npy(restored.found.mean))
    return Answer(files, str(restored))


class _Scores:
    """Mean squared error and log-likelihood of the pixels that were missing or noisy, averages per pixel, by method.

    The log-likelihood is that of each pixel by itself, log p(x_i), under what a method says of it. Both are of the
    images that the run is evaluated on, `clean`, which may be the binarized `grey` ones.
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
        assert found.log_prob is not None
        self._add("restored", found.mean, found.log_prob)

    @torch.no_grad()
    def add_one_pass(self, start: Tensor) -> None:
        """What the decoder makes of the encoder's mean, without more ado."""
        z, _ = self.model.encode(start.clamp(0, 1) if self.of_bits else start)
        self.one_pass = self.model.mean(z)
        self._add("one encode-decode pass", self.one_pass, self.model.pixel_log_prob(self.clean, z))

    def add_mean_image(self, mean: Tensor, variance: Tensor) -> None:
        """The mean of the training images, with their variance."""
        n = self.training_images
        p = (mean * n + 1) / (n + 2)  # so that no pixel is impossible
        if self.of_bits:
            log_prob = self.clean * p.log() + (1 - self.clean) * (-p).log1p()
        else:
            log_prob = _normal_log_prob(self.clean, mean, variance.clamp_min(1e-6))
        self._add("the mean training image", mean.expand_as(self.clean), log_prob)

    def add_noisy(self, noisy: Tensor, flip: float | None, sigma: float | None) -> None:
        """The noisy image itself: what it says without any model, every clean value being as likely."""
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
