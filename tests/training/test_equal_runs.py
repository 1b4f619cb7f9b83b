"""Equal runs leave equal files: bytes are compared, across processes whose hashes differ.

What differs is the time: `seconds` in metrics.jsonl and in the checkpoints, whose SHA-256 covers it, and TensorBoard's
events, which have the time of day. A checkpoint has the state of PyTorch's own generator too, for models with dropout:
where nobody seeds that, PyTorch draws its seed.
"""

import json
import os
import subprocess
import sys

import torch
from safetensors import safe_open

from aevb.files import safetensors

RUN = """
import torch
import aevb
from aevb.cli import report as run_report
from aevb.cli import main

torch.manual_seed(0)
run_report.RESTORED = 4
options = dict(epochs=2, hidden_dims=(8,), latent_dim=2, validation=0.1, threads=1, progress=False)
aevb.Trainer(aevb.TrainConfig(**options, out="run")).fit()
few = ["--images", "4", "--steps", "3", "--num-samples", "5"]
for command in (
    *(["evaluate", "--num-samples", "5", "--no-progress"], ["reconstruct", "--save-array"], ["sample", "--save-array"]),
    *(["embed", "--num-samples", "2"], ["impute", "--save-array", *few], ["denoise", "--flip", "0.1", *few]),
    *(["manifold"], ["traverse"], ["interpolate"], ["report"]),
):
    assert main([command[0], "run", *command[1:]]) == 0
"""


def files_of(folder, hash_seed):
    folder.mkdir()
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", RUN], cwd=folder, env=env, check=True, capture_output=True)
    run = folder / "run"
    return {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}


def without_seconds(numbers):
    if isinstance(numbers, dict):
        return {name: without_seconds(value) for name, value in numbers.items() if name not in ("seconds", "sha256")}
    return numbers


def checkpoint(path):
    """The header but for the time, and the bytes of the tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    numbers = json.loads(header["__metadata__"]["numbers"])
    numbers["run"].pop("metrics_bytes")  # how many digits the seconds have
    return without_seconds(numbers), {name: header[name] for name in header if name[0] != "_"}, data[8 + length :]


def test_equal_runs_leave_equal_files(tmp_path):
    first, second = (files_of(tmp_path / seed, seed) for seed in ("1", "2"))
    assert first.keys() == second.keys()
    assert {"best.safetensors", "config.json", "latent.npz", "evaluation.json", "report.html", "samples.png"} <= set(
        first
    )
    for name in first:
        if name == "metrics.jsonl":
            lines = [[json.loads(line) for line in found[name].read_text().splitlines()] for found in (first, second)]
            assert [without_seconds(line) for line in lines[0]] == [without_seconds(line) for line in lines[1]]
        elif name.startswith("checkpoints"):
            assert checkpoint(first[name]) == checkpoint(second[name]), name
        else:
            assert first[name].read_bytes() == second[name].read_bytes(), name


def test_metadata_are_in_the_order_of_their_names(tmp_path):
    """Of any order, any text, and tensors that stay aligned."""
    tensors = {"b": torch.arange(3, dtype=torch.uint8), "a": torch.tensor(2.5), "empty": torch.empty(0)}
    text = {"model": '{"class": "VAE"}', "ü": "é\n\"'", "step": "5", "epoch": ""}
    data = safetensors(tensors, text)
    assert all(safetensors(tensors, dict(order)) == data for order in (sorted(text.items()), reversed(text.items())))
    (tmp_path / "file").write_bytes(data)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == text
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118  it is no dict
            name: t.tolist() for name, t in tensors.items()
        }
    assert int.from_bytes(data[:8], "little") % 8 == 0
