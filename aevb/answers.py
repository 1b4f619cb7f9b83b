"""What the commands that ask a trained run do: load it, compute, draw, and write the answer.

Images go into the encoder as the run's pixels in [0, 1]: thresholded where the run's were, and grey where its bits were
drawn anew at each step, so that an answer has no noise. `impute` and `denoise` take the bits that the run is evaluated
on, since these are what its likelihood is of.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from . import pictures
from .data import Dataset, load
from .diagnostics import kl_per_dimension
from .ops import mix_seed
from .restoration import Method, Restoration, add_gaussian, flip_bits, random_mask
from .runs import ANSWERS, RunFolder, write_answer
from .train import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part = Literal["train", "validation", "test"]
PICTURED = 20  # restored images in a picture
KL_IMAGES = 10_000  # for which dimensions are informative
Run = str | PathLike[str]


@dataclass(frozen=True)
class Answer:
    """What a command found: the files that it wrote, and a text to print."""

    files: list[Path]
    text: str = ""

    def __str__(self) -> str:
        files = "\n".join(f"written  {path}" for path in self.files)
        return f"{self.text}\n{files}" if self.text else files


class _Out:
    """Where an answer goes: files of the run folder, or what `out` says: a file, whose suffix says which of the forms,
    or a folder for the files under their usual names. Checked before anything is computed."""

    def __init__(self, folder: RunFolder, name: str, out: str | None, forms: Sequence[str], always: Sequence[str]):
        assert name in ANSWERS
        self.always = list(always)
        path = folder.path if out is None else Path(out).expanduser()
        if out is None or path.is_dir() or not path.suffix:
            self.stem = path / name
        elif path.suffix in forms:
            self.stem, self.always = path.with_suffix(""), [path.suffix, *(s for s in always if s == ".npy")]
        else:
            raise ValueError(f"out is {out!r}; expected a name that ends in {' or '.join(forms)}, or a folder")
        self.always = list(dict.fromkeys(self.always))

    def write(self, **forms: Callable[[], bytes]) -> list[Path]:
        """Each form by its suffix without the dot, made only where it is wanted."""
        return [write_answer(self.stem.with_name(self.stem.name + s), forms[s[1:]]()) for s in self.always]


def _forms(save_array: bool) -> list[str]:
    return [".png", ".npy"] if save_array else [".png"]


def _npy(array: Tensor) -> Callable[[], bytes]:
    return lambda: _bytes(lambda file: np.save(file, array.cpu().numpy(), allow_pickle=False))


def _png(figure: Callable[[], Figure]) -> Callable[[], bytes]:
    return lambda: pictures.png(figure())


def _bytes(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


# ---- images ---------------------------------------------------------------------------------------------------------


def pixels(trainer: Trainer, images: Tensor, dataset: Dataset | None = None) -> Tensor:
    """What the encoder is given of a data set's images, (N, data_dim), float32, on the trainer's device."""
    dataset = dataset or trainer.dataset
    if trainer.config.binarize == "threshold":
        return (images > dataset.max_value // 2).float().to(trainer.device)
    return (images * dataset.x_scale).to(trainer.device)


def mean_image(trainer: Trainer) -> Tensor:
    """(data_dim,): the mean of the training images."""
    images = trainer.dataset.train_images
    total = sum(pixels(trainer, part).sum(0, dtype=torch.float64) for part in images.split(10_000))
    assert isinstance(total, Tensor)
    return (total / len(images)).float()


def _images(trainer: Trainer, part: Part, data: str | None) -> tuple[Tensor, Tensor | None]:
    """The images to ask about, (N, data_dim) in [0, 1], and their labels: a .npy file's, or a part of a data set."""
    if data is not None and data.endswith(".npy"):
        return _array(trainer, data, clean=True), None
    dataset = trainer.dataset if data is None else load(data)
    images, labels = (getattr(dataset, f"{part}_{kind}", None) for kind in ("images", "labels"))
    if images is None:
        raise ValueError(f"{dataset.name} has no {part} part; expected 'train' or 'test'")
    if dataset.data_dim != trainer.dataset.data_dim:
        raise ValueError(
            f"{data} has images of {'x'.join(map(str, dataset.image_shape))}; expected "
            f"{'x'.join(map(str, trainer.dataset.image_shape))}, the run's"
        )
    return pixels(trainer, images, dataset), labels


def _array(trainer: Trainer, path: str, clean: bool) -> Tensor:
    """Images of a .npy file, (N, data_dim), float32: bits; integers in 0..max_value, where one is above 1; or numbers
    in [0, 1], with noise perhaps beyond."""
    dataset, array = trainer.dataset, _load_npy(path)
    x = _flat(array, dataset, path)
    if array.dtype.kind in "iu" and array.size and array.max() > 1:
        x = x * dataset.x_scale
    if clean and not ((x >= 0) & (x <= 1) | x.isnan()).all():
        raise ValueError(
            f"{path} holds values from {float(x.min()):g} to {float(x.max()):g}; expected numbers in [0, 1], or "
            f"integers in 0..{dataset.max_value}"
        )
    return x.to(trainer.device)


def _load_npy(path: str) -> np.ndarray:
    try:
        array = np.load(Path(path).expanduser(), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file, or a damaged one ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(f"{path} does not hold an array of numbers; expected a .npy file of images")
    return array


def _flat(array: np.ndarray, dataset: Dataset, path: str) -> Tensor:
    """(N, data_dim), float32, of (N, data_dim), (N, *image_shape), or one image."""
    shape = tuple(dataset.image_shape)
    x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if x.shape in (shape, (dataset.data_dim,)):
        x = x.unsqueeze(0)
    if len(x) == 0 or tuple(x.shape[1:]) not in (shape, (dataset.data_dim,)):
        raise ValueError(
            f"{path} has shape {tuple(array.shape)}; expected {('N', *shape)} or {('N', dataset.data_dim)}".replace(
                "'", ""
            )
        )
    return x.flatten(1)


# ---- recognition and generation -------------------------------------------------------------------------------------


def reconstruct(
    run: Run,
    out: str | None = None,
    *,
    part: Part = "test",
    data: str | None = None,
    images: int = 40,
    save_array: bool = False,
) -> Answer:
    """Images and their reconstructions at the posterior mean: `aevb reconstruct`."""
    _at_least_1(images=images)
    trainer = Trainer.load(run)
    target = _Out(trainer.folder, "reconstruct", out, (".png", ".npy"), _forms(save_array))
    x, _ = _images(trainer, part, data)
    shown = x[pictures.examples(trainer.dataset, images)] if data is None and part == "test" else x[:images]
    array = torch.cat([trainer.model.reconstruct(b) for b in x.split(1000)]) if ".npy" in target.always else x[:0]
    name, shape = trainer.dataset.name, trainer.dataset.image_shape
    return Answer(
        target.write(
            png=_png(lambda: pictures.reconstructions(name, shape, shown, trainer.model.reconstruct(shown))),
            npy=_npy(array),
        )
    )


def sample(run: Run, out: str | None = None, *, num: int = 100, seed: int = 0, save_array: bool = False) -> Answer:
    """Images at draws of z from the prior: `aevb sample`."""
    _at_least_1(num=num)
    trainer = Trainer.load(run)
    target = _Out(trainer.folder, "sample", out, (".png", ".npy"), _forms(save_array))
    images = trainer.model.sample(num, generator=torch.Generator(trainer.device).manual_seed(seed))
    dataset = trainer.dataset
    return Answer(
        target.write(png=_png(lambda: pictures.samples(dataset.name, dataset.image_shape, images)), npy=_npy(images))
    )


def embed(
    run: Run,
    out: str | None = None,
    *,
    part: Part = "test",
    data: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
) -> Answer:
    """The posterior of each image, as arrays and a map: `aevb embed`."""
    trainer = Trainer.load(run)
    target = _Out(trainer.folder, "embed", out, (".npz", ".npy", ".png"), [".npz", ".png"])
    x, labels = _images(trainer, part, data)
    found = trainer.model.embed(x, num_samples, seed=seed)
    arrays = {"mu": found.mu, "logvar": found.logvar, "z": found.z, "labels": labels}
    present = {name: t.cpu().numpy() for name, t in arrays.items() if t is not None}
    mu = found.mu[: pictures.LATENT_POINTS].cpu()
    what = f"{len(mu)} images" if data else f"{len(mu)} {part} images"
    title = f"{trainer.dataset.name}: posterior means of {what}"
    return Answer(
        target.write(
            npz=lambda: _bytes(lambda file: np.savez(file, allow_pickle=False, **present)),
            npy=_npy(found.mu),
            png=_png(lambda: pictures.latent(title, mu, labels)),
        ),
        f"{len(x):,} images, {found.mu.shape[1]} dimensions: {', '.join(present)}",
    )


# ---- restoration ----------------------------------------------------------------------------------------------------


def impute(
    run: Run,
    out: str | None = None,
    *,
    data: str | None = None,
    mask: str = "lower",
    missing: float = 0.5,
    images: int = 100,
    method: Method = "gradient",
    steps: int = 50,
    num_samples: int = 200,
    seed: int = 0,
    save_array: bool = False,
) -> Answer:
    """Missing pixels from the others: `aevb impute`."""
    _at_least_1(images=images)
    trainer = Trainer.load(run)
    target = _restoration_out(trainer, "impute", out, data, save_array)
    x, clean = _to_restore(trainer, data, images, given_clean=True)
    observed = mask_of(trainer, mask, x, missing, seed)
    fill = mean_image(trainer)
    options = dict(method=method, steps=steps, num_samples=num_samples, seed=seed, fill=fill, clean=clean)
    found = trainer.model.impute(x, observed, **options)  # type: ignore[arg-type]
    scores = None
    if clean is not None:
        scores = _Scores(trainer, clean, torch.where(observed, x, fill), ~observed.expand_as(x), fill)
        scores.add_restored(found)
    what = f"missing pixels ({mask}) of {len(x)} {'images' if data else 'test images'}"
    return _restored(trainer, target, found, x, clean, observed, what, scores, "masked")


def denoise(
    run: Run,
    out: str | None = None,
    *,
    data: str | None = None,
    mask: str | None = None,
    flip: float | None = None,
    sigma: float | None = None,
    images: int = 100,
    method: Method = "gradient",
    steps: int = 50,
    num_samples: int = 200,
    seed: int = 0,
    save_array: bool = False,
) -> Answer:
    """Clean images from noisy ones: `aevb denoise`."""
    _at_least_1(images=images)
    trainer = Trainer.load(run)
    target = _restoration_out(trainer, "denoise", out, data, save_array)
    x, clean = _to_restore(trainer, data, images, given_clean=False)
    noise_seed = int(mix_seed(seed, 1))
    if clean is not None and flip is not None:
        if trainer.config.binarize == "none":
            raise ValueError("flip is of bits, but the run's images are grey (--binarize none); expected --sigma")
        x = flip_bits(clean, flip, seed=noise_seed)
    elif clean is not None and sigma is not None:
        x = add_gaussian(clean, sigma, seed=noise_seed)
    observed = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    if mask is not None:
        observed = mask_of(trainer, mask, x, 0.5, seed)
    fill = mean_image(trainer)
    options = dict(method=method, steps=steps, num_samples=num_samples, seed=seed, fill=fill, clean=clean)
    found = trainer.model.denoise(x, flip=flip, sigma=sigma, observed=observed, **options)  # type: ignore[arg-type]
    scores = None
    if clean is not None:
        start = torch.where(observed, x, fill)
        scores = _Scores(trainer, clean, start, torch.ones_like(clean, dtype=torch.bool), fill)
        scores.add_noisy(start, flip, sigma)
        scores.add_restored(found)
    noise = f"bits flipped with probability {flip:g}" if flip is not None else f"Gaussian noise of sigma {sigma:g}"
    what = f"{len(x)} {'images' if data else 'test images'}, {noise}"
    return _restored(trainer, target, found, x, clean, observed, what, scores, "noisy")


def mask_of(trainer: Trainer, mask: str, x: Tensor, missing: float, seed: int) -> Tensor:
    """Which pixels are observed, bool, (data_dim,) or (N, data_dim), by a name or from a .npy file."""
    *_, height, width = shape = tuple(trainer.dataset.image_shape)
    halves = {
        "lower": (slice(height // 2, None), slice(None)),
        "upper": (slice(0, height // 2), slice(None)),
        "left": (slice(None), slice(0, width // 2)),
        "right": (slice(None), slice(width // 2, None)),
    }
    observed = torch.ones(shape, dtype=torch.bool)
    if mask in halves:
        observed[(..., *halves[mask])] = False
        return observed.flatten().to(x.device)
    if mask == "random":
        if not 0 < missing < 1:
            raise ValueError(f"missing is {missing}; expected a fraction between 0 and 1")
        return random_mask(x, missing, seed=int(mix_seed(seed, 2)))
    if not mask.endswith(".npy"):
        raise ValueError(f"mask is {mask!r}; expected {', '.join(map(repr, halves))}, 'random', or a .npy file")
    array = _load_npy(mask)
    if array.dtype.kind not in "biu" and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{mask} holds values other than 0 and 1; expected 1 or True where a pixel is observed")
    if array.shape == shape[-2:]:
        array = np.broadcast_to(array, shape)
    found = _flat(array, trainer.dataset, mask).bool().to(x.device)
    if len(found) not in (1, len(x)):
        raise ValueError(f"{mask} has {len(found)} masks; expected 1, or {len(x)}, one an image")
    return found.expand_as(x)


def _restoration_out(trainer: Trainer, name: str, out: str | None, data: str | None, save_array: bool) -> _Out:
    return _Out(trainer.folder, name, out, (".png", ".npy"), _forms(save_array or data is not None))


def _to_restore(trainer: Trainer, data: str | None, images: int, given_clean: bool) -> tuple[Tensor, Tensor | None]:
    """Images, of a file, or of the test part as the run is evaluated on it; and these again, since they are clean."""
    if data is not None:
        return _array(trainer, data, clean=given_clean), None
    index = pictures.examples(trainer.dataset, images)
    x = trainer.test_x[index.to(trainer.device)].float()
    return x, x


class _Scores:
    """Mean squared error and log-likelihood of the pixels that were missing or noisy, averages per pixel, by method.

    The log-likelihood is log p(x_i) of each pixel by itself under what a method says of it.
    """

    def __init__(self, trainer: Trainer, clean: Tensor, start: Tensor, wanted: Tensor, mean: Tensor):
        self.clean, self.wanted, self.rows = clean, wanted, dict[str, tuple[float, float]]()
        self.bernoulli = trainer.model.likelihood == "bernoulli"
        with torch.no_grad():
            z = trainer.model.encode(start.clamp(0, 1) if self.bernoulli else start)[0]
            self.one_pass = trainer.model.mean(z)
            self.add("one encode-decode pass", self.one_pass, trainer.model.pixel_log_prob(clean, z))
        n = len(trainer.dataset.train_images)
        if self.bernoulli:
            mean = (mean * n + 1) / (n + 2)  # so that no pixel is impossible
            log_prob = clean * mean.log() + (1 - clean) * (-mean).log1p()
        else:
            spread = (clean - mean).square().mean(0).clamp_min(1e-6)
            log_prob = -0.5 * ((clean - mean).square() / spread + (2 * math.pi * spread).log())
        self.add("the mean training image", mean.expand_as(clean), log_prob)

    def add(self, name: str, restored: Tensor, log_prob: Tensor) -> None:
        error, log_prob = ((t[self.wanted]).double().mean() for t in ((restored - self.clean).square(), log_prob))
        self.rows[name] = (float(error), float(log_prob))

    def add_restored(self, found: Restoration) -> None:
        assert found.log_prob is not None
        self.add("restored", found.mean, found.log_prob)

    def add_noisy(self, noisy: Tensor, flip: float | None, sigma: float | None) -> None:
        """The noisy image itself: what it says without any model."""
        if flip is not None:
            odds = (2 * noisy - 1) * (math.log1p(-flip) - math.log(flip))
        else:
            assert sigma is not None
            odds = (2 * noisy - 1) / (2 * sigma**2)
        if self.bernoulli:
            log_prob = torch.nn.functional.logsigmoid((2 * self.clean - 1) * odds)
        else:
            assert sigma is not None
            log_prob = -0.5 * ((self.clean - noisy) / sigma).square() - math.log(sigma * math.sqrt(2 * math.pi))
        self.add("the noisy image as it is", noisy, log_prob)

    def __str__(self) -> str:
        lines = [f"{'per pixel':26}{'squared error':>14}{'log-likelihood (nats)':>24}"]
        order = ["restored", *(name for name in self.rows if name != "restored")]
        lines += [f"{name:26}{self.rows[name][0]:14.4f}{self.rows[name][1]:24.4f}" for name in order]
        return "\n".join(lines)


def _restored(
    trainer: Trainer,
    target: _Out,
    found: Restoration,
    x: Tensor,
    clean: Tensor | None,
    observed: Tensor,
    what: str,
    scores: _Scores | None,
    given: str,
) -> Answer:
    def figure() -> Figure:
        hidden = ~observed.expand_as(x)[:PICTURED]
        rows = {} if clean is None else {"clean": clean[:PICTURED]}
        rows[given] = x[:PICTURED].nan_to_num()
        if scores is not None:
            rows["one pass"] = scores.one_pass[:PICTURED]
        rows["restored"] = found.mean[:PICTURED]
        return pictures.mosaic(
            f"{trainer.dataset.name}: {what}", rows, trainer.dataset.image_shape, missing={given: hidden}
        )

    if found.effective_sample_size is not None:
        quality = f"effective samples, median  {float(found.effective_sample_size.median()):.1f}"
    else:
        assert found.acceptance_rate is not None
        quality = f"proposals accepted  {float(found.acceptance_rate.mean()):.0%}"
    text = [what, *([str(scores)] if scores is not None else []), quality]
    return Answer(target.write(png=_png(figure), npy=_npy(found.mean)), "\n".join(text))


# ---- visualization --------------------------------------------------------------------------------------------------


def manifold(run: Run, out: str | None = None, *, num: int = 20, save_array: bool = False) -> Answer:
    """The learned manifold of a 2-dimensional z: `aevb manifold`."""
    trainer = Trainer.load(run)
    if trainer.model.latent_dim != 2:
        raise ValueError(
            f"the run's latent_dim is {trainer.model.latent_dim}; the manifold is a picture of 2 dimensions: see "
            "`aevb traverse`, which shows more, dimension by dimension"
        )
    target = _Out(trainer.folder, "manifold", out, (".png", ".npy"), _forms(save_array))
    images = trainer.model.manifold(num)
    dataset = trainer.dataset
    title = f"{dataset.name}: the learned manifold, z over the prior's quantiles"
    return Answer(
        target.write(
            png=_png(lambda: pictures.manifold(title, images, dataset.image_shape)),
            npy=_npy(images),
        )
    )


def traverse(
    run: Run,
    out: str | None = None,
    *,
    image: int = 0,
    dims: Sequence[int] | None = None,
    num_dims: int = 10,
    steps: int = 11,
    save_array: bool = False,
) -> Answer:
    """One dimension of z at a time through its prior: `aevb traverse`."""
    _at_least_1(num_dims=num_dims, steps=steps)
    trainer = Trainer.load(run)
    model, dataset = trainer.model, trainer.dataset
    target = _Out(trainer.folder, "traverse", out, (".png", ".npy"), _forms(save_array))
    total = len(dataset.test_images)
    if not 0 <= image < total:
        raise ValueError(f"image is {image}; expected the number of a test image, 0 to {total - 1}")
    kl = kl_per_dimension(model, pixels(trainer, dataset.test_images[:KL_IMAGES])).cpu()
    if dims is None:
        dims = kl.argsort(descending=True, stable=True)[:num_dims].tolist()
    (images,) = model.traverse(pixels(trainer, dataset.test_images[image : image + 1]), dims, steps)
    names = [f"z{j}, {kl[j]:.2f} nats" for j in dims]
    percent = [f"{100 * (i + 0.5) / steps:.0f}%" for i in range(steps)]
    title = f"{dataset.name}: test image {image}, each dimension of z through the quantiles of its prior"
    return Answer(
        target.write(
            png=_png(lambda: pictures.grid(title, images, dataset.image_shape, names, percent)), npy=_npy(images)
        )
    )


def interpolate(
    run: Run,
    out: str | None = None,
    *,
    pairs: int = 8,
    steps: int = 9,
    spherical: bool = False,
    seed: int = 0,
    save_array: bool = False,
) -> Answer:
    """From one test image to another: `aevb interpolate`."""
    _at_least_1(pairs=pairs)
    trainer = Trainer.load(run)
    dataset = trainer.dataset
    target = _Out(trainer.folder, "interpolate", out, (".png", ".npy"), _forms(save_array))
    total = len(dataset.test_images)
    if total < 2 * pairs:
        raise ValueError(f"pairs is {pairs}; expected at most {total // 2}, half of the {total} test images")
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: 2 * pairs]
    a, b = pixels(trainer, dataset.test_images[chosen]).chunk(2)
    images = trainer.model.interpolate(a, b, steps, spherical=spherical)
    shown = torch.cat([a.unsqueeze(1), images, b.unsqueeze(1)], 1)
    how = "on the sphere" if spherical else "on a line"
    title = f"{dataset.name}: from a test image to another, {how} between their posterior means"
    columns = ["image", *(f"{i / (steps - 1):.2g}" for i in range(steps)), "image"]
    return Answer(
        target.write(
            png=_png(lambda: pictures.grid(title, shown, dataset.image_shape, column_names=columns)), npy=_npy(images)
        )
    )


def _at_least_1(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")
