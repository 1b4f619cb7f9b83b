"""Data sets by name: a mirror on this machine, what is refused, and what is said where there is no connection."""

import functools
import hashlib
import http.server
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from aevb.cli import main
from aevb.data import NAMED, load
from aevb.data.download import Named

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets in ../shared/data")

pytest.importorskip("pooch")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send_head(self):
        self.server.asked.append(self.path)
        return super().send_head()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder that is served, as AEVB_DATA_MIRROR; AEVB_DATA_DIR is an empty folder."""
    (tmp_path / "mirror").mkdir()
    handler = functools.partial(Handler, directory=tmp_path / "mirror")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("AEVB_DATA_MIRROR", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("AEVB_DATA_DIR", str(tmp_path / "kept"))
    server.folder, server.kept = tmp_path / "mirror", tmp_path / "kept"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    """A port where nobody listens."""
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_port
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("AEVB_DATA_MIRROR", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AEVB_DATA_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def small(monkeypatch, name, folder, count=20):
    """`name` is, in this test, IDX files of 3x3 in a folder."""
    folder.mkdir(exist_ok=True)
    files = {}
    for part in ("train", "t10k"):
        images = np.random.RandomState(count).randint(0, 256, (count, 3, 3)).astype(np.uint8)
        content = b"\0\0\x08\x03" + np.array(images.shape, ">i4").tobytes() + images.tobytes()
        file = folder / f"{part}-images-idx3-ubyte"
        file.write_bytes(content)
        files[file.name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(NAMED, name, Named(("http://127.0.0.1:9/nowhere",), files, NAMED["mnist"].read))


@needs_shared
def test_mnist_and_frey_are_what_is_expected(mirror):
    shutil.copytree(SHARED / "mnist", mirror.folder / "mnist")
    shutil.copytree(SHARED / "frey", mirror.folder / "freyfaces")
    data = load("mnist", validation=1 / 6)
    assert data.description == "mnist: 50,000 training, 10,000 test, 10,000 validation images of 28x28, values 0..255"
    assert torch.equal(data.test_images, load(SHARED / "mnist").test_images)
    frey = load("freyfaces")
    assert frey.description == "freyfaces: 1,768 training, 197 test images of 28x20, values 0..255"
    assert sorted(file.name for file in (mirror.kept / "mnist").iterdir()) == sorted(NAMED["mnist"].files)
    asked = len(mirror.asked)
    assert asked == 5
    load("mnist")
    assert len(mirror.asked) == asked  # what is there is not downloaded again


def test_hashes_are_sha256_of_each_file():
    for named in NAMED.values():
        assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in named.files.values())
        assert len(set(named.files.values())) == len(named.files)
    assert set(NAMED["fashion-mnist"].files) == set(NAMED["mnist"].files)
    assert not set(NAMED["fashion-mnist"].files.values()) & set(NAMED["mnist"].files.values())


def test_wrong_bytes_are_refused_and_not_kept(mirror, monkeypatch):
    small(monkeypatch, "fashion-mnist", mirror.folder / "fashion-mnist")
    wrong = mirror.folder / "fashion-mnist" / "t10k-images-idx3-ubyte"
    content = wrong.read_bytes()
    for bad in (content[:-1] + b"x", content[:-1], b""):
        wrong.write_bytes(bad)
        with pytest.raises(
            ValueError, match=r"/fashion-mnist/t10k-images-idx3-ubyte is not the .* whose SHA-256 is"
        ) as e:
            load("fashion-mnist")
        assert "it was not kept: put train-images-idx3-ubyte, t10k" in str(e.value)
        assert [file.name for file in (mirror.kept / "fashion-mnist").iterdir()] == ["train-images-idx3-ubyte"]
    wrong.write_bytes(content)
    before = len(mirror.asked)
    assert load("fashion-mnist").description == "fashion-mnist: 20 training, 20 test images of 3x3, values 0..255"
    assert len(mirror.asked) == before + 1  # only what was missing


def test_a_wrong_file_in_the_cache_is_replaced(mirror, monkeypatch):
    small(monkeypatch, "mnist", mirror.folder / "mnist")
    load("mnist")
    (mirror.kept / "mnist" / "train-images-idx3-ubyte").write_bytes(b"wrong")
    assert len(load("mnist").train_images) == 20


def test_a_mirror_without_the_file(mirror):
    with pytest.raises(
        FileNotFoundError, match=r"could not be downloaded \(http://127.*/mnist/train-images.*: HTTP 404\)"
    ):
        load("mnist")


def test_the_second_address_is_tried(mirror, monkeypatch):
    small(monkeypatch, "mnist", mirror.folder / "mnist")
    url = f"http://127.0.0.1:{mirror.server_port}/mnist"
    monkeypatch.setitem(NAMED, "mnist", Named(("http://127.0.0.1:9", url), NAMED["mnist"].files, NAMED["mnist"].read))
    monkeypatch.delenv("AEVB_DATA_MIRROR")
    assert len(load("mnist").train_images) == 20


def test_no_connection(unreachable, capsys):
    with pytest.raises(FileNotFoundError) as error:
        load("freyfaces")
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.startswith("freyfaces could not be downloaded (http://127.0.0.1:")
    assert "frey_rawface.mat: ConnectionError); with a connection try again, or " in sentence
    assert (
        f"put frey_rawface.mat from https://cs.nyu.edu/~roweis/data/ into {unreachable / 'freyfaces'}, or pass"
        in sentence
    )
    assert sentence.endswith("or set AEVB_DATA_MIRROR to a mirror")
    assert main(["train", "--data", "freyfaces"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"aevb: {sentence}"


@needs_shared
def test_files_put_there_by_hand_need_neither_a_connection_nor_pooch(unreachable, monkeypatch):
    shutil.copytree(SHARED / "mnist", unreachable / "mnist")
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert len(load("mnist").train_images) == 60_000


def test_without_pooch(unreachable, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    sentence = r"mnist, which is downloaded, needs pooch, which is not installed: pip install 'aevb\[data\]'"
    with pytest.raises(ImportError, match=sentence):
        load("mnist")
    monkeypatch.delenv("AEVB_DATA_DIR")
    with pytest.raises(ImportError, match=sentence):
        load("mnist")


def test_places_that_cannot_be(mirror, monkeypatch, tmp_path):
    small(monkeypatch, "mnist", mirror.folder / "mnist")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AEVB_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(
        OSError, match=r"file/mnist cannot be written to \(.*\); set AEVB_DATA_DIR to a folder that can"
    ):
        load("mnist")
    monkeypatch.setenv("AEVB_DATA_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("AEVB_DATA_MIRROR", "/some/folder")
    with pytest.raises(ValueError, match=r"AEVB_DATA_MIRROR is '/some/folder'; expected the http\(s\) address"):
        load("mnist")


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    from aevb.data.download import _folder

    monkeypatch.delenv("AEVB_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _folder("mnist") == tmp_path / "aevb" / "mnist"
