"""What people bring: a model of their own, data sets and loaders of `torch.utils.data`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import aevb
from aevb.cli import main
from aevb.data import Dataset, from_torch, load

D, Z = 16, 2


def images(seed: int, count: int, levels: int = 255) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randint(0, levels + 1, (count, 4, 4)).astype(np.uint8))


def data(count: int = 60) -> Dataset:
    return Dataset("mine", (4, 4), 255, images(1, count).flatten(1), images(2, 20).flatten(1))


class Mine(nn.Module):
    """Layers of an `aevb.VAE`, behind the two methods alone."""

    def __init__(self, latent_dim: int = Z, likelihood: str = "bernoulli"):
        super().__init__()
        options = {"generator": torch.Generator().manual_seed(3), "likelihood": likelihood}
        self.layers = aevb.VAE(D, (8,), latent_dim, **options)

    def encode(self, x):
        assert x.dtype == torch.float32
        return self.layers.encode(x)

    def log_prob(self, x, z):
        return self.layers.log_prob(x, z)


def config(out, **options):
    return aevb.TrainConfig(
        **{"epochs": 2, "batch_size": 20, "threads": 1, "progress": False, "out": str(out), **options}
    )


ONLY = "encode and log_prob alone.*, but there are no pictures"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_samples": 3},
        {"estimator": "iwae", "num_samples": 4},
        {"estimator": "dreg", "num_samples": 4, "warmup_epochs": 1},
        {"estimator": "stl"},
        {"free_bits": 0.2},
        {"capacity": 2.0, "beta": 3.0},
    ],
)
def test_a_model_of_ones_own_learns_as_the_vae_inside_it(options, tmp_path):
    mine = Mine()
    with pytest.warns(UserWarning, match=ONLY):
        trainer = aevb.Trainer(config(tmp_path / "mine", **options), model=mine, dataset=data())
    found = trainer.fit()
    theirs = aevb.Trainer(config(tmp_path / "vae", **options), model=Mine().layers, dataset=data())
    expected = theirs.fit()
    for name in ("train_elbo", "train_kl", "test_elbo", "test_kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["architecture"].endswith(":Mine()")
    assert not (tmp_path / "mine" / "samples.png").exists()


def test_grey_values_of_a_density(tmp_path):
    with pytest.warns(UserWarning, match=ONLY):
        mine = aevb.Trainer(
            config(tmp_path / "mine", binarize="none"), model=Mine(likelihood="gaussian"), dataset=data()
        )
    theirs = aevb.Trainer(config(tmp_path / "vae"), model=Mine(likelihood="gaussian").layers, dataset=data())
    assert mine.fit()["test_elbo"] == pytest.approx(theirs.fit()["test_elbo"], rel=1e-5)


@pytest.mark.filterwarnings(f"ignore:.*{ONLY}")
def test_it_is_resumed_to_the_bit_and_loaded(tmp_path):
    aevb.Trainer(config(tmp_path / "whole", epochs=3), model=Mine(), dataset=data()).fit()
    aevb.Trainer(config(tmp_path / "stopped", epochs=2), model=Mine(), dataset=data()).fit()
    resumed = aevb.Trainer.resume(tmp_path / "stopped", epochs=3, model=Mine(), dataset=data())
    resumed.fit()
    runs = [aevb.Trainer.load(tmp_path / run, model=Mine(), dataset=data()) for run in ("whole", "stopped")]
    for a, b, c in zip(*(t.model.parameters() for t in (*runs, resumed)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert runs[0].evaluate() == resumed.evaluate()
    assert (runs[0].epoch, runs[0].step) == (3, 9)


@pytest.mark.filterwarnings(f"ignore:.*{ONLY}")
def test_what_is_not_finite_is_named(tmp_path):
    mine = Mine()
    mine.encode = lambda x: (mine.layers.encode(x)[0] / x.new_zeros(()), mine.layers.encode(x)[1])
    with pytest.raises(aevb.NotFiniteError, match=r"mu of latent dimension \d is (-?inf|nan), of training image"):
        aevb.Trainer(config(tmp_path / "run"), model=mine, dataset=data()).fit()
    mine = Mine()
    mine.log_prob = lambda x, z: torch.full((len(x),), float("inf")) * z.sum()
    with pytest.raises(aevb.NotFiniteError, match="log-likelihood is"):
        aevb.Trainer(config(tmp_path / "other"), model=mine, dataset=data()).fit()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(2, 2), "a Linear without encode and log_prob; expected a torch.nn.Module with encode"),
        (object(), "a object without encode and log_prob"),
    ],
)
def test_what_is_no_model_is_told_what_it_lacks(model, words):
    with pytest.raises(TypeError, match=words):
        aevb.Trainer(aevb.TrainConfig(epochs=1), model=model, dataset=data())


def test_of_log_prob_wants_a_value_a_datapoint():
    with pytest.raises(ValueError, match=r"log_prob has shape \(3, 4\) and the KL term \(5,\); expected"):
        aevb.FusedELBO().of_log_prob(torch.zeros(3, 4), torch.zeros(5))


MODULE = """
import torch
from torch import nn

class MyVAE(nn.Module):
    def __init__(self, data_dim, latent_dim, width=7):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(data_dim, 2 * latent_dim), nn.Linear(latent_dim, data_dim)

    def encode(self, x):
        return self.encoder(x).chunk(2, -1)

    def log_prob(self, x, z):
        return -nn.functional.binary_cross_entropy_with_logits(
            self.decoder(z), x.expand(*z.shape[:-1], x.shape[-1]), reduction="none"
        ).sum(-1)

class Wants(MyVAE):
    def __init__(self, colour):
        super().__init__(64, 2)

class Not(nn.Module):
    pass
"""


def test_from_the_command_line(tmp_path):
    (tmp_path / "mymodule.py").write_text(MODULE)
    train = [sys.executable, "-m", "aevb", "train", "--epochs", "1", "--no-progress", "--architecture"]

    def run(name, out):
        done = subprocess.run([*train, name, "--out", out], cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = run("mymodule:MyVAE", "run")
    assert code == 0, text
    asked = [sys.executable, "-m", "aevb", "sample", "run"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is a run of mymodule:MyVAE, which has encode and log_prob alone" in done.stderr
    assert "test ELBO" in text or (tmp_path / "run" / "model.safetensors").is_file()
    for name, words in (
        ("mymodule:Other", "has no torch.nn.Module called Other"),
        ("nomodule:MyVAE", "no module nomodule"),
        ("mymodule:Wants", "wants colour"),
        ("mymodule:Not", "without encode and log_prob"),
        ("rnn", "expected 'mlp', 'conv' or 'mymodule:MyVAE'"),
    ):
        code, text = run(name, "wrong")
        assert code != 0
        assert words in " ".join(text.replace("│", " ").split()), text
        assert not (tmp_path / "wrong").exists()


# ---- data -----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, x, labels=None):
        self.x, self.labels = x, labels

    def __iter__(self):
        return iter(self.x if self.labels is None else zip(self.x, self.labels.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["map", "labels", "list", "iterable", "iterable, labels"])
def test_a_data_set_of_torchs_is_read_as_a_file_would_be(kind, tmp_path):
    x, labels = images(1, 50), torch.arange(50) % 3
    np.savez(tmp_path / "data.npz", x=x.numpy(), **({"y": labels.numpy()} if "label" in kind else {}))
    source = {
        "map": TensorDataset(x),
        "labels": TensorDataset(x, labels),
        "list": TensorDataset(x.unsqueeze(1)),
        "iterable": Stream(x),
        "iterable, labels": Stream(x, labels),
    }[kind]
    found, expected = from_torch(source, validation=0.1), load(tmp_path / "data.npz", validation=0.1)
    for name in ("train", "test", "validation"):
        assert torch.equal(getattr(found, f"{name}_images"), getattr(expected, f"{name}_images"))
        labels_found, labels_expected = (getattr(d, f"{name}_labels") for d in (found, expected))
        assert (labels_found is None) == (labels_expected is None)
        assert labels_found is None or torch.equal(labels_found, labels_expected)
    assert (found.max_value, found.image_shape[-2:]) == (expected.max_value, expected.image_shape[-2:])


def test_parts_and_floats_and_a_run(tmp_path):
    x = images(1, 40).float() / 255
    parts = {
        "train": TensorDataset(x),
        "test": TensorDataset(x[:10]),
        "validation": DataLoader(TensorDataset(x[10:15])),
    }
    trainer = aevb.Trainer(config(tmp_path, hidden_dims=(8,), latent_dim=Z), dataset=parts)
    assert trainer.dataset.name == "data"
    assert [len(trainer.dataset.train_images), *(h.count for h in trainer.held_out.values())] == [40, 10, 5]
    assert {"test_elbo", "validation_elbo"} <= set(trainer.fit())


FROM_LOADER = "come from a DataLoader, in its own order and batches"


@pytest.mark.parametrize("iterable", [False, True])
def test_a_loader_is_gone_through_in_each_epoch(iterable, tmp_path):
    """As the same images in memory would be, but for their order; a last small batch too."""
    x = images(1, 50)
    source = Stream(x) if iterable else TensorDataset(x, torch.arange(50))
    loader = DataLoader(source, batch_size=20)
    parts = {"train": loader, "test": TensorDataset(images(2, 20))}
    options = {"hidden_dims": (8,), "latent_dim": Z, "binarize": "threshold", "learning_rate": 0.01}
    with pytest.warns(UserWarning, match=FROM_LOADER):
        trainer = aevb.Trainer(config(tmp_path / "loader", epochs=8, **options), dataset=parts)
    found = trainer.fit()
    assert (trainer.step, trainer.epoch) == (24, 8)
    mine = Dataset("mine", (4, 4), 255, x.flatten(1), images(2, 20).flatten(1))
    memory = aevb.Trainer(config(tmp_path / "memory", epochs=8, **options), dataset=mine)
    assert found["test_elbo"] == pytest.approx(memory.fit()["test_elbo"], abs=0.3)
    assert trainer.test_x.equal(memory.test_x)


def test_what_an_augmentation_gives_is_trained_on(tmp_path):
    """Each epoch asks the loader anew."""
    seen = []

    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            seen.append(i)
            return torch.rand(4, 4)

    parts = {"train": DataLoader(Augmented(), batch_size=4, drop_last=True), "test": TensorDataset(images(2, 20) / 255)}
    with pytest.warns(UserWarning, match=FROM_LOADER):
        trainer = aevb.Trainer(config(tmp_path, hidden_dims=(8,), latent_dim=Z), dataset=parts)
    trainer.train_epoch()
    trainer.train_epoch()
    assert trainer.step == 2
    assert len(seen) >= 8


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (DataLoader(TensorDataset(images(1, 9))), {}, 'no test images can be held out; expected dataset={"train"'),
        ({"train": TensorDataset(images(1, 9)), "dev": TensorDataset(images(1, 9))}, {}, "a part 'dev'"),
        ({"test": TensorDataset(images(1, 9))}, {}, "expected 'train' among them"),
        (Stream([]), {}, r"the train data \(Stream\) holds no images"),
        (Stream([torch.zeros(4, 4), torch.zeros(5, 4)]), {}, r"items of shapes \(4, 4\), \(5, 4\)"),
        (Stream([{"image": torch.zeros(4, 4)}]), {}, "an item is a dict with image"),
        (
            {"train": DataLoader(TensorDataset(images(1, 9))), "test": TensorDataset(images(1, 9))},
            {"validation": 0.1},
            "no images can be held out from a DataLoader",
        ),
    ],
)
def test_data_that_do_not_fit_are_told_why(source, options, words):
    with pytest.raises(ValueError, match=words):
        aevb.Trainer(aevb.TrainConfig(epochs=1, **options), dataset=source)


@pytest.mark.filterwarnings(f"ignore:.*{FROM_LOADER}")
def test_batches_that_change_are_named(tmp_path):
    test = TensorDataset(images(2, 20) / 255)
    for wrong, words in (
        (torch.rand(3, 5, 5), r"batch 0 .*images of \(5, 5\); expected \(4, 4\)"),
        (7 * torch.ones(3, 4, 4), "holds 7; expected"),
    ):
        trainer = aevb.Trainer(
            config(tmp_path, hidden_dims=(8,), latent_dim=Z),
            dataset={"train": DataLoader(TensorDataset(wrong), batch_size=3), "test": test},
        )
        with pytest.raises(ValueError, match=words):
            trainer.train_epoch()


def test_nothing_else_changed_for_the_command_line(tmp_path):
    assert (
        main(
            [
                "train",
                "--epochs",
                "1",
                "--no-progress",
                "--architecture",
                "conv",
                "--channels",
                "4",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )


@pytest.mark.filterwarnings(f"ignore:.*{FROM_LOADER}")
@pytest.mark.parametrize("layout", ["one channel", "channels last", "flat", "labels"])
def test_a_loader_gives_images_as_people_have_them(layout, tmp_path):
    x = images(1, 40)
    other = {"one channel": x[:, None], "channels last": x[..., None].expand(-1, -1, -1, 3), "flat": x.flatten(1)}
    x = other.get(layout, x)
    source = [(a, "ab"[i % 2]) if layout == "labels" else (a,) for i, a in enumerate(x)]
    parts = {"train": DataLoader(source, batch_size=20, shuffle=True), "test": Stream(x[:10])}
    trainer = aevb.Trainer(config(tmp_path, hidden_dims=(8,), latent_dim=Z), dataset=parts)
    trainer.train_epoch()
    assert trainer.step == 2
    assert trainer.dataset.train_labels is None


@pytest.mark.filterwarnings(f"ignore:.*{FROM_LOADER}")
def test_ranges_that_differ_are_named(tmp_path):
    x = images(1, 40)
    parts = {"train": DataLoader(TensorDataset(x / 255), batch_size=20), "test": TensorDataset(x)}
    trainer = aevb.Trainer(config(tmp_path, hidden_dims=(8,), latent_dim=Z), dataset=parts)
    with pytest.raises(ValueError, match=r"batch 0 .*lies in 0.*, and the test images in 0\.\.255; expected one"):
        trainer.train_epoch()


class Shrinking(IterableDataset):
    def __init__(self, *counts):
        self.counts, self.passes = counts, 0

    def __iter__(self):
        count = self.counts[min(self.passes, len(self.counts) - 1)]
        self.passes += 1
        return iter(images(1, 60)[:count])


@pytest.mark.filterwarnings(f"ignore:.*{FROM_LOADER}")
@pytest.mark.parametrize("counts", [(60, 40), (40, 60)])
def test_an_epoch_of_another_length_is_reported_whole(counts, tmp_path):
    parts = {"train": DataLoader(Shrinking(*counts), batch_size=20), "test": TensorDataset(images(2, 20))}
    trainer = aevb.Trainer(config(tmp_path, hidden_dims=(8,), latent_dim=Z), dataset=parts)
    seen = []
    trainer.train_epoch(lambda count, averages: seen.append(count))
    assert sum(seen) == counts[1]


@pytest.mark.filterwarnings(f"ignore:.*{FROM_LOADER}")
def test_data_that_are_used_up_are_named(tmp_path):
    parts = {"train": DataLoader(Shrinking(60, 60, 0), batch_size=20), "test": TensorDataset(images(2, 20))}
    trainer = aevb.Trainer(config(tmp_path, hidden_dims=(8,), latent_dim=Z), dataset=parts)
    trainer.train_epoch()
    with pytest.raises(ValueError, match="epoch 2 are none: the DataLoader gave no batch"):
        trainer.train_epoch()


def test_held_out_images_of_a_shuffled_loader_are_the_same_each_time():
    x = images(1, 40)
    found = [
        from_torch({"train": TensorDataset(x), "test": DataLoader(TensorDataset(x), batch_size=8, shuffle=True)})
        for _ in range(2)
    ]
    assert torch.equal(found[0].test_images, found[1].test_images)


@pytest.mark.parametrize("source", [images(1, 9), images(1, 9).numpy(), [1], {"train": images(1, 9)}, {}])
def test_what_is_no_data_set_is_named(source):
    with pytest.raises(TypeError, match=r"dataset is a \w+; expected an aevb\.data\.Dataset, a data set of torch"):
        aevb.Trainer(aevb.TrainConfig(epochs=1), dataset=source)


class Tripled(aevb.VAE):
    def encode(self, x, x_scale=None):
        mu, logvar = super().encode(x, x_scale)
        return 3 * mu, logvar


@pytest.mark.filterwarnings(f"ignore:.*{ONLY}")
@pytest.mark.parametrize(
    "make", [Mine, lambda: aevb.VAE(D, (8,), Z), lambda: Tripled(D, (8,), Z)], ids=["own", "VAE", "subclass"]
)
def test_a_given_model_takes_the_runs_weights(make, tmp_path):
    trainer = aevb.Trainer(config(tmp_path / "run", learning_rate=0.05), model=make(), dataset=data())
    trainer.fit()
    loaded = aevb.Trainer.load(tmp_path / "run", model=make(), dataset=data())
    assert loaded.evaluate() == trainer.evaluate()
    if type(trainer.model) is not aevb.VAE:
        for again in (aevb.Trainer.load, aevb.Trainer.resume):
            with pytest.raises(ValueError, match=r"is of a model that was given to the trainer, .*; expected model="):
                again(tmp_path / "run", dataset=data())
        with pytest.raises(ValueError, match="holds a model of your own"):
            aevb.load(tmp_path / "run")


@pytest.mark.filterwarnings(f"ignore:.*{ONLY}")
def test_dtypes_modes_and_wrappers(tmp_path):
    modes = []

    class Watched(Mine):
        def encode(self, x):
            modes.append(self.training)
            return self.layers.encode(x)

    mine = Watched().eval()
    trainer = aevb.Trainer(config(tmp_path / "a"), model=torch.compile(mine), dataset=data())
    assert trainer.model is mine
    trainer.train_epoch()
    assert all(modes)
    for parameter in mine.layers.encoder.parameters():
        parameter.requires_grad_(False)
    mine.log_prob = lambda x, z: torch.inf * Mine.log_prob(mine, x, z)
    with pytest.raises(aevb.NotFiniteError, match="log-likelihood is -inf"):
        aevb.Trainer(config(tmp_path / "b"), model=mine, dataset=data()).fit()


@pytest.mark.filterwarnings(f"ignore:.*{ONLY}")
def test_a_model_in_float64(tmp_path):
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(D, 2 * Z).double(), nn.Linear(Z, D).double()

        def encode(self, x):
            return self.encoder(x).chunk(2, -1)

        def log_prob(self, x, z):
            return aevb.reference.bernoulli_log_prob(self.decoder(z), x)

    assert aevb.Trainer(config(tmp_path), model=Double(), dataset=data()).fit()["test_elbo"] < 0


@pytest.mark.filterwarnings(f"ignore:.*{ONLY}")
@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"batch_size": D}, lambda t: t.unsqueeze(-1).expand(*t.shape, D)),
        ({"num_samples": 3}, lambda t: t.mean(0)),
        ({}, lambda t: t.sum()),
    ],
)
def test_a_log_prob_of_another_shape_is_refused(options, wrong, tmp_path):
    mine = Mine()
    mine.log_prob = lambda x, z: wrong(mine.layers.log_prob(x, z))
    trainer = aevb.Trainer(config(tmp_path, **options), model=mine, dataset=data(48))
    with pytest.raises(ValueError, match="log_prob gave shape"):
        trainer.train_epoch()


@pytest.mark.filterwarnings(f"ignore:.*{ONLY}")
def test_an_encoder_of_another_result_is_refused(tmp_path):
    mine = Mine()
    mine.encode = lambda x: mine.layers.encode(x)[0]
    with pytest.raises(TypeError, match=r"Mine\.encode gave a Tensor; expected \(mu, logvar\)"):
        aevb.Trainer(config(tmp_path), model=mine, dataset=data()).train_epoch()
