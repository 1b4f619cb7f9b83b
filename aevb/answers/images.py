"""The images that a run is asked about, and masks.

Images go into the encoder as the run's pixels in [0, 1]: thresholded where the run's were, and grey where its bits were
drawn anew at each step, so that an answer has no noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data import Dataset, load
from ..observations import random_mask
from ..ops import mix_seed
from ..train import Trainer

Part = Literal["train", "validation", "test"]


def pixels(trainer: Trainer, images: Tensor, dataset: Dataset | None = None) -> Tensor:
    """What the encoder is given of a data set's images, (N, data_dim), float32, on the trainer's device."""
    dataset = dataset or trainer.dataset
    if trainer.config.binarize == "threshold":
        return (images > dataset.max_value // 2).float().to(trainer.device)
    return (images * dataset.x_scale).to(trainer.device)


def training_moments(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """The mean and the variance of each pixel over the training images, (data_dim,)."""
    images = trainer.dataset.train_images
    total = squares = torch.zeros((), device=trainer.device)
    for begin in range(0, len(images), 10_000):
        x = pixels(trainer, images[begin : begin + 10_000]).double()
        total, squares = total + x.sum(0), squares + x.square().sum(0)
    mean = total / len(images)
    return mean.float(), (squares / len(images) - mean.square()).clamp_min(0).float()


def asked_images(trainer: Trainer, part: Part, data: str | None) -> tuple[Tensor, Tensor | None]:
    """The images to ask about, (N, data_dim) in [0, 1], and their labels: a .npy file's, or a part of a data set."""
    if data is not None and data.endswith(".npy"):
        return array_images(trainer, data, clean=True), None
    dataset = trainer.dataset if data is None else load(data)
    images, labels = (getattr(dataset, f"{part}_{kind}", None) for kind in ("images", "labels"))
    if images is None:
        raise ValueError(f"{dataset.name} has no {part} part; expected 'train' or 'test'")
    if dataset.data_dim != trainer.dataset.data_dim:
        raise ValueError(
            f"{data} has images of {'x'.join(map(str, dataset.image_shape))}; expected "
            f"{'x'.join(map(str, trainer.dataset.image_shape))}, the run's"
        )
    return pixels(trainer, images[:], dataset), labels


def array_images(trainer: Trainer, path: str, clean: bool) -> Tensor:
    """Images of a .npy file, (N, data_dim), float32: bits; integers in 0..max_value, where one is above 1; or numbers
    in [0, 1], with noise perhaps beyond."""
    dataset, array = trainer.dataset, _loadnpy(path)
    x = _flat(array, dataset, path)
    if array.dtype.kind in "iu" and array.size and array.max() > 1:
        x = x * dataset.x_scale
    if clean and not ((x >= 0) & (x <= 1) | x.isnan()).all():
        raise ValueError(
            f"{path} holds values from {float(x.min()):g} to {float(x.max()):g}; expected numbers in [0, 1], or "
            f"integers in 0..{dataset.max_value}"
        )
    return x.to(trainer.device)


def _loadnpy(path: str) -> np.ndarray:
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
    array = _loadnpy(mask)
    if array.dtype.kind not in "biu" and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{mask} holds values other than 0 and 1; expected 1 or True where a pixel is observed")
    if array.shape == shape[-2:]:
        array = np.broadcast_to(array, shape)
    found = _flat(array, trainer.dataset, mask).bool().to(x.device)
    if len(found) not in (1, len(x)):
        raise ValueError(f"{mask} has {len(found)} masks; expected 1, or {len(x)}, one an image")
    return found.expand_as(x)
