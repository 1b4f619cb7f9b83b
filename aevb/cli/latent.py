"""Answers of the latent space: `aevb reconstruct`, `sample`, `embed`, `manifold`, `traverse` and `interpolate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checks.arguments import takes_plain_values
from ..inference.latent_space import kl_per_dimension
from ..inference.methods import posterior_draws
from ..training import pictures
from ..training.trainer import Trainer
from .files import Answer, Out, Run, at_least_1, forms, npy, png, to_bytes
from .images import Part, asked_images, grey_pixels, if_another, pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 8
KL_IMAGES = 10_000  # for which dimensions are informative


@takes_plain_values
def reconstruct(
    run: Run,
    out: str | None = None,
    *,
    part: Part | None = None,
    data: str | None = None,
    images: int = 40,
    invert: bool = False,
    best: bool = False,
    save_array: bool = False,
) -> Answer:
    """Images and their reconstructions at the posterior mean: `aevb reconstruct`."""
    at_least_1(images=images)
    trainer = Trainer.load(run, best=best)
    target = Out(trainer, "reconstructions", out, (".png", ".npy"), forms(save_array), [data])
    asked = asked_images(trainer, part, data)
    spread = data is None and part in (None, "test")
    index = pictures.examples(trainer.dataset, images) if spread else torch.arange(min(images, len(asked)))
    shown, grey = asked[index], asked.grey(index)
    look, binarized = pictures.Look(trainer.dataset.image_shape, invert), if_another(shown, grey)
    array = asked.each(trainer.model.reconstruct) if ".npy" in target.always else shown[:0]
    return Answer(
        target.write(
            png=png(
                lambda: pictures.reconstructions(
                    asked.name, look, grey, trainer.model.reconstruct(shown), asked.what, binarized
                )
            ),
            npy=npy(array),
        )
    )


@takes_plain_values
def sample(
    run: Run,
    out: str | None = None,
    *,
    num: int = 100,
    seed: int = 0,
    invert: bool = False,
    best: bool = False,
    save_array: bool = False,
) -> Answer:
    """Images at draws of z from the prior: `aevb sample`."""
    at_least_1(num=num)
    trainer = Trainer.load(run, best=best)
    target = Out(trainer, "samples", out, (".png", ".npy"), forms(save_array))
    images = trainer.model.sample(num, generator=torch.Generator(trainer.device).manual_seed(seed))
    dataset = trainer.dataset
    look = pictures.Look(dataset.image_shape, invert)
    return Answer(target.write(png=png(lambda: pictures.samples(dataset.name, look, images)), npy=npy(images)))


@takes_plain_values
def embed(
    run: Run,
    out: str | None = None,
    *,
    part: Part | None = None,
    data: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    best: bool = False,
) -> Answer:
    """The posterior of each image, as arrays and a map: `aevb embed`."""
    trainer = Trainer.load(run, best=best)
    target = Out(trainer, "latent", out, (".npz", ".npy", ".png"), [".npz", ".png"], [data])
    if num_samples is not None:
        at_least_1(num_samples=num_samples)
    asked = asked_images(trainer, part, data)
    mu, logvar = asked.each(lambda x: torch.stack(trainer.model.encode(x), 1)).unbind(1)
    z = None if num_samples is None else posterior_draws(mu, logvar, num_samples, seed)
    arrays = {"mu": mu, "logvar": logvar, "z": z, "labels": asked.labels}
    present = {name: t.numpy() for name, t in arrays.items() if t is not None}
    if asked.labels is not None and asked.label_names:
        present["label_names"] = np.array(asked.label_names)
    shown = mu[: pictures.LATENT_POINTS]
    title = f"{asked.name}: posterior means of {len(shown)} {asked.what}"
    return Answer(
        target.write(
            npz=lambda: to_bytes(lambda file: np.savez(file, allow_pickle=False, **present)),
            npy=npy(mu),
            png=png(lambda: pictures.latent(title, shown, asked.labels, asked.label_names)),
        ),
        f"{len(asked):,} images, {mu.shape[1]} dimensions: {', '.join(present)}",
    )


@takes_plain_values
def manifold(
    run: Run,
    out: str | None = None,
    *,
    num: int = 20,
    invert: bool = False,
    best: bool = False,
    save_array: bool = False,
) -> Answer:
    """The learned manifold of a 2-dimensional z: `aevb manifold`."""
    trainer = Trainer.load(run, best=best)
    if trainer.model.latent_dim != 2:
        raise ValueError(
            f"the run's latent_dim is {trainer.model.latent_dim}; the manifold is a picture of 2 dimensions: see "
            "`aevb traverse`, which shows more, dimension by dimension"
        )
    target = Out(trainer, "manifold", out, (".png", ".npy"), forms(save_array))
    images = trainer.model.manifold(num)
    dataset = trainer.dataset
    title = f"{dataset.name}: the learned manifold, z over the prior's quantiles"
    look = pictures.Look(dataset.image_shape, invert)
    return Answer(target.write(png=png(lambda: pictures.manifold(title, images, look)), npy=npy(images)))


@takes_plain_values
def traverse(
    run: Run,
    out: str | None = None,
    *,
    best: bool = False,
    save_array: bool = False,
    num_dims: int = 10,
    steps: int = 11,
    **options: Any,
) -> Answer:
    """One dimension of z at a time through its prior: `aevb traverse`. `options` are those of `traversed`."""
    at_least_1(num_dims=num_dims, steps=steps)
    trainer = Trainer.load(run, best=best)
    target = Out(trainer, "traverse", out, (".png", ".npy"), forms(save_array))
    found = traversed(trainer, num_dims=num_dims, steps=steps, **options)
    return Answer(target.write(png=png(found.figure), npy=npy(found.images)), str(found))


@dataclass(frozen=True, eq=False)
class Traversal:
    """E[x|z], (dims, steps, data_dim), as one dimension of z at a time goes through its prior; its picture and text."""

    images: Tensor
    dims: Sequence[int]
    kl: Sequence[float]
    image: int
    figure: Callable[[], Figure]

    def __str__(self) -> str:
        dims = ", ".join(f"{j} ({kl:.2f} nats)" for j, kl in zip(self.dims, self.kl, strict=True))
        return f"test image {self.image}; dimensions of z, with their mean KL: {dims}"


@takes_plain_values
def traversed(
    trainer: Trainer,
    *,
    image: int = 0,
    dims: Sequence[int] | None = None,
    num_dims: int = 10,
    steps: int = 11,
    invert: bool = False,
    bare: bool = False,
) -> Traversal:
    """Traverses z around the posterior mean of a test image: by default the dimensions of largest KL."""
    model, dataset = trainer.model, trainer.dataset
    total = len(dataset.test_images)
    if not 0 <= image < total:
        raise ValueError(f"image is {image}; expected the number of a test image, 0 to {total - 1}")
    kl = kl_per_dimension(model, pixels(trainer, dataset.test_images[:KL_IMAGES])).cpu()
    if dims is None:
        dims = kl.argsort(descending=True, stable=True)[:num_dims].tolist()
    start = dataset.test_images[image : image + 1]
    (images,) = model.traverse(pixels(trainer, start), dims, steps)
    shown = torch.cat([grey_pixels(trainer, start).expand(len(dims), 1, -1), images], 1)
    names = [f"z{j}: {kl[j]:.2f} nats" for j in dims]
    columns = ["image", *(f"{100 * (i + 0.5) / steps:.0f}%" for i in range(steps))]
    title = f"{dataset.name}: test image {image}, each dimension of z (with its KL)\nthrough the quantiles of its prior"
    look = pictures.Look(dataset.image_shape, invert, bare)
    return Traversal(
        images, dims, [float(kl[j]) for j in dims], image, lambda: pictures.grid(title, shown, look, names, columns)
    )


@takes_plain_values
def interpolate(
    run: Run, out: str | None = None, *, best: bool = False, save_array: bool = False, **options: Any
) -> Answer:
    """From one test image to another: `aevb interpolate`. `options` are those of `interpolated`."""
    trainer = Trainer.load(run, best=best)
    target = Out(trainer, "interpolate", out, (".png", ".npy"), forms(save_array))
    images, figure = interpolated(trainer, **options)
    return Answer(target.write(png=png(figure), npy=npy(images)))


@takes_plain_values
def interpolated(
    trainer: Trainer,
    *,
    pairs: int | None = None,
    steps: int = 9,
    spherical: bool = False,
    seed: int = 0,
    invert: bool = False,
    bare: bool = False,
) -> tuple[Tensor, Callable[[], Figure]]:
    """(pairs, steps, data_dim), between test images that the seed chooses: by default 8 pairs, or as many as there
    are."""
    dataset = trainer.dataset
    total = len(dataset.test_images)
    if total < 2:
        raise ValueError(f"{dataset.name} has one test image; expected at least 2, a pair")
    pairs = min(PAIRS, total // 2) if pairs is None else pairs
    at_least_1(pairs=pairs)
    if total < 2 * pairs:
        raise ValueError(f"pairs is {pairs}; expected at most {total // 2}, half of the {total} test images")
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: 2 * pairs]
    a, b = pixels(trainer, dataset.test_images[chosen]).chunk(2)
    images = trainer.model.interpolate(a, b, steps, spherical=spherical)
    first, last = grey_pixels(trainer, dataset.test_images[chosen]).unsqueeze(1).chunk(2)
    shown = torch.cat([first, images, last], 1)
    how = "on a great circle" if spherical else "on a line"
    title = f"{dataset.name}: from a test image to another, {how} between their posterior means"
    columns = ["image", *(f"{i / (steps - 1):.2f}".rstrip("0").rstrip(".") for i in range(steps)), "image"]
    look = pictures.Look(dataset.image_shape, invert, bare)
    return images, lambda: pictures.grid(title, shown, look, column_names=columns)
