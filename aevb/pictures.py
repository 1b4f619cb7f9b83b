"""The pictures of a run, as PNG bytes by file name."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Dataset
from .models import BaseVAE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RGBA = tuple[float, float, float, float]

COLUMNS = 10
PAIR_ROWS = 4
SAMPLES = 100
LATENT_POINTS = 5000  # more only hide each other
DPI = 120


def draw(model: BaseVAE, dataset: Dataset, seed: int = 0) -> dict[str, bytes]:
    """reconstructions.png, samples.png and latent.png of the model and the test images.

    `seed` decides what is sampled from the prior. matplotlib's figures are used without its global state: no display is
    needed, and a caller's figures are left alone.
    """
    figures = {
        "reconstructions.png": _reconstructions(model, dataset),
        "samples.png": _samples(model, dataset, seed),
        "latent.png": _latent(model, dataset),
    }
    return {name: _png(figure) for name, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def _reconstructions(model: BaseVAE, dataset: Dataset) -> Figure:
    x = dataset.test_images[_examples(dataset)] * dataset.x_scale
    columns = min(COLUMNS, len(x))
    pairs = zip(x.split(columns), model.reconstruct(x).split(columns), strict=True)
    rows = [row for pair in pairs for row in pair]
    figure, axes = _figure(
        columns,
        len(rows),
        f"{dataset.name}: test images, and below each its reconstruction\n(pixel probabilities at the posterior mean)",
    )
    height = _show(axes, torch.cat(rows), columns, dataset.image_shape)
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], ["image", "reconstruction"] * (len(rows) // 2))
    return figure


def _examples(dataset: Dataset) -> Tensor:
    """Test images to show: a column for each label, where there are as many labels as columns; or the first ones."""
    count, labels = PAIR_ROWS * COLUMNS, dataset.test_labels
    if labels is not None:
        columns = [(labels == label).nonzero().flatten()[:PAIR_ROWS] for label in labels.unique()]
        if len(columns) == COLUMNS and all(len(c) == PAIR_ROWS for c in columns):
            return torch.stack(columns, dim=1).flatten()
    whole_rows = len(dataset.test_images) // COLUMNS * COLUMNS
    return torch.arange(min(count, whole_rows or len(dataset.test_images)))


def _samples(model: BaseVAE, dataset: Dataset, seed: int) -> Figure:
    images = model.sample(SAMPLES, generator=torch.Generator().manual_seed(seed))
    figure, axes = _figure(
        COLUMNS,
        SAMPLES // COLUMNS,
        f"{dataset.name}: samples from the prior\n(pixel probabilities at random z)",
    )
    _show(axes, images, COLUMNS, dataset.image_shape)
    axes.set_yticks([])
    return figure


def _latent(model: BaseVAE, dataset: Dataset) -> Figure:
    from matplotlib.figure import Figure

    images, labels = dataset.test_images[:LATENT_POINTS], dataset.test_labels
    with torch.no_grad():
        mu, _ = model.encode(images * dataset.x_scale)
    points, names = _plane(mu)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    size = min(30, max(6, 9000 / len(mu)))
    for colour, label, chosen in _by_label(labels, len(mu)):
        x, y = points[chosen].T.numpy()
        axes.scatter(x, y, s=size, alpha=0.7, linewidths=0, color=colour, label=label)
    if labels is not None:
        axes.legend(
            title="label", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=math.sqrt(40 / size)
        )
    axes.set(xlabel=names[0], ylabel=names[1], title=f"{dataset.name}: posterior means of {len(mu)} test images")
    centre, radius = (points.amax(0) + points.amin(0)) / 2, 0.55 * float((points.amax(0) - points.amin(0)).max()) or 1
    (left, bottom), (right, top) = (centre - radius).tolist(), (centre + radius).tolist()
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    return figure


def _by_label(labels: Tensor | None, count: int) -> Iterator[tuple[RGBA, str, Tensor]]:
    """For each label a colour, a name, and which of the first `count` images have it; without labels, for all."""
    from matplotlib import colormaps

    tab10 = colormaps["tab10"]
    if labels is None:
        yield tab10(0), "", torch.arange(count)
        return
    kinds = labels.unique().tolist()
    for i, kind in enumerate(kinds):
        colour = tab10(i) if len(kinds) <= 10 else colormaps["turbo"](i / (len(kinds) - 1))
        yield colour, str(kind), (labels[:count] == kind).nonzero().flatten()


def _plane(mu: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """Coordinates, (N, 2), of the posterior means, (N, J), and what the axes are."""
    if mu.shape[1] == 1:
        return F.pad(mu, (0, 1)), ("z", "")
    if mu.shape[1] == 2:
        return mu, ("first dimension of z", "second dimension of z")
    centred = mu.double() - mu.double().mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # in ascending order
    share = variances / variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
    first, second = (
        f"{which} of {mu.shape[1]} principal components ({part:.0%} of variance)"
        for which, part in zip(("first", "second"), share.flip(0).tolist(), strict=False)
    )
    return centred @ directions[:, [-1, -2]], (first, second)


def _figure(columns: int, rows: int, title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.75 * columns + 1.3, 0.75 * rows + 0.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def _show(axes: Axes, images: Tensor, columns: int, shape: tuple[int, ...]) -> float:
    """Shows images, (N, data_dim) in [0, 1], in rows of `columns`: grey ones dark on white, those of 3 or 4 channels in
    colour. The height of a row in the picture."""
    *channels, height, width = shape
    scale = math.ceil(84 / max(height, width))
    tiles = F.interpolate(
        images.float().view(-1, *(channels or [1]), height, width), scale_factor=scale, mode="bicubic"
    )
    tiles = F.pad(tiles.clamp(0, 1)[:, :3], [max(1, 84 // 16)] * 4, value=1 if channels else 0)
    _, depth, height, width = tiles.shape
    rows = math.ceil(len(tiles) / columns)
    empty = tiles.new_full((rows * columns - len(tiles), depth, height, width), 1 if channels else 0)
    mosaic = torch.cat([tiles, empty]).view(rows, columns, depth, height, width)
    mosaic = mosaic.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, depth)
    picture = mosaic.numpy() if channels else mosaic[..., 0].numpy()
    axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1, extent=(0, columns * width, rows * height, 0))
    return height
