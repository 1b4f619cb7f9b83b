"""Pictures of a training run, and the figures that all pictures use."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import Dataset
from ..data.targets import encoder_input
from ..models import BaseVAE
from ..models.own import encode
from ..plotting import drawn, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RGBA = tuple[float, float, float, float]

COLUMNS = 10
PAIR_ROWS = 4
SAMPLES = 100
NAME_LENGTH = 24  # letters of a label's name, at most
LEGEND_LABELS = 25  # a longer legend outgrows the picture
LATENT_POINTS = 5000  # further points only hide each other
DPI = 120
SIDE = 0.75  # inches of an image's longer side
NAMED_ROW = 0.2  # inches of a row with a name, at least
LEAST_HEIGHT = 0.4  # inches of all rows
TILE = 84  # pixels that an image is drawn with, at least
MARGIN = 5
MANIFOLD_MARGIN = 2  # tiles are many, and must not touch
MISSING = (0.72, 0.83, 0.95)  # colour of missing pixels


class ImageStyle(NamedTuple):
    """Look of images in a picture.

    Attributes:
        shape: the shape of an image: (height, width) or (channels, height, width).
        invert: whether 0 is white.
        bare: whether the picture is without text, which `caption(figure)` returns to stand beside it.
    """

    shape: Sequence[int]
    invert: bool = False
    bare: bool = False

    @property
    def sides(self) -> tuple[float, float]:
        """Width and height of an image, the longer side being 1."""
        height, width = self.shape[-2:]
        return width / max(height, width), height / max(height, width)


@drawn
def draw(
    model: BaseVAE, dataset: Dataset, seed: int = 0, invert: bool = False, binarize: str = "none"
) -> dict[str, bytes]:
    """Returns reconstructions.png, samples.png and latent.png, by name, as PNG bytes.

    `aevb reconstruct`, `sample` and `embed` draw the same pictures anew. matplotlib's figures are used without its
    global state: no display is needed, and a caller's figures are left alone.

    Args:
        model: the VAE.
        dataset: the data set, whose test images are drawn.
        seed: the seed of the samples from the prior.
        invert: whether 0 is white.
        binarize: the way in which the encoder's input is binarized.
    """
    look = ImageStyle(dataset.image_shape, invert)
    figures = {
        "reconstructions.png": _reconstructions(model, dataset, look, binarize),
        "samples.png": _samples(model, dataset, look, seed),
        "latent.png": _latent(model, dataset, binarize),
    }
    return {name: png(figure) for name, figure in figures.items()}


@drawn
def png(figure: Figure) -> bytes:
    """Returns a figure as PNG bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def caption(figure: Figure) -> str:
    """Returns a picture's title, with the meaning of its rows and columns."""
    return str(figure.get_label())


def _reconstructions(model: BaseVAE, dataset: Dataset, look: ImageStyle, binarize: str) -> Figure:
    index = examples(dataset, PAIR_ROWS * COLUMNS)
    images, observed = dataset.test_images[index], masks_of(dataset, "test", index)
    grey, x = (encoder_input(images, dataset.max_value, how) for how in ("none", binarize))
    binarized = None if torch.equal(x, grey) else x
    return reconstructions(
        dataset.name, look, grey, model.reconstruct(x, observed), binarized=binarized, observed=observed
    )


def masks_of(dataset: Dataset, part: str, index: Tensor | slice) -> Tensor | None:
    """Returns the masks of a part's images `index`, or None where nothing is missing."""
    masks = dataset.observed.get(part)
    return None if masks is None else masks[index]


@drawn
def reconstructions(
    name: str,
    look: ImageStyle,
    x: Tensor,
    reconstructed: Tensor,
    what: str = "test images",
    binarized: Tensor | None = None,
    observed: Tensor | None = None,
) -> Figure:
    """Returns a figure of images, with each image's reconstruction below it.

    Args:
        name: the name of the data set.
        look: the images' look.
        x: (N, data_dim), the images.
        reconstructed: (N, data_dim), their reconstructions.
        what: the part of the data set that the images are, for the title.
        binarized: (N, data_dim), the binarized images, if these were reconstructed.
        observed: (N, data_dim), bool, the masks of the images, where pixels are missing.
    """
    rows = {"image": x, **({} if binarized is None else {"binarized": binarized}), "reconstruction": reconstructed}
    return mosaic(
        f"{name}: {what}, and below each its reconstruction\n(expected pixels at the posterior mean)",
        rows,
        look,
        missing=None if observed is None else dict.fromkeys(list(rows)[:-1], ~observed),
    )


def examples(dataset: Dataset, count: int) -> Tensor:
    """Returns the numbers of `count` test images, for rows of `COLUMNS`.

    Each label has a column, where there are as many labels as columns and enough images. Otherwise the images are
    spread evenly over the test part, which may be sorted.
    """
    labels, total = dataset.test_labels, len(dataset.test_images)
    if labels is not None:
        rows = math.ceil(count / COLUMNS)
        columns = [(labels == label).nonzero().flatten()[:rows] for label in labels.unique()]
        if len(columns) == COLUMNS and all(len(c) == rows for c in columns):
            return torch.stack(columns, dim=1).flatten()[:count]
    count = min(count, total)
    return torch.arange(count) * total // count


def _samples(model: BaseVAE, dataset: Dataset, look: ImageStyle, seed: int) -> Figure:
    images = model.sample(SAMPLES, generator=torch.Generator().manual_seed(seed))
    return samples(dataset.name, look, images)


@drawn
def samples(name: str, look: ImageStyle, images: Tensor) -> Figure:
    """Returns a figure of samples from the prior, (N, data_dim)."""
    return mosaic(f"{name}: samples from the prior\n(expected pixels at random z)", {"": images}, look)


def _latent(model: BaseVAE, dataset: Dataset, binarize: str) -> Figure:
    images, labels = dataset.test_images[:LATENT_POINTS], dataset.test_labels
    observed = masks_of(dataset, "test", slice(LATENT_POINTS))
    with torch.no_grad():
        mu, _ = encode(model, encoder_input(images, dataset.max_value, binarize), None, observed)
    return latent(f"{dataset.name}: posterior means of {len(mu)} test images", mu, labels, dataset.label_names)


@drawn
def latent(
    title: str,
    mu: Tensor,
    labels: Tensor | None,
    label_names: Sequence[str] = (),
    size: tuple[float, float] = (7, 6),
) -> Figure:
    """Returns a scatter plot of posterior means, coloured by label.

    Args:
        title: the title.
        mu: (N, latent_dim), the posterior means.
        labels: the labels, of which the first N are used; None for one colour.
        label_names: the labels' names, if they have any.
        size: width and height in inches.
    """
    from matplotlib.figure import Figure

    points, names = _plane(mu)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    area = min(30, max(6, 9000 / len(mu)))
    for colour, label, chosen in _by_label(labels, len(mu), label_names):
        x, y = points[chosen].T.numpy()
        axes.scatter(x, y, s=area, alpha=0.7, linewidths=0, color=colour, label=label, rasterized=True)
    if labels is not None and len(labels.unique()) > LEGEND_LABELS:
        _colour_bar(figure, axes, [_named(kind, label_names) for kind in labels.unique().tolist()])
    elif labels is not None:
        axes.legend(
            title="label", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=math.sqrt(40 / area)
        )
    axes.set(xlabel=names[0], ylabel=names[1], title=printable(title))
    centre, radius = (points.amax(0) + points.amin(0)) / 2, 0.55 * float((points.amax(0) - points.amin(0)).max()) or 1
    (left, bottom), (right, top) = (centre - radius).tolist(), (centre + radius).tolist()
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    return figure


def _colour_bar(figure: Figure, axes: Axes, kinds: Sequence[str]) -> None:
    """Add a colour bar for labels, with the names of some.

    It stands in for a legend that would be too long.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    last = len(kinds) - 1
    bar = figure.colorbar(ScalarMappable(Normalize(0, last), colormaps["turbo"]), ax=axes, shrink=0.6)
    marks = [round(last * i / 8) for i in range(9)]
    bar.set_ticks(marks, labels=[kinds[i] for i in marks])
    bar.set_label(f"label, of {len(kinds)}")


def _named(label: int, names: Sequence[str]) -> str:
    """Returns a label's name, cut to its space in a picture."""
    name = printable(names[label]) if 0 <= label < len(names) else str(label)
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"


def _by_label(labels: Tensor | None, count: int, names: Sequence[str] = ()) -> Iterator[tuple[RGBA, str, Tensor]]:
    """Yields each label's colour, its name, and the numbers of its images.

    Only the first `count` images are looked at. Without labels, all of them have one colour and no name.
    """
    from matplotlib import colormaps

    tab10 = colormaps["tab10"]
    if labels is None:
        yield tab10(0), "", torch.arange(count)
        return
    kinds = labels.unique().tolist()
    for i, kind in enumerate(kinds):
        colour = tab10(i) if len(kinds) <= 10 else colormaps["turbo"](i / (len(kinds) - 1))
        yield colour, _named(kind, names), (labels[:count] == kind).nonzero().flatten()


def _plane(mu: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """Returns coordinates (N, 2) of posterior means (N, J), and axis names.

    For J above 2 they are the first two principal components.
    """
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


@drawn
def mosaic(
    title: str,
    rows: dict[str, Tensor],
    look: ImageStyle,
    columns: int = COLUMNS,
    missing: dict[str, Tensor] | None = None,
) -> Figure:
    """Returns a figure of images in rows, with names at the left.

    The first row of each name comes first, then the second row of each, and so on.

    Args:
        title: the title.
        rows: (N, data_dim) images by name.
        look: the images' look.
        columns: the number of images in a row, at most.
        missing: (N, data_dim), bool, the missing pixels of the images with some of the names.
    """
    columns = max(min(columns, *(len(images) for images in rows.values())), 1)
    named = any(rows)
    groups = list(zip(*(images.split(columns) for images in rows.values()), strict=True))
    tiles = {
        name: _tiles(images, look, (missing or {}).get(name), named=named).split(columns)
        for name, images in rows.items()
    }
    names = list(rows) * len(groups)
    figure, axes = _figure(columns, len(names), title, look, named=named)
    if named:
        _describe(figure, f"From top to bottom: {', '.join(rows)}.")
    height = _show(axes, [part for group in zip(*tiles.values(), strict=True) for part in group], columns)
    _name_rows(axes, height, names if named else [], look)
    return figure


@drawn
def grid(
    title: str, images: Tensor, look: ImageStyle, row_names: Sequence[str] = (), column_names: Sequence[str] = ()
) -> Figure:
    """Returns a figure of images in named rows and columns.

    Args:
        title: the title.
        images: (rows, columns, data_dim).
        look: the images' look.
        row_names: the names at the left.
        column_names: the names at the top.
    """
    rows, columns, _ = images.shape
    figure, axes = _figure(columns, rows, title, look, named=bool(row_names))
    if row_names:
        _describe(figure, f"From top to bottom: {', '.join(row_names)}.")
    if column_names:
        _describe(figure, f"From left to right: {', '.join(column_names)}.")
    height = _show(axes, list(_tiles(images.flatten(0, 1), look, named=bool(row_names)).split(columns)), columns)
    _name_rows(axes, height, row_names, look)
    if column_names and not look.bare:
        width = axes.get_xlim()[1] / columns
        axes.set_xticks([width * (i + 0.5) for i in range(len(column_names))], column_names)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
    return figure


@drawn
def manifold(title: str, images: Tensor, look: ImageStyle) -> Figure:
    """Returns a figure of the manifold (n, n, data_dim), with some coordinates."""
    n = len(images)
    marks = sorted({0, n // 4, n // 2, n - 1 - n // 4, n - 1})
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).tolist()
    figure, axes = _figure(n, n, title, look, side=0.42)
    height = _show(axes, list(_tiles(images.flatten(0, 1), look, margin=MANIFOLD_MARGIN).split(n)), n)
    _describe(
        figure,
        f"The first dimension of z grows to the right, the second upwards, {quantiles[0]:.2f} to {quantiles[-1]:.2f}.",
    )
    if look.bare:
        return figure
    width = axes.get_xlim()[1] / n
    axes.set_xticks([width * (i + 0.5) for i in marks], [f"{quantiles[i]:.2f}" for i in marks])
    axes.set_yticks([height * (i + 0.5) for i in marks], [f"{quantiles[n - 1 - i]:.2f}" for i in marks])
    axes.set(xlabel="first dimension of z", ylabel="second dimension of z")
    return figure


def _figure(
    columns: int, rows: int, title: str, look: ImageStyle, side: float = SIDE, named: bool = False
) -> tuple[Figure, Axes]:
    """Returns a figure with a title, and axes for rows of images.

    Args:
        columns: the number of images in a row.
        rows: the number of rows.
        title: the title.
        look: the images' look.
        side: inches of an image's longer side.
        named: whether the rows have names, which need a least height, however low the images are.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    title = printable(f"{title} (inverted)" if look.invert else title)
    longest = max(map(len, title.splitlines()))
    width, height = look.sides
    row = max(side * height, NAMED_ROW) if named else side * height
    if look.bare:
        figure = Figure(figsize=(side * width * columns, row * rows))
        _describe(figure, f"{title}.".replace("\n", " "))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        return figure, axes
    size = (
        max(side * width * columns + (1.5 if named else 1.3), 0.085 * longest + 0.4),
        max(row * rows, LEAST_HEIGHT) + 0.8,
    )
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=11)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def _describe(figure: Figure, sentence: str) -> None:
    """Append a sentence to the figure's caption."""
    figure.set_label(f"{caption(figure)} {sentence}".strip())


def _name_rows(axes: Axes, height: float, names: Sequence[str], look: ImageStyle) -> None:
    shown = [] if look.bare else names
    axes.set_yticks([height * (i + 0.5) for i in range(len(shown))], shown)


def _tiles(
    images: Tensor, look: ImageStyle, missing: Tensor | None = None, margin: int = MARGIN, named: bool = False
) -> Tensor:
    """Returns coloured tiles (N, 3, height, width) of images, with margins.

    Args:
        images: (N, data_dim) in [0, 1].
        look: the images' look.
        missing: (N, data_dim), bool, the missing pixels.
        margin: pixels around each image.
        named: whether the rows have names; each tile is then at least as high as a name.
    """
    channels, height, width = (1, *look.shape) if len(look.shape) == 2 else look.shape
    scale = math.ceil(TILE / max(height, width))
    tiles = images.float().cpu().reshape(-1, channels, height, width)
    tiles = F.interpolate(tiles, scale_factor=scale, mode="bicubic").clamp(0, 1)
    if channels < 3:
        tiles = tiles[:, :1].expand(-1, 3, -1, -1)
    tiles = 1 - tiles[:, :3] if look.invert else tiles[:, :3]
    if missing is not None:
        hidden = missing.cpu().view(-1, channels, height, width).any(1, keepdim=True).float()
        hidden = F.interpolate(hidden, scale_factor=scale, mode="nearest") > 0
        tiles = torch.where(hidden, torch.tensor(MISSING).view(3, 1, 1), tiles)
    tiles = F.pad(tiles, [margin] * 4, value=1)
    least = math.ceil(NAMED_ROW / (SIDE * look.sides[0]) * tiles.shape[-1]) if named else 0
    lacking = max(0, least - tiles.shape[-2])
    return F.pad(tiles, (0, 0, lacking // 2, lacking - lacking // 2), value=1)


def _show(axes: Axes, rows: Sequence[Tensor], columns: int) -> float:
    """Show rows of at most `columns` tiles; return a row's height."""
    _, _, height, width = rows[0].shape
    blank = rows[0].new_ones(1, 3, height, width)
    full = [torch.cat([row, *[blank] * (columns - len(row))]) for row in rows]
    picture = torch.cat([row.permute(2, 0, 3, 1).reshape(height, columns * width, 3) for row in full])
    axes.imshow(picture.numpy(), extent=(0, columns * width, len(rows) * height, 0))
    return height
