"""`python -m benchmarks.missing --mnist path/to/mnist`: VAEs trained on data with holes.

* MNIST with half of the pixels missing at random, in training and test images alike. p(x|z) is of bits: the grey value
  of a pixel is the probability that it is set, drawn anew at each step. VAEs that are trained on what is observed, and
  the same VAE (784-500-20), for as many epochs, trained on images whose missing pixels have the mean of the pixel's
  observed values. All are asked in one way: log p(x_observed) by importance sampling, of the same bits, and the mean of
  the missing pixels by `impute`, each encoder being given what it was given in training.
* The shipped digits with 30% and 50% of the pixels missing at random, grey, Gaussian p(x|z): the error of `impute`
  against that of scikit-learn's IterativeImputer, with its defaults and with limits of 0 and 1 (which is not a
  dependency; without it this part has no row of it). All are fitted to the training images and asked about the test
  images.

RMSE is of the missing pixels of the test images, whose grey values are in [0, 1].
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aevb
from aevb.data import Dataset, load
from aevb.inference.noise_models import random_mask

from .measure import RESULTS, describe

Row = dict[str, Any]
SEED = 11  # of the holes


def images_of(data: Dataset) -> dict[str, Tensor]:
    """The images of both parts, which are in memory."""
    assert isinstance(data.train_images, Tensor)
    assert isinstance(data.test_images, Tensor)
    return {"train": data.train_images, "test": data.test_images}


def with_holes(data: Dataset, missing: float, train: int | None = None) -> Dataset:
    """A data set with pixels missing at random, of the first `train` training images."""
    images = {part: x[: train if part == "train" else None] for part, x in images_of(data).items()}
    observed = {
        part: random_mask(torch.empty(x.shape), missing, seed=SEED + i) for i, (part, x) in enumerate(images.items())
    }
    return Dataset(data.name, data.image_shape, data.max_value, images["train"], images["test"], observed=observed)


def means_of_pixels(data: Dataset) -> Tensor:
    """The mean of each pixel's observed training values, in the data's units."""
    return images_of(data)["train"].sum(0, dtype=torch.float64) / data.observed["train"].sum(0).clamp_min(1)


def mean_imputed(data: Dataset) -> Dataset:
    """The data with the mean of each pixel where it is missing, and without masks."""
    means = means_of_pixels(data).round().to(torch.uint8)
    filled = {part: torch.where(data.observed[part], x, means) for part, x in images_of(data).items()}
    return Dataset(data.name, data.image_shape, data.max_value, filled["train"], filled["test"])


class MeanFilled(torch.nn.Module):
    """A VAE whose encoder is given means where pixels are missing, as it was in training."""

    mask_input = True  # so that `encode` is given the mask

    def __init__(self, model: aevb.VAE, means: Tensor):
        super().__init__()
        self.model, self.means = model, means

    def encode(self, x: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode(torch.where(observed, x.float(), self.means))

    def log_prob(self, x: Tensor, z: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.model.log_prob(x, z, weight=weight)


def rmse(found: Tensor, grey: Tensor, observed: Tensor) -> float:
    return math.sqrt(float((found - grey).square()[~observed].double().mean()))


def fitted(data: Dataset, **options: Any) -> tuple[aevb.VAE, float]:
    """A VAE trained on the data, and the seconds that it took."""
    trainer = aevb.Trainer(aevb.TrainConfig(**options), dataset=data)
    start = time.perf_counter()
    for _ in range(trainer.config.epochs):
        trainer.train_epoch()
    return trainer.model.eval(), time.perf_counter() - start


def mnist(path: str, quick: bool) -> list[Row]:
    """Half of the pixels missing: trained on what is observed, and on means."""
    epochs, images, num_samples = (2, 100, 100) if quick else (10, 1000, 1000)
    whole = load(path)
    data = with_holes(whole, 0.5, 5000 if quick else None)
    means = (means_of_pixels(data) / data.max_value).float()
    grey, observed = whole.test_images[:images] / whole.max_value, data.observed["test"][:images]
    bits = aevb.binarize(whole.test_images[:images].contiguous(), torch.arange(images), seed=SEED, max_value=255)
    rows: list[Row] = [
        {"data": "MNIST", "missing": 0.5, "method": "the mean of each pixel", "rmse": rmse(means, grey, observed)}
    ]
    runs: dict[str, tuple[Dataset, dict[str, Any]]] = {
        "VAE on mean-imputed data": (mean_imputed(data), {}),
        "VAE on what is observed": (data, {}),
        "VAE, mask given to the encoder": (data, {"mask_input": True}),
        "MIWAE, k = 5": (data, {"estimator": "iwae", "num_samples": 5}),
    }
    for name, (training, options) in runs.items():
        model, seconds = fitted(training, epochs=epochs, **options)
        on_means = not training.observed
        asked: Any = MeanFilled(model, means) if on_means else model
        found = aevb.log_marginal_likelihood(asked, bits, num_samples, observed=observed)
        restored = model.impute(grey, observed, fill=means if on_means else 0.0)
        rows.append(
            {
                "data": "MNIST",
                "missing": 0.5,
                "method": name,
                "rmse": rmse(restored.mean, grey, observed),
                "log_prob": found.mean,
                "standard_error": found.mean_standard_error,
                "effective_samples_median": float(found.effective_sample_size.median()),
                "epochs": epochs,
                "training_images": len(data.train_images),
                "test_images": images,
                "num_samples": num_samples,
                "training_seconds": round(seconds),
            }
        )
        say(rows[-1])
    return rows


def digits(missing: float, quick: bool) -> list[Row]:
    """The shipped digits: `impute` against the mean and scikit-learn's IterativeImputer."""
    epochs = 20 if quick else 100
    whole = load("digits")
    data = with_holes(whole, missing)
    grey, observed = whole.test_images[:] / whole.max_value, data.observed["test"]
    about = {"data": "digits", "missing": missing, "test_images": len(grey)}
    means = (means_of_pixels(data) / data.max_value).float()
    rows: list[Row] = [{**about, "method": "the mean of each pixel", "rmse": rmse(means, grey, observed)}]
    if importlib.util.find_spec("sklearn"):
        for name, limits in {
            "IterativeImputer": {},
            "IterativeImputer in [0, 1]": {"min_value": 0, "max_value": 1},
        }.items():
            rows.append({**about, "method": name, "rmse": rmse(iterative(data, **limits), grey, observed)})
            say(rows[-1])
    runs: dict[str, dict[str, Any]] = {
        "VAE on what is observed": {},
        "VAE, mask given to the encoder": {"mask_input": True},
        "MIWAE, k = 20": {"estimator": "iwae", "num_samples": 20},
    }
    for name, options in runs.items():
        model, seconds = fitted(data, epochs=epochs, hidden_dims=(200,), likelihood="gaussian", **options)
        restored = model.impute(grey, observed, fill=0.0)
        error = rmse(restored.mean, grey, observed)
        rows.append({**about, "method": name, "rmse": error, "epochs": epochs, "training_seconds": round(seconds)})
        say(rows[-1])
    return rows


def iterative(data: Dataset, **limits: int) -> Tensor:
    """The test images by scikit-learn's IterativeImputer, fitted to the training images, in units of [0, 1]."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401  which sklearn wants before
    from sklearn.impute import IterativeImputer

    train, test = (
        images.float().where(data.observed[part], torch.nan) / data.max_value
        for part, images in images_of(data).items()
    )
    imputer = IterativeImputer(random_state=0, keep_empty_features=True, **limits).fit(train.numpy())
    return torch.from_numpy(imputer.transform(test.numpy())).float()


def say(row: Row) -> None:
    log_prob = f"{row['log_prob']:.2f} ± {row['standard_error']:.2f}" if "log_prob" in row else ""
    print(
        f"| {row['data']}, {row['missing']:.0%} missing | {row['method']} | {row['rmse']:.4f} | {log_prob} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", help="a folder with MNIST's four IDX files; without it the digits alone")
    parser.add_argument("--quick", action="store_true", help="a look at it: few images and epochs; writes nothing")
    parser.add_argument("--results", type=Path, default=RESULTS / "missing.json")
    args = parser.parse_args()

    print("| data | method | RMSE of the missing pixels | log p(x_observed), nats |\n|---|---|--:|--:|")
    rows = [row for missing in (0.3, 0.5) for row in digits(missing, args.quick)]
    if args.mnist:
        rows += mnist(args.mnist, args.quick)
    if not args.quick:
        args.results.write_text(json.dumps({**describe(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
