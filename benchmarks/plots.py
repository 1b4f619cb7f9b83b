"""Two pictures of the results: speed against size, and training against time."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .measure import Json

LABELS = {"aevb": "aevb", "eager": "eager PyTorch", "compile": "torch.compile", "jax": "JAX"}
COLORS = {"aevb": "#c1272d", "eager": "#8a8a8a", "compile": "#e69f00", "jax": "#0072b2"}
OPS = {"sample+KL": "sample and KL", "Bernoulli": "Bernoulli log-likelihood"}


def figure(columns: int, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    found = Figure(figsize=(9.6, height), layout="constrained")
    axes = found.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    return found, axes


def speed(results: Json) -> Any:
    """Bytes that an op must move, over the time that it takes."""
    found, axes = figure(len(OPS), 4.0)
    bandwidth = results["copy_bytes_per_second"]["sweep"]["median"] / 1e9
    for ax, (op, title) in zip(axes, OPS.items(), strict=True):
        cases = sorted(
            (case for name, case in results["sweep"].items() if name.startswith(op)), key=lambda case: case["elements"]
        )
        for provider, label in LABELS.items():
            names = ("compile", "tuned") if provider == "compile" else (provider,)
            points = []
            for case in cases:
                times = [case["providers"][n]["median"] for n in names if n in case["providers"]]
                if times:
                    points.append((case["elements"], case["traffic"] / min(times) / 1e9))
            if points:
                ours = provider == "aevb"
                ax.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3.5,
                    linewidth=2.2 if ours else 1.4,
                    color=COLORS[provider],
                    label=label,
                    zorder=3 if ours else 2,
                )
        ax.axhline(bandwidth, color="black", linewidth=1, linestyle="--")
        ax.annotate(
            f"a copy: {bandwidth:.0f} GB/s",
            (0.01, bandwidth),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(0, 3),
            fontsize=8,
        )
        ax.set(xscale="log", yscale="log", title=f"{title}, forward and backward", xlabel="elements")
    axes[0].set_ylabel("GB/s that the op must move")
    axes[0].legend(frameon=False, fontsize=9)
    return found


def curves(results: Json) -> Any:
    """The test ELBO against seconds since the command was given: each run, and the median time to the target."""
    found, (ax,) = figure(1, 4.4)
    training = results["training"]
    palette = ("#c1272d", "#8a8a8a", "#e69f00", "#0072b2")
    for color, (name, about) in zip(palette, training["providers"].items(), strict=False):
        for i, run in enumerate(about["runs"]):
            ax.plot(
                [point["seconds"] for point in run],
                [point["test_elbo"] for point in run],
                color=color,
                linewidth=1.2,
                alpha=0.75,
                marker="o",
                markersize=2.5,
                label=name if i == 0 else None,
            )
        if about["seconds"]:
            ax.axvline(about["seconds"]["median"], color=color, linewidth=0.8, linestyle=":")
    target = training["target_elbo"]
    ax.axhline(target, color="black", linewidth=1, linestyle="--")
    last = statistics.median(run[-1]["test_elbo"] for about in training["providers"].values() for run in about["runs"])
    ax.set(
        ylim=(target - 20, last + 2),
        xlim=(0, None),
        xlabel="seconds since the command was given",
        ylabel="test ELBO (nats per image)",
        title="MNIST, 784-500-20, Adam 1e-3, batch 100, two cores",
    )
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    return found


def draw(results: Json, folder: Path, prefix: str) -> list[Path]:
    """Writes <prefix>speed.png and <prefix>training.png, as far as there are results; returns them."""
    written = []
    for part, name, make in (("sweep", "speed", speed), ("training", "training", curves)):
        if part in results:
            path = folder / f"{prefix}{name}.png"
            make(results).savefig(path, dpi=110)
            written.append(path)
    return written
