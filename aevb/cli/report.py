"""The command `aevb report`: a run on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..inference.latent_space import active_units, kl_per_dimension
from ..plotting import printable
from ..training import pictures
from ..training.run_dir import EVALUATION, METRICS, RunFolder
from ..training.trainer import Trainer
from .files import Answer, Out
from .images import grey_pixels, held_out_pixels, if_another
from .latent import interpolated, traversed
from .options import (
    DenoiseOptions,
    Flat,
    ImputeOptions,
    InterpolateOptions,
    ModelOptions,
    ReportOptions,
    TraverseOptions,
)
from .page import Section, Table, image, ink, page, svg
from .restore import Restored, denoised, imputed, knows_noise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESTORED = 50  # test images, for the numbers
RESTORED_SHOWN = 10
FLIP, SIGMA = 0.2, 0.3
EVALUATED = {
    "elbo": "ELBO",
    "log_likelihood": "log-likelihood",
    "kl": "KL",
    "log_marginal_likelihood": "log p(x)",
    "standard_error": "its standard error",
    "num_samples": "samples for log p(x)",
    "mutual_information": "mutual information",
    "aggregate_kl": "KL of the aggregate posterior",
    "active_units": "active units",
    "collapsed_dimensions": "collapsed dimensions",
    "images": "test images",
}


def report(options: Flat[ReportOptions], model: Flat[ModelOptions]) -> Answer:
    """Write one page about a run.

    It has the run's options, training curves, images, the posterior and numbers. Leaves report.html in the run folder.

    The page needs nothing else, and can be sent as it is. With `aevb evaluate` before, it has log p(x) too.

    Example: aevb report runs/digits
    """
    trainer, seed, invert = model.load(), options.seed, options.invert
    target = Out(trainer, "report", options.out, (".html",), [".html"])
    history = _history(trainer.folder)
    sections = [
        *([_curves(history)] if history else []),
        _images(trainer, seed, invert),
        _posterior(trainer),
        _latent_space(trainer, seed, invert),
        _restoration(trainer, seed, invert),
        _evaluation(trainer),
        Section("Options", tables=[Table({name: [str(value)] for name, value in trainer.folder.options().items()})]),
    ]
    name = printable(trainer.dataset.name)
    title = f"aevb: {name}, {trainer.model.latent_dim} latent dimensions"
    return Answer(target.write(html=lambda: page(title, name, _what(trainer), _summary(trainer, history), sections)))


def _history(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none where there is no such file."""
    path = folder.path / METRICS
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _what(trainer: Trainer) -> str:
    model, dataset = trainer.model, trainer.dataset
    return (
        f"{len(dataset.train_images):,} training and {len(dataset.test_images):,} test images of "
        f"{'x'.join(map(str, dataset.image_shape))}, {model.likelihood.capitalize()} pixels, {model.latent_dim} latent "
        "dimensions"
    )


def _summary(trainer: Trainer, history: Sequence[Mapping[str, Any]]) -> str:
    """The test ELBO and its terms, of the weights that are loaded.

    These need not be the last.
    """
    if not history:
        return ""
    last = next((line for line in history if line.get("epoch") == trainer.epoch), history[-1])
    terms = ", ".join(
        f"{name} {last[key]:.2f}"
        for name, key in (("log-likelihood", "test_log_likelihood"), ("KL", "test_kl"))
        if key in last
    )
    if "test_elbo" not in last:
        return ""
    epochs = f" after {last['epoch']} epochs" if "epoch" in last else ""
    return f"Test ELBO {last['test_elbo']:.2f} nats per datapoint ({terms}){epochs}."


def _curves(history: Sequence[Mapping[str, Any]]) -> Section:
    """The ELBO and its two terms over the epochs, on three axes."""
    panels = {
        "ELBO": {"train_elbo": "training, as the weights move", "test_elbo": "test"},
        "test log-likelihood": {"test_log_likelihood": ""},
        "test KL": {"test_kl": ""},
    }
    drawn = []
    with ink():
        for name, lines in panels.items():
            figure, axes = _axes("epoch", f"{name} (nats)")
            if _lines(axes, history, lines):
                drawn.append(svg(figure, f"The {name} over the epochs, in nats per datapoint."))
    return Section("Training", pictures=drawn)


def _axes(x: str, y: str, size: tuple[float, float] = (4.6, 3.2)) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
    return figure, axes


def _lines(axes: Axes, history: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> bool:
    """Draw the series by key, with a legend where they have labels.

    Returns:
        Whether the history has any.
    """
    from matplotlib.ticker import MaxNLocator

    for key, label in names.items():
        points = [(line.get("epoch", i + 1), line[key]) for i, line in enumerate(history) if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else "", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines and any(names.values()):
        axes.legend(frameon=False)
    return bool(axes.lines)


def _images(trainer: Trainer, seed: int, invert: bool) -> Section:
    model, dataset = trainer.model, trainer.dataset
    chosen = pictures.examples(dataset, 2 * pictures.COLUMNS)
    (x, observed), grey = held_out_pixels(trainer, chosen), grey_pixels(trainer, dataset.test_images[chosen])
    drawn = model.sample(5 * pictures.COLUMNS, generator=torch.Generator(trainer.device).manual_seed(seed))
    look = pictures.ImageStyle(dataset.image_shape, invert, bare=True)
    reconstructions = pictures.reconstructions(
        dataset.name, look, grey, model.reconstruct(x, observed), binarized=if_another(x, grey), observed=observed
    )
    samples = pictures.samples(dataset.name, look, drawn)
    return Section("Images", pictures=[image(reconstructions), image(samples)])


def _posterior(trainer: Trainer) -> Section:
    """The latent map, and the KL of each dimension."""
    dataset = trainer.dataset
    x, observed = held_out_pixels(trainer, slice(pictures.LATENT_POINTS))
    mu = trainer.model.embed(x, observed=observed).mu.cpu()
    kl = kl_per_dimension(trainer.model, x, observed=observed).cpu()
    units = active_units(trainer.model, x, observed=observed)
    with ink():
        plane = pictures.latent("", mu, dataset.test_labels, dataset.label_names, size=(5.4, 4.4))
        bars = _bars(kl, units.mask.cpu())
        return Section(
            "The posterior",
            [
                f"{units.count} of {len(kl)} dimensions are active: the variance of the posterior mean is above 0.01. "
                f"The KL of all is {float(kl.sum()):.2f} nats."
            ],
            [
                svg(plane, f"The latent map: posterior means of {len(mu):,} test images."),
                svg(bars, "The KL of each dimension of z, mean over these images; grey: not active."),
            ],
        )


def _bars(kl: Tensor, active: Tensor) -> Figure:
    order = kl.argsort(descending=True, stable=True)
    figure, axes = _axes("dimension of z, the most informative first", "mean KL (nats)", (5.4, 4.4))
    colours = ["#4c8fd6" if active[j] else "#9a9a9a" for j in order]
    axes.bar(range(len(kl)), kl[order].tolist(), color=colours)
    axes.set_xlim(-0.7, max(len(kl), 8) - 0.3)
    if len(kl) <= 30:
        axes.set_xticks(range(len(kl)), [str(int(j)) for j in order], fontsize=8)
    axes.grid(axis="x", visible=False)
    return figure


def _latent_space(trainer: Trainer, seed: int, invert: bool) -> Section:
    """The manifold where it is a plane, else latent traversals; and interpolations."""
    dataset, shown = trainer.dataset, []
    if trainer.model.latent_dim == 2:
        title = f"{dataset.name}: the learned manifold, z over the prior's quantiles"
        look = pictures.ImageStyle(dataset.image_shape, invert, bare=True)
        shown.append(image(pictures.manifold(title, trainer.model.manifold(15), look)))
    else:
        shown.append(image(traversed(trainer, TraverseOptions(num_dims=8, steps=9), invert, bare=True).figure()))
    pairs = min(6, len(dataset.test_images) // 2)
    if pairs:
        _, figure = interpolated(trainer, InterpolateOptions(pairs=pairs, steps=7, seed=seed), invert, bare=True)
        shown.append(image(figure()))
    return Section("The latent space", pictures=shown)


def _restoration(trainer: Trainer, seed: int, invert: bool) -> Section:
    """Missing pixels, and noise."""
    found: list[Restored] = [imputed(trainer, ImputeOptions(images=RESTORED, mask="lower", seed=seed))]
    if knows_noise(trainer):
        noise: dict[str, Any] = {"flip": FLIP} if "flip" in trainer.model.family.noise else {"sigma": SIGMA}
        found.append(denoised(trainer, DenoiseOptions(images=RESTORED, seed=seed, **noise)))
    return Section(
        "Restoration",
        [
            "The posterior of the clean image, given a part or a noisy version of it: of the binarized image, where "
            "grey images are binarized for the model. One pass is the encoder and the decoder once, the missing pixels "
            "filled with the training mean."
        ],
        [image(one.figure(RESTORED_SHOWN, invert, bare=True)) for one in found],
        [one.table() for one in found],
        f"Means per pixel over {len(found[0].x)} images, {found[0].against}.",
    )


def _evaluation(trainer: Trainer) -> Section:
    """The numbers of evaluation.json, or of an evaluation that takes no time."""
    numbers = _evaluated(trainer)
    if numbers is not None:
        note = "Averages per test image, in nats, by `aevb evaluate`."
    else:
        found = trainer.evaluate()
        numbers = {"elbo": found.elbo, "log_likelihood": found.log_likelihood, "kl": found.kl}
        note = "Averages per test image, in nats. `aevb evaluate` adds log p(x) and more."
    rows = {
        label: [f"{value:,.3f}" if isinstance(value := numbers[key], float) else f"{value:,}"]
        for key, label in EVALUATED.items()
        if isinstance(numbers.get(key), int | float)
    }
    return Section("Evaluation", tables=[Table(rows, numbers=True)], note=note)


def _evaluated(trainer: Trainer) -> dict[str, Any] | None:
    """The numbers of evaluation.json, if they are of these weights.

    The run may have gone on since.
    """
    path = trainer.folder.path / EVALUATION
    if not path.is_file():
        return None
    try:
        numbers = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return numbers if (numbers.get("epoch"), numbers.get("step")) == (trainer.epoch, trainer.step) else None
