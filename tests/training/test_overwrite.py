"""A run that is there is lost only to one that has begun, whatever stops that; and nothing else is lost at all."""

import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import time

import numpy as np
import overwritten_run
import pytest
import torch

import aevb
from aevb import files
from aevb.cli import main
from aevb.files import safetensors
from aevb.training import pictures, run_files
from aevb.training.run_dir import RunFolder, RunFolderError
from aevb.training.run_files import Lock, LockedError

# Processes are forked from one that has imported what takes long, and started no thread.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["aevb.training.pictures", "torch._dynamo"])  # which an optimizer imports, in seconds


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that is over, with an answer, and files of a user's."""
    run = tmp_path_factory.mktemp("trained") / "run"
    np.save(run.with_name("images.npy"), np.random.default_rng(0).integers(0, 256, (60, 16)).astype(np.uint8))
    config = aevb.TrainConfig(out=run, data=run.with_name("images.npy"), epochs=2, **overwritten_run.OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw", lambda *_: {})
        aevb.Trainer(config).fit()
    assert main(["sample", str(run), "--num", "2"]) == 0
    for name in MINE:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(f"mine: {name}")
    return run


MINE = (
    *("notes.txt", "sub/model.safetensors", "checkpoints/mine.pt", "checkpoints/step-100.safetensors"),
    *("checkpoints/.mine.part", "events.out.tfevents.1.mine", "sample.txt", "weights.safetensors"),
)


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config(run, **changes):
    return aevb.TrainConfig(**{**overwritten_run.OPTIONS, "epochs": 1, "out": run, "overwrite": True, **changes})


# ---- what stops a run before its first step --------------------------------------------------------------------------


def full_disk(monkeypatch, name):
    class File(io.FileIO):
        def write(self, data):
            if name in str(self.name):
                super().write(data[:10])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.name))
            return super().write(data)

    monkeypatch.setattr(files, "open", File, raising=False)


@pytest.mark.parametrize("name", ["config.json", "step-"])
def test_a_full_disk(run, monkeypatch, name):
    before = contents(run)
    full_disk(monkeypatch, name)
    with pytest.raises(RunFolderError, match="No space left on device; whatever the run had saved before is kept"):
        aevb.Trainer(config(run)).fit()
    assert contents(run) == before
    assert not list(run.glob(".next-run*"))


def test_options_that_no_file_can_hold(run, monkeypatch):
    before = contents(run)
    trainer = aevb.Trainer(config(run))
    monkeypatch.setattr(dataclasses, "asdict", lambda _: {"data": "digits", "seed": object()})
    with pytest.raises(TypeError):
        trainer.fit()
    assert contents(run) == before


def test_a_model_that_no_file_can_hold(run):
    """Which would be seen at the end of the first epoch."""

    class Odd(aevb.VAE):
        def options(self):
            return {**super().options(), "mine": object()}

    before = contents(run)
    with pytest.raises(ValueError, match=r"the options of the model, a Odd, cannot be written to a file \(.*object"):
        aevb.Trainer(config(run), model=Odd(64, 8, 2)).fit()
    assert contents(run) == before


@pytest.mark.parametrize("when", ["the state", "the first checkpoint", "the finite weights"])
def test_an_interrupt_before_it_began(run, monkeypatch, when):
    before = contents(run)
    trainer = aevb.Trainer(config(run))

    def interrupt(*_):
        raise KeyboardInterrupt

    where = {"the state": (trainer.state, "state_dict"), "the finite weights": (trainer.loop, "weights_are_finite")}
    if when not in where:
        monkeypatch.setattr("aevb.training.checkpoint.Checkpoints.write", interrupt)
    else:
        monkeypatch.setattr(*where[when], interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"before the run began; .*run keeps the one that was there"):
        trainer.fit()
    assert contents(run) == before


def test_weights_that_are_not_finite(run):
    before = contents(run)
    trainer = aevb.Trainer(config(run))
    with torch.no_grad():
        trainer.model.encoder[0].weight[0, 0] = torch.nan
    with pytest.raises(aevb.NotFiniteError, match="the weights are not finite after step 0"):
        trainer.fit()
    assert contents(run) == before


def test_a_folder_that_cannot_be_written_to(run, monkeypatch):
    before = contents(run)
    mkdir = pathlib.Path.mkdir
    monkeypatch.setattr(pathlib.Path, "mkdir", lambda p, **how: _denied(p) if ".next" in p.name else mkdir(p, **how))
    with pytest.raises(RunFolderError, match=r"cannot write .*Permission denied"):
        aevb.Trainer(config(run)).fit()
    assert contents(run) == before


def _denied(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_killed_in_every_call_until_the_first_step(trained, tmp_path):
    """Then the old run is there, whole, or the new one goes on; what is not theirs always is."""
    elbo = aevb.Trainer.load(trained).evaluate().elbo
    whole, options = tmp_path / "whole", {"data": str(trained.with_name("images.npy")), "overwrite": True, "seed": 7}
    exitcode_of(whole, **options)
    old_runs, new_runs = 0, 0
    for kill_at in range(1, 200):
        run = shutil.copytree(trained, tmp_path / f"run{kill_at}")
        exitcode = exitcode_of(run, kill_at=kill_at, **options)
        assert all((run / name).read_text() == f"mine: {name}" for name in MINE)
        if exitcode == 0:  # there are no more calls
            break
        assert exitcode == -signal.SIGKILL
        again = aevb.Trainer.resume(run)
        if again.config.seed == 0:
            old_runs += 1
            kept = {name: data for name, data in contents(run).items() if not name.startswith(".next-run")}
            assert kept == contents(trained)
            assert aevb.Trainer.load(run).evaluate().elbo == elbo
            assert again.fit()["epoch"] == 2
            assert not list(run.glob(".next-run*"))
        else:
            new_runs += 1
            assert not (run / "samples.png").exists()
            again.fit()
            assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
            assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
        shutil.rmtree(run)
    assert old_runs > 5
    assert new_runs > 10
    left = {name for name in contents(run) if not name.startswith("checkpoints/step-0")}
    assert left == {*MINE, "config.json", "metrics.jsonl", "model.safetensors", "best.safetensors"}


def exitcode_of(out, **options):
    process = server.Process(target=overwritten_run.train, args=(str(out),), kwargs=options)
    process.start()
    process.join(120)
    return process.exitcode


# ---- what no run wrote -----------------------------------------------------------------------------------------------


def other_folder(folder):
    """As another library leaves a model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Bert"], "hidden_size": 8, "out": "x"}))
    (folder / "model.safetensors").write_bytes(safetensors({"w": torch.ones(3)}, {"format": "pt"}))
    return folder


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        *(["config.json", "model.safetensors"], ["samples.png"], ["metrics.jsonl"], ["report.html", "notes.txt"]),
        *(["evaluation.json"], ["impute.npy"], ["samples.png"]),
    ],
    ids=",".join,
)
def test_a_folder_of_something_else_is_refused(tmp_path, names, overwrite):
    folder = other_folder(tmp_path / "other")
    for name in ("config.json", "model.safetensors"):
        if name not in names:
            (folder / name).unlink()
    for name in names:
        if not (folder / name).exists():
            (folder / name).write_text("mine")
    before = contents(folder)
    with pytest.raises(RunFolderError, match=r"is kept[:;]"):
        aevb.Trainer(config(folder, overwrite=overwrite)).fit()
    assert contents(folder) == before


def test_a_folder_with_other_names_is_no_matter(tmp_path):
    (tmp_path / "photo.png").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-500.safetensors").write_text("mine")
    aevb.Trainer(config(tmp_path)).fit()
    aevb.Trainer(config(tmp_path)).fit()
    assert (tmp_path / "photo.png").read_text() == (tmp_path / "checkpoints/step-500.safetensors").read_text() == "mine"
    aevb.Trainer.resume(tmp_path, epochs=2).fit()


def test_a_users_files_in_a_runs_folder_are_kept(run):
    mine = {name: data for name, data in contents(run).items() if name in MINE}
    aevb.Trainer(config(run, seed=3)).fit()
    after = contents(run)
    assert {name: after[name] for name in MINE} == mine
    assert json.loads(after["config.json"])["seed"] == 3
    assert "samples.png" not in after, "an answer of the run before"
    assert len(list((run / "checkpoints").glob("step-" + "?" * 12 + ".safetensors"))) == 2


def test_events_are_removed_where_the_run_wrote_them(tmp_path):
    pytest.importorskip("tensorboard")
    aevb.Trainer(config(tmp_path / "run", tensorboard=True)).fit()
    (first,) = (tmp_path / "run").glob("events.out.tfevents.*")
    aevb.Trainer(config(tmp_path / "run")).fit()
    assert not first.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "samples.png", "checkpoints"])
def test_a_folder_or_a_file_where_the_other_should_be(run, name):
    if name == "checkpoints":
        shutil.move(run / name, run / "elsewhere")
        (run / name).write_text("mine")
    else:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()
        (run / name / "mine").write_text("mine")
    before = contents(run)
    with pytest.raises(RunFolderError, match=rf"{name} is (a|no) folder"):
        aevb.Trainer(config(run)).fit()
    assert contents(run) == before


def test_links_are_removed_and_not_what_they_lead_to(run, tmp_path):
    for name in ("model.safetensors", "checkpoints"):
        shutil.move(run / name, tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
    model = (tmp_path / "model.safetensors").read_bytes()
    aevb.Trainer(config(run, seed=3)).fit()
    assert (tmp_path / "model.safetensors").read_bytes() == model
    assert (run / "checkpoints").is_symlink()
    assert aevb.Trainer.resume(run).fit()["epoch"] == 1


def test_what_is_to_be_trained_on_is_no_file_of_the_run(run, capsys):
    assert main(["sample", str(run), "--num", "30", "--save-array"]) == 0
    before = contents(run)
    with pytest.raises(RunFolderError, match=r"samples.npy is what to train on, and would be deleted"):
        aevb.Trainer(config(run, data=run / "samples.npy")).fit()
    assert contents(run) == before


def test_an_answer_does_not_replace_the_runs_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.random.default_rng(0).integers(0, 256, (60, 16)).astype(np.uint8))
    before = pathlib.Path("images.npy").read_bytes()
    aevb.Trainer(config("run", data="images.npy")).fit()
    for command in ("sample", "reconstruct", "embed", "impute", "traverse"):
        assert main([command, "run", "--out", "images.npy"]) == 1
        assert "images.npy would be replaced by the answer, and it is what the run was trained on" in (
            capsys.readouterr().err
        )
    assert pathlib.Path("images.npy").read_bytes() == before


# ---- one process at a time -------------------------------------------------------------------------------------------


def test_another_process_does_not_train_in_the_same_folder(tmp_path):
    run = tmp_path / "run"
    process = server.Process(target=overwritten_run.train_for_long, args=(str(run),))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for changes in ({}, {"overwrite": False, "resume": True}):
            with pytest.raises(LockedError, match="run is being trained in by another process or trainer"):
                aevb.Trainer(config(run, **changes)).fit()
        assert aevb.Trainer.load(run).evaluate().elbo < 0, "it may be asked meanwhile"
    finally:
        process.kill()
        process.join()
    assert json.loads((run / "config.json").read_text())["epochs"] == 1_000_000
    aevb.Trainer(config(run)).fit()
    assert json.loads((run / "config.json").read_text())["epochs"] == 1


def test_runs_that_begin_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = RunFolder.at("runs/digits")
    first.path.mkdir(parents=True)
    lock = Lock(first.path)  # as one has it that has not written anything yet
    second = RunFolder(None, "digits", {}, overwrite=False)
    assert second.path == pathlib.Path("runs/digits-2")
    lock.release()
    assert RunFolder(None, "digits", {}, overwrite=False).path == first.path


def test_a_trainer_lets_go_of_its_folder(run):
    """After a run, an error, and an interrupt: also within one process."""
    trainer = aevb.Trainer(config(run))
    trainer.fit()
    Lock(run).release()
    with contextlib.suppress(RunFolderError):
        aevb.Trainer(config(run, overwrite=False)).fit()
    Lock(run).release()
    trainer = aevb.Trainer(config(run))

    def interrupt(*_):
        raise KeyboardInterrupt

    trainer.optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match="interrupted after 0 epochs"):
        trainer.fit()
    Lock(run).release()
    assert aevb.Trainer.resume(run).fit()["epoch"] == 1


def test_a_file_system_without_locks(run, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_files.fcntl, "flock", no_locks)
    assert aevb.Trainer(config(run)).fit()["epoch"] == 1
