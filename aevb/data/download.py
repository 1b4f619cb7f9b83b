"""Downloaded data sets: addresses, SHA-256 of their files, and their folder."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .arrays import mat
from .idx import FILES, idx_part
from .raw import Source, need

DIRECTORY, MIRROR = "AEVB_DATA_DIR", "AEVB_DATA_MIRROR"
_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class Named:
    """A data set that is downloaded by name.

    Attributes:
        urls: Addresses of folders, each of which has all files.
        files: SHA-256 of each file, by its name.
        read: Function of the folder and the name that returns the source.
    """

    urls: tuple[str, ...]
    files: dict[str, str]
    read: Callable[[Path, str], Source]


def _frey(folder: Path, name: str) -> Source:
    return dataclasses.replace(mat(folder / "frey_rawface.mat"), name=name)


def _idx(folder: Path, name: str) -> Source:
    files = {file.removesuffix(".gz"): folder / file for file in NAMED[name].files}
    return Source(
        name,
        {
            part: idx_part(files[images], files.get(images.replace("images-idx3", "labels-idx1")))
            for part, images in FILES.items()
        },
        max_value=255,
    )


NAMED = {
    "mnist": Named(
        (
            "https://storage.googleapis.com/cvdf-datasets/mnist",
            "https://ossci-datasets.s3.amazonaws.com/mnist",
        ),
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        _idx,
    ),
    "fashion-mnist": Named(
        (
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        ),
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        _idx,
    ),
    "freyfaces": Named(
        ("https://cs.nyu.edu/~roweis/data",),
        {"frey_rawface.mat": "265a83a23adb081755cd3de375509828e690324d1d60f076b8ecebc840d59c64"},
        _frey,
    ),
}


def open_named(name: str) -> Source:
    """Returns the source of a name in NAMED, downloaded if absent.

    Every error is a sentence that says how to go on.

    Raises:
        FileNotFoundError: A file could not be downloaded.
        ValueError: A downloaded file is not the expected one, or the mirror is no http(s) address.
        ImportError: pooch is missing.
        OSError: The folder cannot be written to.
    """
    named = NAMED[name]
    folder = _folder(name)
    missing = [file for file, sha256 in named.files.items() if not _is(folder / file, sha256)]
    for file in missing:
        _download(name, file, folder)
    return named.read(folder, name)


def _folder(name: str) -> Path:
    if directory := os.environ.get(DIRECTORY):
        return Path(directory).expanduser() / name
    pooch = need("pooch", "pooch", "data", f"{name}, which is downloaded,")
    return Path(pooch.os_cache("aevb")) / name


def _is(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        found = hashlib.sha256()
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest() == sha256


def _download(name: str, file: str, folder: Path) -> None:
    """Downloads a file from the first address that has it.

    The file is in the folder only when it is whole and its SHA-256 is right. An interrupted download starts anew. Files
    that are there already stay.
    """
    pooch = need("pooch", "pooch", "data", f"{name}, which is downloaded,")
    import requests

    mirror = os.environ.get(MIRROR)
    urls = (f"{mirror.rstrip('/')}/{name}",) if mirror else NAMED[name].urls
    sha256, wrong, reasons = NAMED[name].files[file], None, []
    for url in (f"{base}/{file}" for base in urls):
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                f"{MIRROR} is {mirror!r}; expected the http(s) address of a folder, or pass a path as the data"
            )
        # A server that declares a .gz file as compressed text would have it unpacked in transit.
        downloader = pooch.HTTPDownloader(timeout=_TIMEOUT, headers={"Accept-Encoding": "identity"})
        try:
            pooch.retrieve(url, f"sha256:{sha256}", file, folder, downloader=downloader)
            return
        except requests.exceptions.RequestException as error:
            reasons.append(f"{url}: {_reason(error)}")
        except OSError as error:
            raise OSError(f"{folder} cannot be written to ({error}); set {DIRECTORY} to a folder that can") from error
        except ValueError:
            wrong = url
    by_hand = (
        f"put {', '.join(NAMED[name].files)} from {NAMED[name].urls[0]}/ into {folder}, or pass their path as the "
        f"data, or set {MIRROR} to a mirror"
    )
    if wrong:
        raise ValueError(
            f"{wrong} is not the {file} that was expected, whose SHA-256 is {sha256}; it was not kept: {by_hand}"
        )
    raise FileNotFoundError(
        f"{name} could not be downloaded ({'; '.join(reasons)}); with a connection try again, or {by_hand}"
    )


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    return type(error).__name__
