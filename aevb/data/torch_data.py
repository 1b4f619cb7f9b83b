"""Data sets and loaders of `torch.utils.data` as a `Dataset`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data import Dataset as TorchDataset

from ..checks.arguments import takes_plain_values
from .dataset import Dataset
from .loaded import LoadedImages, as_tensor, batches_of, label_of
from .missing import Mask, Missing
from .raw import Part, Source
from .splits import dataset

PARTS = ("train", "test", "validation")


def is_torch_data(source: object) -> bool:
    """Whether `source` is data of `torch.utils.data`, or a mapping to such.

    A mapping has names of parts as its keys.
    """
    if isinstance(source, Mapping):
        return bool(source) and all(is_torch_data(part) for part in source.values())
    return isinstance(source, TorchDataset | DataLoader)


@takes_plain_values
def from_torch(
    source: Any,
    name: str = "data",
    validation: float = 0.0,
    split_seed: int = 0,
    missing: Missing | None = None,
    mask: Mask = None,
) -> Dataset:
    """Returns the `Dataset` of a data set or DataLoader of `torch.utils.data`.

    Args:
        source: A Dataset, map-style or iterable, whose items are x or (x, label, ...). It is read once, into memory,
            and split by the rule of `load`. Or a mapping with "train", "test" and optionally "validation", each a
            Dataset or a DataLoader. A training part that is a DataLoader is gone through anew in each epoch; other
            parts are read once.
        name: Name of the data set.
        validation: Fraction of the training images to hold out, where there is no validation part.
        split_seed: Seed of the permutation by which images are held out.
        missing: As in `load`.
        mask: As in `load`.

    Raises:
        ValueError: A DataLoader without test images, or with missing values; parts of other names; items of another
            shape or range.
    """
    parts = source if isinstance(source, Mapping) else {"train": source}
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"the data have a part {unknown[0]!r}; expected 'train', 'test' and perhaps 'validation'")
    if "train" not in parts:
        raise ValueError(f"the data have the parts {', '.join(map(repr, parts))}; expected 'train' among them")
    if not isinstance(parts["train"], DataLoader):
        read = {part: _read(data, part) for part, data in parts.items()}
        return dataset(Source(name, read), validation, split_seed, missing, mask)
    if missing is not None or mask is not None:
        raise ValueError(
            "the data are a DataLoader, whose images are not known beforehand, and so not what is missing in them; "
            "expected a Dataset of torch.utils.data, which is read into memory"
        )
    if "test" not in parts:
        raise ValueError(
            "the data are a DataLoader, from which no test images can be held out; expected "
            'dataset={"train": loader, "test": another}, a Dataset or a DataLoader'
        )
    if validation > 0 and "validation" not in parts:
        raise ValueError(
            f"validation is {validation}, and no images can be held out from a DataLoader; expected a part "
            '"validation" beside "train" and "test"'
        )
    held_out = {part: _read(data, part) for part, data in parts.items() if part != "train"}
    # Read as training images, so that shape and range are found by the rule of all data.
    found = dataset(Source(name, {**held_out, "train": held_out["test"]}), 0.0, split_seed)
    # Floats in [0, 1] may have been read as bytes; the loader gives floats all the same.
    scale = 1 if held_out["test"].images.max() <= 1 else found.max_value  # type: ignore[union-attr]
    return Dataset(
        name=name,
        image_shape=found.image_shape,
        max_value=1,
        train_images=LoadedImages(parts["train"], found.image_shape, scale),
        test_images=_grey(found.test_images, found.max_value),
        test_labels=found.test_labels,
        validation_images=None if found.validation_images is None else _grey(found.validation_images, found.max_value),
        validation_labels=found.validation_labels,
        note=found.note,
    )


def _grey(images: Any, max_value: int) -> Tensor:
    return images.float() / max_value


def _read(data: Any, part: str) -> Part:
    """Returns all items of a part as arrays."""
    # A loader's own order would be another each time, and the run's data no longer those that it began with.
    if isinstance(data, DataLoader) and data.collate_fn is default_collate:
        data = data.dataset
    batches = list(batches_of(data if isinstance(data, DataLoader) else _items(data)))
    where = f"the {part} data ({type(data).__name__})"
    if not batches:
        raise ValueError(f"{where} holds no images; expected at least one")
    shapes = {tuple(x.shape[1:]) for x, _ in batches}
    if len(shapes) > 1:
        raise ValueError(f"{where} has items of shapes {', '.join(map(str, sorted(shapes)))}; expected one shape")
    labels = [y for _, y in batches]
    known = torch.cat([y for y in labels if y is not None]).numpy() if all(y is not None for y in labels) else None
    return Part(torch.cat([x for x, _ in batches]).numpy(), known, where)


def _items(data: Any) -> Iterator[Any]:
    """Yields each item as a batch of one."""
    items: Iterable[Any] = data if isinstance(data, IterableDataset) else (data[i] for i in range(len(data)))
    for item in items:
        x, *rest = item if isinstance(item, tuple | list) else (item,)
        label = label_of(rest[0]) if rest else None
        yield (as_tensor(x).detach().unsqueeze(0), *(() if label is None else (label.unsqueeze(0),)))
