"""Commands about the latent space.

They are `aevb reconstruct`, `sample`, `embed`, `manifold`, `traverse` and `interpolate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..inference.latent_space import kl_per_dimension
from ..inference.methods import posterior_draws
from ..models.own import encode
from ..training import pictures
from ..training.trainer import Trainer
from .files import Answer, Out, at_least_1, npy, png, to_bytes
from .images import asked_images, grey_pixels, held_out_pixels, if_another
from .options import (
    EmbedOptions,
    Flat,
    InterpolateOptions,
    ManifoldOptions,
    ModelOptions,
    OutputOptions,
    ReconstructOptions,
    SampleOptions,
    TraverseOptions,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 8
KL_IMAGES = 10_000  # for which dimensions are informative


def reconstruct(options: Flat[ReconstructOptions], output: Flat[OutputOptions], model: Flat[ModelOptions]) -> Answer:
    """Show images and their reconstructions, at the mean of the posterior.

    Leaves reconstructions.png in the run folder. With --save-array also reconstructions.npy, (N, pixels), of all
    images.

    Example: aevb reconstruct runs/digits --save-array
    """
    at_least_1(images=options.images)
    trainer = model.load()
    target = Out.of_images(trainer, "reconstructions", output, [options.data])
    asked = asked_images(trainer, options.part, options.data)
    if options.data is None and options.part in (None, "test"):
        index = pictures.examples(trainer.dataset, options.images)
    else:
        index = torch.arange(min(options.images, len(asked)))
    shown, grey = asked[index], asked.grey(index)
    look, binarized = pictures.ImageStyle(trainer.dataset.image_shape, output.invert), if_another(shown, grey)
    observed = asked.observed(index)
    array = asked.each(trainer.model.reconstruct) if ".npy" in target.always else shown[:0]
    return Answer(
        target.write(
            png=png(
                lambda: pictures.reconstructions(
                    asked.name, look, grey, trainer.model.reconstruct(shown, observed), asked.what, binarized, observed
                )
            ),
            npy=npy(array),
        )
    )


def sample(options: Flat[SampleOptions], output: Flat[OutputOptions], model: Flat[ModelOptions]) -> Answer:
    """Draw images from the model, at z from the prior.

    Leaves samples.png in the run folder. With --save-array also samples.npy, (num, pixels).

    Example: aevb sample runs/digits --num 50 --seed 1
    """
    at_least_1(num=options.num)
    trainer = model.load()
    target = Out.of_images(trainer, "samples", output)
    generator = torch.Generator(trainer.device).manual_seed(options.seed)
    images = trainer.model.sample(options.num, generator=generator)
    dataset = trainer.dataset
    look = pictures.ImageStyle(dataset.image_shape, output.invert)
    return Answer(target.write(png=png(lambda: pictures.samples(dataset.name, look, images)), npy=npy(images)))


def embed(options: Flat[EmbedOptions], model: Flat[ModelOptions]) -> Answer:
    """Write the posterior of each image.

    Leaves latent.npz, with mu, logvar and labels, and latent.png, a map of the means.

    Example: aevb embed runs/digits --part train --out features.npy
    """
    trainer = model.load()
    target = Out(trainer, "latent", options.out, (".npz", ".npy", ".png"), [".npz", ".png"], [options.data])
    if options.num_samples is not None:
        at_least_1(num_samples=options.num_samples)
    asked = asked_images(trainer, options.part, options.data)
    mu, logvar = asked.each(lambda x, observed: torch.stack(encode(trainer.model, x, None, observed), 1)).unbind(1)
    z = None if options.num_samples is None else posterior_draws(mu, logvar, options.num_samples, options.seed)
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


def manifold(options: Flat[ManifoldOptions], output: Flat[OutputOptions], model: Flat[ModelOptions]) -> Answer:
    """Show the manifold of a run with 2 latent dimensions.

    Its images are at z over a grid of the prior's quantiles. Leaves manifold.png in the run folder. With --save-array
    also manifold.npy, (num, num, pixels).

    Example: aevb manifold runs/mnist2 --num 25
    """
    trainer = model.load()
    if trainer.model.latent_dim != 2:
        raise ValueError(
            f"the run's latent_dim is {trainer.model.latent_dim}; the manifold is a picture of 2 dimensions: see "
            "`aevb traverse`, which shows more, dimension by dimension"
        )
    target = Out.of_images(trainer, "manifold", output)
    images = trainer.model.manifold(options.num)
    dataset = trainer.dataset
    title = f"{dataset.name}: the learned manifold, z over the prior's quantiles"
    look = pictures.ImageStyle(dataset.image_shape, output.invert)
    return Answer(target.write(png=png(lambda: pictures.manifold(title, images, look)), npy=npy(images)))


def traverse(options: Flat[TraverseOptions], output: Flat[OutputOptions], model: Flat[ModelOptions]) -> Answer:
    """Show the effect of each dimension of z.

    A dimension goes through the quantiles of its prior, and the others stay at an image's posterior mean. Leaves
    traverse.png in the run folder. With --save-array also traverse.npy, (dims, steps, pixels).

    Example: aevb traverse runs/digits --image 3 --dims 0 5 7
    """
    at_least_1(num_dims=options.num_dims, steps=options.steps)
    trainer = model.load()
    target = Out.of_images(trainer, "traverse", output)
    found = traversed(trainer, options, output.invert)
    return Answer(target.write(png=png(found.figure), npy=npy(found.images)), str(found))


@dataclass(frozen=True, eq=False)
class Traversal:
    """Latent traversal: images as one dimension of z goes through its prior.

    Attributes:
        images: The means E[x|z], (dims, steps, data_dim).
        dims: The dimensions of z.
        kl: Their mean KL over test images, in nats.
        image: Number of the test image at whose posterior mean the other dimensions stay.
        figure: Draws the images.
    """

    images: Tensor
    dims: Sequence[int]
    kl: Sequence[float]
    image: int
    figure: Callable[[], Figure]

    def __str__(self) -> str:
        dims = ", ".join(f"{j} ({kl:.2f} nats)" for j, kl in zip(self.dims, self.kl, strict=True))
        return f"test image {self.image}; dimensions of z, with their mean KL: {dims}"


def traversed(trainer: Trainer, options: TraverseOptions, invert: bool = False, bare: bool = False) -> Traversal:
    """Traverse z around the posterior mean of a test image.

    Args:
        trainer: The run.
        options: The image, dimensions and number of steps.
        invert: Show the images inverted.
        bare: Draw no text, which is to stand beside the picture.

    Raises:
        ValueError: There is no such test image.
    """
    model, dataset = trainer.model, trainer.dataset
    image, dims, steps = options.image, options.dims, options.steps
    total = len(dataset.test_images)
    if not 0 <= image < total:
        raise ValueError(f"image is {image}; expected the number of a test image, 0 to {total - 1}")
    x, observed = held_out_pixels(trainer, slice(KL_IMAGES))
    kl = kl_per_dimension(model, x, observed=observed).cpu()
    if dims is None:
        dims = tuple(kl.argsort(descending=True, stable=True)[: options.num_dims].tolist())
    start = dataset.test_images[image : image + 1]
    x, observed = held_out_pixels(trainer, slice(image, image + 1))
    (images,) = model.traverse(x, dims, steps, observed=observed)
    shown = torch.cat([grey_pixels(trainer, start).expand(len(dims), 1, -1), images], 1)
    names = [f"z{j}: {kl[j]:.2f} nats" for j in dims]
    columns = ["image", *(f"{100 * (i + 0.5) / steps:.0f}%" for i in range(steps))]
    title = f"{dataset.name}: test image {image}, each dimension of z (with its KL)\nthrough the quantiles of its prior"
    look = pictures.ImageStyle(dataset.image_shape, invert, bare)
    return Traversal(
        images, dims, [float(kl[j]) for j in dims], image, lambda: pictures.grid(title, shown, look, names, columns)
    )


def interpolate(options: Flat[InterpolateOptions], output: Flat[OutputOptions], model: Flat[ModelOptions]) -> Answer:
    """Show the way from one test image to another, between posterior means.

    It is linear, since on a line the prior's density never falls below that of the less dense of its ends.
    With --spherical it keeps the length of z.

    Leaves interpolate.png in the run folder. With --save-array also interpolate.npy, (pairs, steps, pixels).

    Example: aevb interpolate runs/digits --pairs 5 --seed 2
    """
    trainer = model.load()
    target = Out.of_images(trainer, "interpolate", output)
    images, figure = interpolated(trainer, options, output.invert)
    return Answer(target.write(png=png(figure), npy=npy(images)))


def interpolated(
    trainer: Trainer, options: InterpolateOptions, invert: bool = False, bare: bool = False
) -> tuple[Tensor, Callable[[], Figure]]:
    """Interpolate between test images that the seed chooses.

    Args:
        trainer: The run.
        options: The number of pairs and steps, and the path.
        invert: Show the images inverted.
        bare: Draw no text, which is to stand beside the picture.

    Returns:
        Images, (pairs, steps, data_dim), and a function that draws them.

    Raises:
        ValueError: The pairs are not positive, or more than the test images have.
    """
    dataset, steps = trainer.dataset, options.steps
    total = len(dataset.test_images)
    if total < 2:
        raise ValueError(f"{dataset.name} has one test image; expected at least 2, a pair")
    pairs = min(PAIRS, total // 2) if options.pairs is None else options.pairs
    at_least_1(pairs=pairs)
    if total < 2 * pairs:
        raise ValueError(f"pairs is {pairs}; expected at most {total // 2}, half of the {total} test images")
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(options.seed))[: 2 * pairs]
    x, observed = held_out_pixels(trainer, chosen)
    masks = None if observed is None else observed.chunk(2)
    images = trainer.model.interpolate(*x.chunk(2), steps, spherical=options.spherical, observed=masks)
    first, last = grey_pixels(trainer, dataset.test_images[chosen]).unsqueeze(1).chunk(2)
    shown = torch.cat([first, images, last], 1)
    how = "on a great circle" if options.spherical else "on a line"
    title = f"{dataset.name}: from a test image to another, {how} between their posterior means"
    columns = ["image", *(f"{i / (steps - 1):.2f}".rstrip("0").rstrip(".") for i in range(steps)), "image"]
    look = pictures.ImageStyle(dataset.image_shape, invert, bare)
    return images, lambda: pictures.grid(title, shown, look, column_names=columns)
