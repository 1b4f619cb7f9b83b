"""The trainer: what it learns, what it leaves in the run folder, what it says and keeps when something goes wrong."""

import dataclasses
import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import same_bits

import aevb
from aevb import files
from aevb.data import Dataset, Targets, load
from aevb.ops import matmul as products
from aevb.training import run_dir as runs
from aevb.training.run_dir import RunFolder, RunFolderError

NAMES = {"config.json", "metrics.jsonl", "model.safetensors", "reconstructions.png", "samples.png", "latent.png"}
NAMES |= {"checkpoints"}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """A few of the digits: 130 to train on, so that batches of 50 end with one of 30."""
    data = load("digits")
    return dataclasses.replace(
        data,
        train_images=data.train_images[:130],
        train_labels=data.train_labels[:130],
        test_images=data.test_images[:60],
        test_labels=data.test_labels[:60],
    )


def options(tmp_path, **changes):
    small = {"epochs": 2, "batch_size": 50, "hidden_dims": (16,), "latent_dim": 3, "progress": False}
    return aevb.TrainConfig(out=str(tmp_path / "run"), **{**small, **changes})


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adagrad", "learning_rate": 0.02},
        {"num_samples": 3, "beta": 0.5},
        {"binarize": "threshold"},
        {"binarize": "none"},
        {"estimator": "sgvb-a"},
        {"estimator": "stl", "num_samples": 3, "warmup_epochs": 2},
        {"estimator": "iwae", "num_samples": 5, "hidden_dims": (16, 8)},
        {"estimator": "dreg", "num_samples": 5, "warmup_epochs": 2, "warmup_cycles": 2},
        {"free_bits": 0.5},
        {"capacity": 4.0, "beta": 2.0},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()) or "defaults",
)
def test_training_improves_the_elbo(tmp_path, digits, changes):
    trainer = aevb.Trainer(options(tmp_path, **{"learning_rate": 5e-3, "batch_size": 10, **changes}), dataset=digits)
    before = trainer.evaluate()
    train = [trainer.train_epoch().elbo for _ in range(6)]
    after = trainer.evaluate()
    assert after.elbo > before.elbo + 8
    assert train[-1] > train[0] + 4
    assert after.elbo == pytest.approx(after.log_likelihood - after.kl)
    assert (trainer.epoch, trainer.step) == (6, 6 * 13)


def test_one_seed_gives_the_same_bits(tmp_path, digits):
    def train(seed):
        trainer = aevb.Trainer(options(tmp_path, seed=seed), dataset=digits)
        return trainer.train_epoch(), trainer.train_epoch(), trainer.evaluate(), weights(trainer)

    state = torch.get_rng_state()
    *numbers, w = train(5)
    torch.manual_seed(99)
    *same_numbers, same_w = train(5)
    assert numbers == same_numbers
    assert torch.equal(w, same_w)
    assert not torch.equal(w, train(6)[-1])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    train(5)
    assert torch.equal(before, torch.get_rng_state()), "PyTorch's own generator was used"
    torch.set_rng_state(state)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_an_epochs_average_has_one_weight_a_datapoint(tmp_path, digits, beta):
    """With a step too small to move the weights, the average does not depend on how the last batch comes out."""
    config = options(tmp_path, learning_rate=1e-30, binarize="threshold", beta=beta, batch_size=129)
    trainer = aevb.Trainer(config, dataset=digits)
    reports = []
    average = trainer.train_epoch(lambda images, averages: reports.append((images, averages)))

    order, (_, noise_seed) = trainer.order(0), trainer.noise_seeds(0)
    assert sorted(order.tolist()) == list(range(130))
    log_likelihood = total_kl = 0.0
    for batch in order.split(129):
        x = (digits.train_images[batch] > 8).float()
        with torch.no_grad():
            logits, kl = trainer.model(x, seed=aevb.mix_seed(noise_seed, batch))
        log_likelihood += float(aevb.bernoulli_log_prob(logits, x).sum())
        total_kl += float(kl.sum())
    assert average.log_likelihood == pytest.approx(log_likelihood / 130, rel=1e-6)
    assert average.kl == pytest.approx(total_kl / 130, rel=1e-6)
    assert average.elbo == pytest.approx(average.log_likelihood - average.kl)
    assert reports == [(130, average)]


@pytest.mark.parametrize(
    "changes",
    [
        {"free_bits": 0.8},
        {"capacity": 1.5, "beta": 3.0},
        {"estimator": "stl", "num_samples": 4, "beta": 0.3},
        {"estimator": "iwae", "num_samples": 4},
    ],
    ids=str,
)
def test_what_the_loss_has_beside_the_bound_is_not_reported(tmp_path, digits, changes):
    """train_elbo is the ELBO (or the bound of iwae) whatever else presses on the KL."""
    config = options(tmp_path, learning_rate=1e-30, binarize="threshold", batch_size=130, **changes)
    trainer = aevb.Trainer(config, dataset=digits)
    x = (digits.train_images > 8).float()
    average = trainer.train_epoch().elbo
    order, (_, noise_seed) = trainer.order(0), trainer.noise_seeds(0)
    with torch.no_grad():
        mu, logvar = trainer.model.encode(x[order])
        L = changes.get("num_samples", 1)
        seeds = aevb.mix_seed(noise_seed, order).expand(L, -1)
        seeds = aevb.mix_seed(seeds, torch.arange(L).unsqueeze(1)) if L > 1 else seeds
        z, ratio = aevb.sample_gaussian_log_ratio(mu, logvar, L, seed=seeds)
        log_prob = trainer.model.log_prob(x[order], z)
    kl = ratio if "estimator" in changes else aevb.gaussian_kl(mu, logvar)
    bound = aevb.importance_weighted_bound if changes.get("estimator") == "iwae" else aevb.elbo
    assert average == pytest.approx(float(bound(log_prob, kl).mean()), rel=1e-5)


def test_the_weight_of_the_kl_warms_up(tmp_path, digits):
    def betas(**changes):
        trainer = aevb.Trainer(options(tmp_path, beta=0.5, **changes), dataset=digits)  # 3 steps an epoch
        seen = []
        trainer.optimizer.register_step_post_hook(lambda *_: seen.append(trainer.criterion.beta))
        for _ in range(3):
            trainer.train_epoch()
        return seen

    assert betas() == [0.5] * 9
    assert betas(warmup_epochs=2) == pytest.approx([0, 1 / 12, 1 / 6, 0.25, 1 / 3, 5 / 12, 0.5, 0.5, 0.5])
    cycle = [0, 1 / 3, 0.5]  # grows within the first half
    assert betas(warmup_epochs=2, warmup_cycles=2) == pytest.approx([*cycle, *cycle, 0.5, 0.5, 0.5])


def test_a_run_may_be_loaded(tmp_path):
    """To be evaluated: the same model, the same test images, the same numbers."""
    config = dataclasses.replace(options(tmp_path, hidden_dims=(16, 9), epochs=1), data="digits")
    metrics = aevb.Trainer(config).fit()
    loaded = aevb.Trainer.load(tmp_path / "run")
    assert loaded.config == config
    assert loaded.folder.path == tmp_path / "run"
    assert loaded.evaluate().elbo == metrics["test_elbo"]
    assert loaded.evaluate(50).elbo != metrics["test_elbo"]


def test_a_run_that_cannot_be_loaded_gets_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json and no model.safetensors; expected a folder that"):
        aevb.Trainer.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for text, sentence in (
        ("{", r"config.json is damaged"),
        ("[1]", r"config.json is damaged: it is no object"),
        ('{"epochs": 1, "flow": 3}', r"config.json has options that aevb does not know: flow"),
        ('{"epochs": 0}', "epochs is 0"),
        ("{}", "no safetensors file"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            aevb.Trainer.load(tmp_path)


@pytest.mark.parametrize("how", ["dynamic", "threshold", "none"])
def test_targets_are_those_of_their_images(how):
    """However they are gathered, and for bits: anew for each seed."""
    images = torch.arange(17, dtype=torch.uint8).repeat(50, 1)
    targets, index = Targets(images, how, 16), torch.tensor([7, 3, 3, 40])
    x, whole = targets(index, torch.tensor(1)), targets.all(torch.tensor(1))
    assert x.dtype == (torch.uint8 if how == "none" else torch.bool)
    assert torch.equal(x * (1 / 16) if how == "none" else x, whole[index])
    assert torch.equal(x, targets(index, torch.tensor(2))) == (how != "dynamic")
    if how == "threshold":
        assert torch.equal(whole, images > 8)


def test_an_epoch_is_reproducible_from_its_seed(tmp_path, digits):
    """Its order, bits and noise do not depend on the epochs before it, nor on how it is cut into batches."""
    first, second = (aevb.Trainer(options(tmp_path, batch_size=b), dataset=digits) for b in (50, 13))
    first.train_epoch()
    assert torch.equal(first.order(1), second.order(1))
    assert not torch.equal(first.order(1), first.order(2))
    for a, b in zip(first.noise_seeds(1), second.noise_seeds(1), strict=True):
        assert torch.equal(a, b)
    assert len({int(s) for epoch in range(3) for s in first.noise_seeds(epoch)}) == 6


def test_the_test_elbo_does_not_depend_on_how_the_test_set_is_cut(tmp_path, digits, monkeypatch):
    trainer = aevb.Trainer(options(tmp_path), dataset=digits)
    whole = trainer.evaluate()
    monkeypatch.setattr("aevb.training.loop.EVALUATION_BATCH", 7)
    assert dataclasses.astuple(trainer.evaluate()) == pytest.approx(dataclasses.astuple(whole), rel=1e-6)


@pytest.mark.parametrize(("batch_size", "threads", "expected"), [(50, None, 1), (10**5, None, 3), (50, 2, 2)])
def test_threads_are_as_asked_for_and_given_back(tmp_path, digits, batch_size, threads, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        trainer = aevb.Trainer(options(tmp_path, batch_size=batch_size, threads=threads), dataset=digits)
        seen = []
        trainer.optimizer.register_step_post_hook(lambda *_: seen.append(torch.get_num_threads()))
        trainer.fit()
        assert set(seen) == {expected}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_model_and_data_of_ones_own(tmp_path, digits):
    images = torch.randint(0, 256, (40, 6), dtype=torch.uint8)
    data = Dataset("mine", (2, 3), 255, images, images[:5])
    trainer = aevb.Trainer(options(tmp_path), model=aevb.VAE(6, 4, 2), dataset=data)
    trainer.fit()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"], config["hidden_dims"], config["latent_dim"]) == ("mine", [4], 2)
    with pytest.raises(ValueError, match="data_dim is 6; expected 64, the pixels of an image of digits"):
        aevb.Trainer(options(tmp_path), model=aevb.VAE(6, 4, 2), dataset=digits)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"num_samples": -1}, "num_samples is -1; expected at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; expected a positive number"),
        ({"beta": -0.1}, "beta is -0.1; expected a number from 0 up"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
        ({"seed": 2**63}, "seed is 9223372036854775808; expected a 64-bit"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of 'adam', 'adagrad'"),
        ({"binarize": "maybe"}, "binarize is 'maybe'; expected one of 'auto', 'dynamic'"),
        ({"estimator": "vae"}, "estimator is 'vae'; expected one of 'sgvb-b'"),
        ({"hidden_dims": ()}, r"hidden_dims is \(\); expected the units of each layer"),
        ({"hidden_dims": (20, 0)}, r"hidden_dims is \(20, 0\); expected"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1; expected a number from 0 up"),
        ({"estimator": "dreg"}, "num_samples is 1 and the estimator 'dreg', .*; expected at least 2"),
        ({"warmup_cycles": 3}, "warmup_cycles is 3, of warmup_epochs=0"),
        ({"warmup_cycles": 0}, "warmup_cycles is 0; expected at least 1"),
        ({"free_bits": -1.0}, "free_bits is -1.0 and the estimator 'sgvb-b'; expected a number from 0 up"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected one of 'float32', 'bf16'"),
        (
            {"capacity": 1.0, "estimator": "iwae", "num_samples": 5},
            "capacity is 1.0 and the estimator 'iwae'; expected",
        ),
    ],
)
def test_bad_options_get_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        aevb.TrainConfig(**changes)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("gpu", "device is 'gpu'; expected 'cpu', 'cuda' or 'cuda:1'"),
        ("meta", "device is 'meta'; expected 'cpu', 'cuda' or 'cuda:1'"),
        ("cuda", "device is 'cuda', but this PyTorch finds no CUDA GPU; expected 'cpu'"),
    ],
)
def test_a_device_that_is_not_there_gets_a_sentence(tmp_path, digits, monkeypatch, device, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=sentence):
        aevb.Trainer(options(tmp_path, device=device), dataset=digits)


def test_bf16_trains_and_says_where_it_is_slow(tmp_path, digits, monkeypatch):
    config = options(tmp_path, precision="bf16", learning_rate=5e-3, batch_size=10)
    monkeypatch.setattr(products, "_cpuinfo", lambda: "flags : fma avx512_bf16")
    trainer = aevb.Trainer(config, dataset=digits)
    before = trainer.evaluate()
    for _ in range(6):
        trainer.train_epoch()  # without a warning, which would be an error here
    assert trainer.evaluate().elbo > before.elbo + 8
    monkeypatch.setattr(products, "_cpuinfo", lambda: "flags : fma avx512f")
    with pytest.warns(UserWarning, match="precision is 'bf16', for which this processor has no instructions"):
        aevb.Trainer(config, dataset=digits).train_epoch()


def test_what_is_changed_between_epochs_counts(tmp_path, digits):
    trainer = aevb.Trainer(options(tmp_path), dataset=digits)
    trainer.train_epoch()
    model = trainer.model

    def moved(layer):
        before = layer.weight.detach().clone()
        trainer.train_epoch()
        return not torch.equal(before, layer.weight)

    model.decoder[0].requires_grad_(False)
    assert not moved(model.decoder[0])
    model.decoder[0].requires_grad_(True)
    assert moved(model.decoder[0])
    seen = []
    handle = model.decoder[0].weight.register_hook(lambda grad: seen.append(grad))
    trainer.train_epoch()
    assert seen
    handle.remove()
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert not moved(model.encoder[0])
    trainer.optimizer.param_groups[0]["lr"] = 1e-3
    assert moved(model.encoder[0])
    trainer.criterion = aevb.FusedELBO(x_scale=trainer.criterion.x_scale, estimator="iwae", num_samples=5)
    assert moved(model.encoder[0])


def test_layers_of_another_kind_train(tmp_path, digits):
    model = aevb.VAE(digits.data_dim, (20, 20), 3)
    torch.nn.utils.parametrizations.weight_norm(model.decoder[0])
    model.encoder[3] = torch.nn.ReLU()
    shared = model.decoder[2]
    model.decoder[2] = torch.nn.Sequential(shared, torch.nn.Tanh(), shared)
    trainer = aevb.Trainer(options(tmp_path, learning_rate=1e-2), model=model, dataset=digits)
    before, elbo = [p.detach().clone() for p in model.parameters()], trainer.evaluate().elbo
    for _ in range(4):
        trainer.train_epoch()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert trainer.evaluate().elbo > elbo + 3


def test_bits_and_noise_of_the_test_images_are_independent(tmp_path, digits):
    trainer = aevb.Trainer(options(tmp_path), dataset=digits)
    x = trainer.test_x.double()
    eps = aevb.reference.normal(trainer.held_out["test"].seeds(torch.arange(len(x))), (len(x), 64))
    radius = (eps.view(-1, 32, 2).square().sum(-1)).repeat_interleave(2, -1).double()  # from a pixel's word, once
    grey = digits.test_images.double() / digits.max_value
    chosen = (grey > 0.2) & (grey < 0.8)
    correlation = torch.corrcoef(torch.stack([(x - grey)[chosen], radius[chosen]]))[0, 1]
    assert abs(correlation) < 5 / chosen.sum() ** 0.5


def test_training_imports_nothing_slow():
    """Each of these takes half a second or more."""
    code = (
        "import sys, aevb; "
        "trainer = aevb.Trainer(aevb.TrainConfig(hidden_dims=(3,), batch_size=500)); "
        "trainer.train_epoch(); trainer.evaluate(); "
        "print(*{'torch._dynamo', 'torch._inductor', 'sympy', 'matplotlib'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


# ---- the run folder -------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(tmp_path, digits):
    config = options(tmp_path)
    trainer = aevb.Trainer(config, dataset=digits)
    metrics = trainer.fit()
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == NAMES
    assert aevb.TrainConfig(**json.loads((folder / "config.json").read_text())) == config
    assert [line["epoch"] for line in lines(folder)] == [1, 2]
    assert [line["step"] for line in lines(folder)] == [3, 6]
    assert lines(folder)[-1] == metrics
    assert set(metrics) == {
        *("epoch", "step", "seconds", "learning_rate", "train_elbo", "train_log_likelihood", "train_kl"),
        *("test_elbo", "test_log_likelihood", "test_kl"),
    }
    model = aevb.VAE.load(folder / "model.safetensors")
    assert aevb.Trainer(config, model=model, dataset=digits).evaluate().elbo == metrics["test_elbo"]
    for name in NAMES:
        if name.endswith(".png"):
            picture = matplotlib.image.imread(io.BytesIO((folder / name).read_bytes()))
            assert min(picture.shape[:2]) > 300
            assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("labelled", [True, False])
def test_pictures_of_any_latent_space(tmp_path, digits, latent_dim, labelled):
    if not labelled:
        digits = dataclasses.replace(digits, train_labels=None, test_labels=None, test_images=digits.test_images[:7])
    aevb.Trainer(options(tmp_path, latent_dim=latent_dim, epochs=1), dataset=digits).fit()
    assert {p.name for p in (tmp_path / "run").iterdir()} == NAMES


def test_a_run_that_is_there_is_kept(tmp_path, digits):
    aevb.Trainer(options(tmp_path), dataset=digits).fit()
    folder = tmp_path / "run"
    (folder / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(RunFolderError, match=r"run already holds a run, which is kept; .*--overwrite"):
        aevb.Trainer(options(tmp_path, seed=1), dataset=digits).fit()
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    aevb.Trainer(options(tmp_path, seed=1, epochs=1, overwrite=True), dataset=digits).fit()
    assert len(lines(folder)) == 1
    assert json.loads((folder / "config.json").read_text())["seed"] == 1
    assert (folder / "notes.txt").read_text() == "mine"


def test_without_out_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [RunFolder(None, "digits", {}, overwrite=False).path for _ in range(3)]
    assert paths == [Path("runs/digits"), Path("runs/digits-2"), Path("runs/digits-3")]
    assert json.loads((paths[1] / "config.json").read_text()) == {"out": "runs/digits-2"}
    assert RunFolder(None, "digits", {}, overwrite=True).path == paths[0]


def test_an_unwritable_folder_is_refused_before_training(tmp_path, digits, monkeypatch):
    (tmp_path / "run").write_text("a file where a folder should be")
    trainer = aevb.Trainer(options(tmp_path), dataset=digits)
    monkeypatch.setattr(trainer.loop, "take", lambda *_: pytest.fail("training began"))
    with pytest.raises(RunFolderError, match=r"cannot write .*run: File exists"):
        trainer.fit()
    assert (tmp_path / "run").read_text() == "a file where a folder should be"


def test_a_full_disk_keeps_what_was_saved(tmp_path, digits, monkeypatch):
    trainer = aevb.Trainer(options(tmp_path, epochs=5), dataset=digits)
    folder, models = tmp_path / "run", []

    class File(io.FileIO):
        """On a disk with room for two models."""

        def write(self, data):
            if "model" in self.name.name and len(models) == 2:
                super().write(data[:100])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.name))
            if "model" in self.name.name:
                models.append(data)
            return super().write(data)

    monkeypatch.setattr(files, "open", File, raising=False)
    with pytest.raises(RunFolderError, match=r"cannot write .*model.safetensors: No space left on device; .* is kept"):
        trainer.fit()
    assert {p.name for p in folder.iterdir()} == {"config.json", "metrics.jsonl", "model.safetensors", "checkpoints"}
    assert (folder / "model.safetensors").read_bytes() == models[-1]
    aevb.VAE.load(folder / "model.safetensors")
    assert [line["epoch"] for line in lines(folder)] == [1, 2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_metrics_on_a_full_disk(tmp_path):
    folder = RunFolder(tmp_path, "run", {}, overwrite=False)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=r"metrics.jsonl: No space left on device"):
        folder.append_metrics({"epoch": 1})


def test_a_line_of_metrics_is_whole_or_absent(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, "run", {}, overwrite=False)
    folder.append_metrics({"epoch": 1})

    class Short(io.FileIO):
        def write(self, data):
            return super().write(data[:5])

    monkeypatch.setattr(runs, "open", lambda path, mode, buffering: Short(path, mode), raising=False)
    with pytest.raises(RunFolderError, match="No space left on device"):
        folder.append_metrics({"epoch": 2})
    assert lines(tmp_path) == [{"epoch": 1}]


def test_an_interrupt_leaves_a_checkpoint_and_pictures(tmp_path, digits):
    trainer = aevb.Trainer(options(tmp_path, epochs=5), dataset=digits)

    def interrupt(*_):
        if trainer.step == 4:  # the second step of the second epoch
            raise KeyboardInterrupt

    trainer.optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted after 1 epochs, 4 steps; the model so far is in .*run"):
        trainer.fit()
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == NAMES
    saved = aevb.VAE.load(folder / "model.safetensors")
    assert torch.equal(torch.cat([p.flatten() for p in saved.parameters()]), weights(trainer))


# ---- what is not finite ---------------------------------------------------------------------------------------------


def test_weights_broken_by_an_optimizer_stop_the_run(tmp_path, digits):
    trainer = aevb.Trainer(options(tmp_path, epochs=5), dataset=digits)

    def poison(optimizer, args, kwargs):
        if trainer.step == 3:  # within the fourth step: the fifth is the first to see it
            with torch.no_grad():
                trainer.model.encoder[2].bias[4] = float("nan")

    trainer.optimizer.register_step_post_hook(poison)
    sentence = r"encoder.2.bias\[4\], of latent dimension 1, is nan after an update of finite gradients, at step 4"
    with pytest.raises(FloatingPointError, match=f"training stopped because {sentence}; .* is of epoch 1") as stop:
        trainer.fit()
    assert stop.value.step == 4
    assert len(lines(tmp_path / "run")) == 1
    saved = aevb.VAE.load(tmp_path / "run" / "model.safetensors")
    assert all(p.isfinite().all() for p in saved.parameters())
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ("encoder.2", r"the KL divergence of latent dimension 2 is inf \(mu .*, logvar 100\), of training image \d+"),
        (
            "decoder.0",
            r"the log-likelihood is -inf \(the largest of z is .*, of latent dimension \d\), of training image",
        ),
    ],
)
def test_what_went_first_is_named(tmp_path, digits, layer, sentence):
    """By the steps since the last checkpoint, taken again."""
    trainer = aevb.Trainer(options(tmp_path, epochs=5), dataset=digits)

    def spoil(optimizer, args, kwargs):
        if trainer.step == 3:
            with torch.no_grad():
                if layer == "encoder.2":
                    trainer.model.encoder[2].weight[5] = 0
                    trainer.model.encoder[2].bias[5] = 100.0
                else:
                    trainer.model.decoder[2].bias.fill_(3e38)

    trainer.optimizer.register_step_post_hook(spoil)
    with pytest.raises(FloatingPointError, match=f"training stopped because {sentence}.* at step 5; .* is of epoch 1"):
        trainer.fit()


def test_weights_broken_between_two_looks_at_the_losses(tmp_path, digits):
    """The checkpoint that is due sees it; the text says it once."""
    trainer = aevb.Trainer(options(tmp_path, epochs=5, checkpoint_seconds=1e-9), dataset=digits)

    def poison(*_):
        if trainer.step == 4:
            with torch.no_grad():
                trainer.model.decoder[0].weight[0, 2] = float("inf")

    trainer.optimizer.register_step_post_hook(poison)
    with pytest.raises(aevb.NotFiniteError) as stop:
        trainer.fit()
    text = str(stop.value)
    assert text.startswith(
        "training stopped because decoder.0.weight[0, 2], of latent dimension 2, is inf after an update"
    )
    assert "at step 5; " in text
    assert text.count("training stopped") == 1
    assert "the checkpoint of step 4" in text


def test_weights_broken_by_the_last_step_are_not_saved(tmp_path, digits):
    trainer = aevb.Trainer(options(tmp_path, learning_rate=1e38, batch_size=200), dataset=digits)
    with pytest.raises(
        FloatingPointError, match=r"after an update of finite gradients, at step 1; the checkpoint .* 0"
    ):
        trainer.fit()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "checkpoints"}


def test_a_run_is_loaded_by_its_folder(tmp_path):
    trainer = aevb.Trainer(options(tmp_path, data="digits", validation=0.2))
    trainer.fit()
    path = tmp_path / "run"
    model = aevb.load(path)
    assert type(model) is aevb.VAE
    assert not model.training
    x = trainer.dataset.test_images[:3] / 16
    assert same_bits(model.reconstruct(x), aevb.load(str(path / "model.safetensors")).reconstruct(x))
    assert same_bits(model.reconstruct(x), aevb.VAE.load(path).reconstruct(x))
    best = aevb.load(path, best=True)
    assert same_bits(best.reconstruct(x), aevb.VAE.load(path / "best.safetensors").reconstruct(x))
    (path / "best.safetensors").unlink()
    for wrong, sentence in [
        (
            lambda: aevb.load(path, best=True),
            r"has no best.safetensors; expected a run that was",
        ),
        (
            lambda: aevb.load(tmp_path / "nothing"),
            r"there is no file .*nothing; expected a run's folder, or",
        ),
        (lambda: aevb.VAE.load(tmp_path), r"there is no file .*model.safetensors; expected a run's folder"),
    ]:
        with pytest.raises(FileNotFoundError, match=sentence):
            wrong()
    with pytest.raises(ValueError, match="is no safetensors file"):
        aevb.load(path / "config.json")


def test_dir_shows_the_api():
    assert set(aevb.__all__) | {"__version__", "data"} <= set(dir(aevb))
    assert not {"ops", "steps", "torch", "ranges", "annotations"} & set(dir(aevb))
    named = set(re.findall(r"`(\w+)", aevb.__doc__))
    assert set(aevb.__all__) <= named | {"reference"}, "help(aevb) begins with what there is"
    assert aevb.training.step  # what is imported is there all the same
