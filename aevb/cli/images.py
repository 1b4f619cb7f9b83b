"""The images that a run is asked about, and masks.

Images go into the encoder as the run's pixels in [0, 1]: thresholded where the run's were, and grey where its bits were
drawn anew at each step, so that an answer has no noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data import Dataset, LoadedImages, MappedImages, load
from ..data.arrays import numbers
from ..data.missing import flat_masks
from ..data.shapes import flattened
from ..data.targets import above_half, encoder_input
from ..inference.noise_models import random_mask
from ..ops import mix_seed
from ..training.pictures import masks_of
from ..training.trainer import Trainer

Part = Literal["train", "validation", "test"]

BATCH = 1000  # images that are floats at a time


def pixels(trainer: Trainer, images: Tensor, dataset: Dataset | None = None) -> Tensor:
    """Returns images as input of the encoder, (N, data_dim), float32."""
    dataset = dataset or trainer.dataset
    return encoder_input(images, dataset.max_value, trainer.config.binarize).to(trainer.device)


def held_out_pixels(trainer: Trainer, index: Tensor | slice) -> tuple[Tensor, Tensor | None]:
    """Returns test images as input of the encoder, and their masks, or None where no pixel is missing."""
    masks = masks_of(trainer.dataset, "test", index)
    x = pixels(trainer, trainer.dataset.test_images[index])
    return x, None if masks is None else masks.to(trainer.device)


def grey_pixels(trainer: Trainer, images: Tensor, dataset: Dataset | None = None) -> Tensor:
    """Returns images as they are, grey: (N, data_dim), float32 in [0, 1]."""
    return encoder_input(images, (dataset or trainer.dataset).max_value, "none").to(trainer.device)


def if_another(x: Tensor, grey: Tensor) -> Tensor | None:
    """Returns the model's input, or None where it is the grey images."""
    return None if torch.equal(x, grey) else x


def has_bits(trainer: Trainer) -> bool:
    """Whether the run's images are bits, by themselves or binarized."""
    dataset = trainer.dataset
    return trainer.config.binarize != "none" or (dataset.max_value == 1 and dataset.train_images.dtype == torch.uint8)


def training_moments(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Returns mean and variance of each pixel over training images that have it, (data_dim,)."""
    images = trainer.dataset.train_images
    assert not isinstance(images, LoadedImages)  # a run from the command line has no DataLoader
    total = squares = torch.zeros((), dtype=torch.float64, device=trainer.device)
    for index in _in_order(images):
        x = pixels(trainer, images[index])  # 0 where it is missing
        total = total + x.sum(0, dtype=torch.float64)
        squares = squares + x.square_().sum(0, dtype=torch.float64)
    masks = trainer.dataset.observed.get("train")
    count: int | Tensor = len(images) if masks is None else masks.sum(0).clamp_min(1).to(trainer.device)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp_min(0).float()


def _in_order(images: Tensor | MappedImages) -> Iterator[Tensor]:
    """The images' numbers, `BATCH` at a time.

    Rows of a file come in its order, and their memory is given back.
    """
    file = images if isinstance(images, MappedImages) else None
    order = torch.arange(len(images)) if file is None else file.file_order()
    for index in order.split(BATCH):
        yield index
        if file is not None:
            file.release_rows(index)


@dataclass(frozen=True, eq=False)
class Asked:
    """Images that a run is asked about.

    Rows in [0, 1] by `asked[index]`; as they are, grey, by `asked.grey(index)`.

    Attributes:
        name: Name of the data set or file.
        what: Name of the images, "test images" say.
        images: The images as stored.
        labels: Their labels, if any.
        label_names: Names of the labels, if any.
        floats: Makes stored rows the encoder's input.
        grey_floats: Makes stored rows grey values in [0, 1].
        masks: Which pixels are observed, bool, (N, data_dim), or None for all.
    """

    name: str
    what: str
    images: Tensor | MappedImages
    labels: Tensor | None
    label_names: Sequence[str]
    floats: Callable[[Tensor], Tensor]
    grey_floats: Callable[[Tensor], Tensor]
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.floats(self.images[index])

    def grey(self, index: Tensor) -> Tensor:
        """Returns rows of the images as they are, grey, in [0, 1]."""
        return self.grey_floats(self.images[index])

    def observed(self, index: Tensor) -> Tensor | None:
        """Returns the masks of some images, or None where no pixel is missing."""
        return None if self.masks is None else self.masks[index]

    @torch.no_grad()
    def each(self, answer: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """Returns the answers to all images, (N, ...), on the CPU.

        Args:
            answer: Computes the answers to some images and their masks.
        """
        found = torch.empty(0)
        for index in _in_order(self.images):
            some = answer(self[index], self.observed(index)).cpu()
            if not len(found):
                found = some.new_empty(len(self), *some.shape[1:])
            found[index] = some
        return found


def asked_images(trainer: Trainer, part: Part | None, data: str | None) -> Asked:
    """Returns the images of a .npy file, or a data set's part.

    Args:
        trainer: The run.
        part: "train", "validation" or "test", the default.
        data: A .npy file, or another data set; None for the run's.

    Raises:
        ValueError: There is no such part, or the images have another size than the run's.
    """
    if data is not None and data.endswith(".npy"):
        if part is not None:
            raise ValueError(f"part is {part!r} and data {data!r}, a file without parts; expected one of them")
        file = ImageFile(trainer, data)
        holes = file.holes() if trainer.config.missing == "nan" else None
        if holes is not None:
            file.hide(holes)
        file.check()
        rows = torch.from_numpy(file.array)
        return Asked(Path(data).name, "images", rows, None, (), file.clean, file.floats, holes)
    dataset = trainer.dataset if data is None else load(data, missing=trainer.config.missing)
    part = part or "test"
    images, labels = (getattr(dataset, f"{part}_{kind}", None) for kind in ("images", "labels"))
    if images is None:
        raise ValueError(f"{dataset.name} has no {part} part; expected 'train' or 'test'")
    if dataset.data_dim != trainer.dataset.data_dim:
        raise ValueError(
            f"{data} has images of {'x'.join(map(str, dataset.image_shape))}; expected "
            f"{'x'.join(map(str, trainer.dataset.image_shape))}, the run's"
        )
    what = f"{part.replace('train', 'training')} images"
    return Asked(
        dataset.name,
        what,
        images,
        labels,
        dataset.label_names,
        lambda rows: pixels(trainer, rows, dataset),
        lambda rows: grey_pixels(trainer, rows, dataset),
        None if (observed := dataset.observed.get(part)) is None else observed.to(trainer.device),
    )


class ImageFile:
    """Images of a .npy file.

    They are bits, whole numbers in 0..max_value with one above 1, or numbers in [0, 1], with noise perhaps beyond.

    Attributes:
        array: The images, (N, data_dim), with the file's values.
        whole: Whether they are whole numbers in 0..max_value.
    """

    def __init__(self, trainer: Trainer, path: str):
        self.trainer, self.path = trainer, path
        self.array = flattened(_loadnpy(path), trainer.dataset.image_shape, path)
        self.whole = self._is_whole()

    def __len__(self) -> int:
        return len(self.array)

    def holes(self) -> Tensor | None:
        """Returns a mask that is False where the file has a NaN, (N, data_dim); None where it has none."""
        observed = torch.from_numpy(~np.isnan(self.array))
        return None if observed.all() else observed.to(self.trainer.device)

    def hide(self, observed: Tensor) -> None:
        """Set missing pixels to 0, so that their values are not used.

        Args:
            observed: Pixels that are observed, bool, (N, data_dim).
        """
        self.array = np.where(observed.cpu().numpy(), self.array, self.array.dtype.type(0))
        self.whole = self._is_whole()

    def _is_whole(self) -> bool:
        """Whether the values are 0..max_value: whole numbers, also of floats."""
        array = self.array
        whole = array.dtype.kind in "iu" or (array.dtype.kind == "f" and bool((array == np.rint(array)).all()))
        return whole and bool(array.min() >= 0) and bool(array.max() > 1)

    def check(self) -> None:
        """Check that the images are clean.

        Raises:
            ValueError: A value is outside of [0, 1] and 0..max_value.
        """
        dataset, array = self.trainer.dataset, self.array
        limit = dataset.max_value if array.dtype.kind in "iu" or self.whole else 1
        if not (array.min() >= 0 and array.max() <= limit):  # nor where one is NaN
            row, pixel = np.argwhere(~((array >= 0) & (array <= limit)))[0]
            raise ValueError(
                f"{self.path}: datapoint {row}, pixel {pixel} is {array[row, pixel]:g}; expected numbers in [0, 1], or "
                f"whole numbers in 0..{dataset.max_value}"
            )

    def clean(self, rows: Tensor) -> Tensor:
        """Returns rows as input of the encoder, float32."""
        x = self.floats(rows)
        return above_half(x, 1).float() if self.trainer.config.binarize == "threshold" else x

    def floats(self, rows: Tensor) -> Tensor:
        """Returns rows in [0, 1], but for noise, float32."""
        x = rows.to(self.trainer.device, torch.float32)
        return x * self.trainer.dataset.x_scale if self.whole else x


def _loadnpy(path: str) -> np.ndarray:
    array = numbers(Path(path).expanduser())
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        return array.astype(np.int64)  # which PyTorch knows more of than of uint16
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def mask_of(trainer: Trainer, mask: str, count: int, missing: float, seed: int) -> Tensor:
    """Returns the observed pixels of images, bool, (count, data_dim).

    Args:
        trainer: The run.
        mask: The name of a half, "random", or a .npy file.
        count: Number of images.
        missing: The fraction of pixels that "random" hides.
        seed: Seed of "random".

    Raises:
        ValueError: The mask is not one of these, or hides nothing, or everything.
    """
    observed = _mask_of(trainer, mask, count, missing, seed)
    if observed.all() or not observed.any():
        size = "x".join(map(str, trainer.dataset.image_shape))
        raise ValueError(
            f"mask is {mask!r}, which hides {'nothing' if observed.all() else 'everything'} of {count} images of "
            f"{size}; expected some pixels to be observed and others not"
        )
    return observed.expand(count, -1)


def _mask_of(trainer: Trainer, mask: str, count: int, missing: float, seed: int) -> Tensor:
    *channels, height, width = shape = tuple(trainer.dataset.image_shape)
    halves = {
        "lower": (slice(height // 2, None), slice(None)),
        "upper": (slice(0, height // 2), slice(None)),
        "left": (slice(None), slice(0, width // 2)),
        "right": (slice(None), slice(width // 2, None)),
    }
    if height == 1:  # the halves of a row
        halves["upper"], halves["lower"] = halves["left"], halves["right"]
    observed = torch.ones(shape, dtype=torch.bool)
    if mask in halves:
        observed[(..., *halves[mask])] = False
        return observed.flatten().to(trainer.device)
    if mask == "random":
        if not 0 < missing < 1:
            raise ValueError(f"missing is {missing}; expected a fraction between 0 and 1")
        places = torch.empty(count, height * width, device=trainer.device)
        return random_mask(places, missing, seed=int(mix_seed(seed, 2))).repeat(1, *channels or (1,))
    if not mask.endswith(".npy"):
        raise ValueError(f"mask is {mask!r}; expected {', '.join(map(repr, halves))}, 'random', or a .npy file")
    masks = flat_masks(numbers(Path(mask).expanduser()), shape, mask)
    found = torch.from_numpy(masks).to(trainer.device)
    if len(found) not in (1, count):
        raise ValueError(f"{mask} has {len(found)} masks; expected 1, or {count}, one an image")
    return found
