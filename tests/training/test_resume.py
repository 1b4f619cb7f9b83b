"""A run that is stopped or killed, and goes on: to the bit as if nothing had been."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
import resumed_run
import torch
from safetensors.torch import load_file

import aevb
from aevb.data import load
from aevb.training.checkpoint import Checkpoint, CheckpointError, Checkpoints, pack, unpack
from aevb.training.run_dir import RunFolderError

KILLS = 50
EPOCHS = 25  # of 60 steps, with three checkpoints each

# Processes are forked from one that has imported aevb, and started no thread: a tenth of a second each.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["resumed_run", "aevb.training.pictures"])


def start(out, epochs=EPOCHS, **options):
    process = server.Process(target=resumed_run.train, args=(str(out), epochs), kwargs=options)
    process.start()
    return process


def finish(process):
    process.join(120)
    assert process.exitcode == 0


def what_it_ended_with(run):
    """Weights, and metrics but for the time they took."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        del line["seconds"]
    return load_file(run / "model.safetensors"), metrics


def assert_same(run, whole):
    (weights, metrics), (expected, expected_metrics) = what_it_ended_with(run), what_it_ended_with(whole)
    assert weights.keys() == expected.keys()
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name
    assert metrics == expected_metrics


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where that is possible: thousands of files are forced to the disk here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="aevb-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, and that wrote no checkpoint between its first and last."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(start(out, checkpoint_seconds=1e6))
    return out


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    finish(start(out, epochs=2, checkpoint_seconds=1e6))
    return out


def test_killed_at_random_moments(tmp_path, whole):
    """Fifty times, in as many runs as it takes: wherever a run is, in a step, a write, or before it has begun."""
    chance = random.Random(1)
    kills, runs, steps = 0, 0, set()
    while kills < KILLS or runs == 0:
        out = tmp_path / f"run{runs}"
        while True:
            process = start(out)
            if kills < KILLS:
                # However fast the machine is: after some checkpoints, or before any, and then a random moment.
                wait_for_checkpoints(out, process, chance.choice([0, 1, 2, 4, 8, 16]))
                process.join(chance.expovariate(1 / 0.01))
            else:
                process.join(120)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            if process.exitcode == 0:
                break  # it ended between the look at exitcode and the kill
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            steps.update(path.name for path in (out / "checkpoints").glob("step-*"))
        assert process.exitcode == 0
        assert_same(out, whole)
        runs += 1
    assert len(steps) > 12, "the kills did not come at many places"


def wait_for_checkpoints(out, process, count):
    """Until the process has written so many."""

    def step():
        return max((int(path.stem[5:]) for path in (out / "checkpoints").glob("step-*")), default=-1)

    first = step()
    while count and process.exitcode is None and step() < first + 20 * count:
        time.sleep(0.002)


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_killed_while_a_checkpoint_is_written(tmp_path, short, call):
    out = tmp_path / "run"
    for nth in (1, 2, 3):
        process = start(out, epochs=2, kill_in=(call, nth))
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    finish(start(out, epochs=2))
    assert_same(out, short)
    assert not list(out.glob("**/.*.part")), "what was half written was left"


def test_asked_to_stop(tmp_path, short):
    """SIGTERM, as a cluster sends it: a checkpoint at once, not the last one's."""
    out = tmp_path / "run"
    process = start(out, epochs=100000, checkpoint_seconds=1e6)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 1
    saved = sorted((out / "checkpoints").iterdir())
    assert len(saved) == 2, "that of the start, and that of the stop"
    done = unpack(saved[-1].read_bytes(), "").numbers
    assert done["step"] > 0
    epochs = done["epoch"] + 1
    finish(start(out, epochs=epochs))
    other = tmp_path / "other"
    finish(start(other, epochs=epochs))
    assert_same(out, other)


def test_more_epochs(tmp_path, short):
    """A run that is over goes on, as a longer one would have."""
    out = tmp_path / "run"
    finish(start(out, epochs=1))
    metrics = aevb.Trainer.resume(out, epochs=2, progress=False).fit()
    assert metrics["epoch"] == 2
    assert_same(out, short)
    assert json.loads((out / "config.json").read_text())["epochs"] == 2
    assert aevb.Trainer.resume(out, progress=False).fit() == metrics, "a run that is over is left as it is"


@pytest.mark.parametrize(
    "options", [{"optimizer": "adagrad"}, {"schedule": "cosine", "learning_rate_warmup": 5}], ids=str
)
def test_every_optimizer(tmp_path, options):
    finish(start(tmp_path / "whole", epochs=2, **options))
    process = start(tmp_path / "run", epochs=2, kill_in=("fsync", 8), **options)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    finish(start(tmp_path / "run", epochs=2, **options))
    assert_same(tmp_path / "run", tmp_path / "whole")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def stopped(out):
    """A run that was killed, with two checkpoints."""
    process = start(out, epochs=2, kill_in=("replace", 4))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    return sorted((out / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, short, damage):
    out = tmp_path / "run"
    before, last = stopped(out)
    damaging(last, damage)
    with pytest.warns(
        UserWarning, match=rf"{last.name} is (truncated or )?damaged.*; the checkpoint before it is used"
    ):
        aevb.Trainer.resume(out, progress=False).fit()
    assert_same(out, short)

    out = tmp_path / "both"
    for path in stopped(out):
        damaging(path, damage)
    with pytest.raises(CheckpointError, match=rf"no checkpoint can be read: .*{last.name}.*{before.name}"):
        aevb.Trainer.resume(out, progress=False).fit()


def damaging(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes({"flipped": data, "truncated": data[:-7], "empty": b""}[how])


def test_every_byte_of_a_checkpoint_counts():
    data = pack(Checkpoint({"w": torch.arange(3.0), "n": torch.tensor(7)}, {"step": 5, "loss": 0.1}))
    tensors, numbers = unpack(data, "it")
    assert torch.equal(tensors["w"], torch.arange(3.0))
    assert torch.equal(tensors["n"], torch.tensor(7))
    assert numbers == {"step": 5, "loss": 0.1}
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 4
        if bytes(damaged[8:]).split(b'"data_offsets"')[0].replace(b" ", b"") == data[8:].split(b'"data_offsets"')[0]:
            continue  # white space of the header
        with pytest.raises(CheckpointError, match=r"it is (truncated or )?damaged"):
            unpack(bytes(damaged), "it")


def test_no_pickle(tmp_path, monkeypatch):
    stopped(tmp_path / "run")
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_: pytest.fail("pickle was used"))
    monkeypatch.setattr(torch, "load", lambda *_: pytest.fail("torch.load was used"))
    data, wrong = Checkpoints(tmp_path / "run").read()
    assert not wrong
    assert unpack(data, "").numbers["step"] > 0


# ---- what does not go on --------------------------------------------------------------------------------------------


def test_another_run_is_not_gone_on_with(tmp_path):
    finish(start(tmp_path / "run", epochs=1))
    options = {**resumed_run.OPTIONS, "out": str(tmp_path / "run"), "resume": True, "progress": False}
    with pytest.raises(
        ValueError, match=r"learning_rate is 0.01, but the run in .* began with 0.001; expected the same"
    ):
        aevb.Trainer(aevb.TrainConfig(**options, learning_rate=0.01)).fit()
    with pytest.raises(ValueError, match="resume and overwrite are both set"):
        aevb.TrainConfig(resume=True, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"holds no run: it has no config.json"):
        aevb.Trainer.resume(tmp_path / "none")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"metrics.jsonl has 0 bytes, but had \d+ when the checkpoint was written"):
        aevb.Trainer.resume(tmp_path / "run", epochs=2, progress=False).fit()


def test_resume_starts_a_run_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = aevb.TrainConfig(**{**resumed_run.OPTIONS, "epochs": 1, "resume": True, "progress": False})
    for _ in range(2):  # the second time it is over already
        assert aevb.Trainer(config).fit()["epoch"] == 1
    assert [path.name for path in Path("runs").iterdir()] == ["digits"]


def test_a_run_without_a_checkpoint_is_kept_as_it_is(tmp_path):
    """As those of before checkpoints, or whose folder was deleted to save space."""
    finish(start(tmp_path / "run", epochs=1))
    Checkpoints(tmp_path / "run").remove()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunFolderError, match=r"holds a run without a checkpoint, which cannot go on"):
        aevb.Trainer.resume(tmp_path / "run", epochs=3, progress=False).fit()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_checkpoints_of_another_run_are_not_taken(tmp_path):
    out = tmp_path / "run"
    finish(start(out, epochs=2))
    for path in out.iterdir():
        if path.is_file():
            path.unlink()
    finish(start(out, epochs=1))
    assert {path.name for path in (out / "checkpoints").iterdir()} == {f"step-{60:012d}.safetensors", NEXT_TO_LAST}


NEXT_TO_LAST = f"step-{40:012d}.safetensors"


def test_what_cannot_be_read_gives_way_too(tmp_path, short):
    out = tmp_path / "run"
    _, last = stopped(out)
    last.unlink()
    last.mkdir()
    in_the_way = contextlib.suppress(RunFolderError)  # of the next checkpoint
    with pytest.warns(UserWarning, match=rf"{last.name} cannot be read: Is a directory; the checkpoint"), in_the_way:
        aevb.Trainer.resume(out, progress=False).fit()


def test_fewer_epochs_than_were_done(tmp_path):
    finish(start(tmp_path / "run", epochs=2))
    with pytest.raises(ValueError, match="epochs is 1, but the run has done 2; expected as many or more, in all"):
        aevb.Trainer.resume(tmp_path / "run", epochs=1, progress=False).fit()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 2
    finish(start(tmp_path / "cosine", epochs=1, schedule="cosine"))
    with pytest.raises(ValueError, match=r"epochs is 3, but the run in .* began with 1, at whose end"):
        aevb.Trainer.resume(tmp_path / "cosine", epochs=3, progress=False).fit()


def test_a_second_fit_goes_on_too(tmp_path, monkeypatch):
    """From where the first ended, in a folder of its own, whose config says how many epochs these are in all."""
    monkeypatch.chdir(tmp_path)
    options = {**resumed_run.OPTIONS, "epochs": 2, "progress": False, "schedule": "linear"}
    trainer = aevb.Trainer(aevb.TrainConfig(**options))
    trainer.fit()
    trainer.optimizer.register_step_post_hook(lambda *_: trainer.step == 200 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=r"after 3 epochs, 201 steps.*`aevb resume runs/digits-2` goes on"):
        trainer.fit()
    metrics = aevb.Trainer.resume("runs/digits-2", progress=False).fit()
    assert (metrics["epoch"], metrics["step"]) == (4, 240)
    other = aevb.Trainer(aevb.TrainConfig(**options, out="other"))
    other.fit()
    other.config = dataclasses.replace(other.config, out="other-2")
    expected = other.fit()
    assert expected["learning_rate"] == pytest.approx(1e-3 / 240)
    assert_same(Path("runs/digits-2"), Path("other-2"))


def test_data_and_a_model_of_ones_own(tmp_path):
    """They are given again; other data are refused."""
    digits = load("digits")
    few = dataclasses.replace(digits, name="mine", train_images=digits.train_images[:90], train_labels=None)

    def model():
        made = aevb.VAE(64, 12, 3, generator=torch.Generator().manual_seed(3))
        # Of PyTorch's own generator, whose state the checkpoint has.
        made.encoder[1] = torch.nn.Sequential(
            torch.nn.Tanh(), torch.nn.Dropout(0.2)
        )  # of PyTorch's generator, whose state the checkpoint has
        return made

    def options(name):
        return aevb.TrainConfig(**{**resumed_run.OPTIONS, "out": str(tmp_path / name), "epochs": 3, "progress": False})

    torch.manual_seed(5)
    aevb.Trainer(options("whole"), model=model(), dataset=few).fit()
    torch.manual_seed(5)
    trainer = aevb.Trainer(options("run"), model=model(), dataset=few)
    trainer.optimizer.register_step_post_hook(lambda *_: trainer.step == 6 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=r"aevb.Trainer.resume\(...\).fit\(\) goes on"):
        trainer.fit()
    torch.manual_seed(99)
    other = dataclasses.replace(few, train_images=16 - few.train_images)
    with pytest.raises(ValueError, match=r"the run was of other data: .*; expected the same images"):
        aevb.Trainer.resume(tmp_path / "run", model=model(), dataset=other).fit()
    aevb.Trainer.resume(tmp_path / "run", model=model(), dataset=few).fit()
    assert_same(tmp_path / "run", tmp_path / "whole")
