"""Image data sets by name or from files, in memory or mapped."""

from __future__ import annotations

import os
from pathlib import Path

from ..checks.arguments import takes_plain_values
from .dataset import Dataset
from .download import NAMED, open_named
from .files import digits, open_path
from .loaded import LoadedImages
from .memmap import MappedImages
from .missing import Mask, Missing
from .order import batches, epoch_order
from .splits import FILE_TEST_FRACTION, dataset
from .targets import BINARIZATIONS, Targets
from .torch_data import from_torch, is_torch_data

__all__ = [
    "BINARIZATIONS",
    "FILE_TEST_FRACTION",
    "NAMED",
    "Dataset",
    "LoadedImages",
    "MappedImages",
    "Targets",
    "batches",
    "epoch_order",
    "from_torch",
    "is_name",
    "is_torch_data",
    "load",
]


def is_name(source: str) -> bool:
    """Whether `load` reads the text as a data set's name."""
    return source == "digits" or source in NAMED


@takes_plain_values
def load(
    source: str | os.PathLike[str],
    *,
    validation: float = 0.0,
    split_seed: int = 0,
    missing: Missing | None = None,
    mask: Mask = None,
) -> Dataset:
    """Returns a data set by name or path.

    * "digits": UCI's optical digits, shipped with the package: 1,797 images of 8x8, values 0..16.
    * "mnist", "fashion-mnist", "freyfaces": downloaded once, by pooch, and checked against their SHA-256. AEVB_DATA_DIR
      is the folder that keeps them (by default a folder of the user's cache). AEVB_DATA_MIRROR is another place to take
      them from: <mirror>/<name>/<file>. A file is kept once it is whole, and an interrupted one starts anew. (A path of
      such a name is written ./mnist.)
    * A directory with MNIST's four IDX files: train-images-idx3-ubyte, train-labels-idx1-ubyte and the two t10k- files.
      Each may be gzipped (.gz), have a dot for a hyphen, or lie in a folder, as programs unpack them. The labels may be
      missing.
    * One IDX file of images. The labels come from the file beside it, where "images-idx3" in its name gives way to
      "labels-idx1".
    * .npy: images (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C). A file of more than 1 GiB is mapped, and read as it
      is used (see `MappedImages`).
    * .npz: images as x, images, data or arr_0, with y or labels; or parts, such as x_train, y_train, x_test, y_test,
      x_val, y_val. Pickled objects are never loaded.
    * .mat, of MATLAB 5 to 7.2 (needs scipy): images and parts as for .npz, or Frey's `ff`. Each column is an image
      where only so the number of pixels is a square.
    * .amat, .amat.gz: text, an image a line; or a directory with the parts of binarized MNIST, *_train, *_valid and
      *_test.
    * A directory of .npy, .npz or .mat files whose names say parts, such as train.npy and test.npy.
    * A directory of image files (needs Pillow), grey or colour, all of one size. Subdirectories are the labels, in
      alphabetical order, or parts, such as train/ and test/, with labels in them or around them. Transparent pixels are
      seen on white, and an image that a camera's EXIF says is turned is turned upright.

    Names of parts are read in every spelling in use (`aevb.data.parts`): train, Training, trX, x_train; test, t10k,
    eval; validation, val, valid, dev. Two names for one part are refused, and so is a part beside images without one.
    Arrays and files that are not read are named in the description.

    Values are recognised: bits (bool, or all 0 and 1), 0..255 (whole numbers), or [0, 1]. `Dataset.description` says
    which. Floats that are multiples of 1/255 are kept as bytes.

    Values may be missing: what is a NaN, with missing="nan", and what a mask says. The kind of the values is then that
    of the observed ones, and `Dataset.observed` has the masks.

    A source's own test and validation parts are kept. Of any other source a tenth (of the digits 297 images), rounded
    up, is the test part. These are the first images of ``np.random.RandomState(split_seed).permutation(N)``, which
    never changes.

    Args:
        source: A name or a path.
        validation: Fraction of the training images, rounded up, to hold out as the validation part. They follow the
            permutation of ``RandomState([split_seed, 1])``. A source's own validation part is taken instead, whatever
            the fraction is.
        split_seed: 0 to 2**32 - 1.
        missing: "nan": a NaN is a missing value.
        mask: Which values are observed: bool, or 0 and 1, of the images' shape in any layout above, or one mask for all
            images. An array or a .npy file; or masks by the names of the source's parts, a mapping or a .npz file.

    Raises:
        FileNotFoundError: Nothing there, or a download that failed.
        ImportError: A package is missing that reads or downloads the data.
        ValueError: A file that is truncated, damaged or of another kind. Values that are none of these, such as a NaN,
            with the file and the place. Images of several shapes, labels of another number, or parts that are unclear.
        OSError: The folder of the downloads cannot be written to.
    """
    if source == "digits":
        found = digits()
    elif source in NAMED:
        found = open_named(str(source))
    else:
        found = open_path(Path(source).expanduser())
    return dataset(found, validation, split_seed, missing, mask)
