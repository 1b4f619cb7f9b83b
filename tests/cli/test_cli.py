"""The command line: what it prints, its exit status, and that an error is a sentence."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from typing import get_type_hints

import pytest

import aevb
from aevb.cli import app as cli
from aevb.cli import main
from aevb.cli.app import COMMANDS

SMALL = ["--epochs", "1", "--hidden-dims", "8", "--latent-dim", "2"]


def test_train_ends_with_the_test_elbo_and_the_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL]) == 0
    out, err = capsys.readouterr()
    *_, elbo_line, pictures_line = out.splitlines()
    metrics = json.loads((tmp_path / "runs/digits/metrics.jsonl").read_text())
    assert elbo_line.startswith(f"test ELBO {metrics['test_elbo']:.2f} nats per datapoint")
    for name in ("reconstructions", "samples", "latent"):
        assert f"runs/digits/{name}.png" in pictures_line
        assert (tmp_path / f"runs/digits/{name}.png").exists()
    assert "ELBO -" in err, "the progress bar shows the running ELBO"
    assert "epoch 1/1" in err


def test_a_run_that_stops_early_says_so(tmp_path, capsys):
    """With a step so large that the first epoch is the best."""
    out = str(tmp_path / "run")
    options = ["--validation", "0.1", "--patience", "2", "--learning-rate", "0.5", "--no-progress"]
    assert main(["train", *SMALL[2:], "--epochs", "30", *options, "--out", out]) == 0
    text = capsys.readouterr().out
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert done < 30
    assert f"stopped   after epoch {done}: best.safetensors is the model of epoch {done - 2}, the best" in text
    assert main(["resume", out, "--no-progress"]) == 0
    assert f"stopped   after epoch {done}" in capsys.readouterr().out


def test_no_progress(tmp_path, capsys):
    assert main(["train", *SMALL, "--no-progress", "--out", str(tmp_path / "run")]) == 0
    assert "step" not in capsys.readouterr().err


def error_of(args, capsys):
    assert main(args) == 1
    out, err = capsys.readouterr()
    assert out == "" or (out.startswith("data  ") and out.count("\n") == 1)
    assert err.count("\n") == 1
    assert err.startswith("aevb: ")
    return err


def test_errors_are_a_sentence(tmp_path, capsys):
    assert "there is no data at" in error_of(["train", "--data", str(tmp_path / "none")], capsys)
    (tmp_path / "images").write_bytes(b"\0\0\x08\x03\0\0")
    assert "images is truncated within its header" in error_of(["train", "--data", str(tmp_path / "images")], capsys)
    assert "images: File exists" in error_of(["train", *SMALL, "--out", str(tmp_path / "images")], capsys)
    (tmp_path / "config.json").write_text("{}")
    assert "already holds a run" in error_of(["train", *SMALL, "--out", str(tmp_path)], capsys)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_bad_value_is_refused(capsys):
    assert "epochs is 0; expected at least 1" in error_of(["train", "--epochs", "0"], capsys)


def test_an_unexpected_error_is_named(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("aevb.cli.app.Trainer", fail)
    assert error_of(["train"], capsys) == "aevb: RuntimeError: first line\n"


def test_a_wrong_command_line_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--epochs", "many"])
    assert stop.value.code == 2


def test_help(capsys):
    for args, words in [(["--help"], ["train", "info"]), (["train", "--help"], ["--binarize", "Example: aevb train"])]:
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_every_commands_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"Example: aevb {command}" in capsys.readouterr().out


def test_evaluate_prints_a_table_and_writes_json(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *SMALL, "--no-progress", "--out", str(run)]) == 0
    metrics = json.loads((run / "metrics.jsonl").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(run), "--num-samples", "50"]) == 0
    out, err = capsys.readouterr()
    found = json.loads((run / "evaluation.json").read_text())
    assert found["elbo"] == metrics["test_elbo"]
    assert found["images"] == 297
    assert found["num_samples"] == 50
    assert found["log_marginal_likelihood"] > found["elbo"]
    assert found["mutual_information"] + found["aggregate_kl"] == pytest.approx(found["mean_kl"])
    assert sum(found["kl_per_dimension"]) == pytest.approx(found["mean_kl"])
    assert f"log p(x) {found['log_marginal_likelihood']:21.2f}   +- " in out
    assert f"{found['active_units']} of 2 are active" in out
    assert str(run / "evaluation.json") in out
    assert "log p(x): 100%" in err

    before = (run / "model.safetensors").read_bytes()
    assert main(["evaluate", str(run), "--num-samples", "3", "--images", "9", "--no-progress"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["images"] == 9
    assert capsys.readouterr().err == ""
    assert (run / "model.safetensors").read_bytes() == before
    assert "num_samples is 0" in error_of(["evaluate", str(run), "--num-samples", "0"], capsys)
    assert "images is 0; expected at least 1" in error_of(["evaluate", str(run), "--images", "0"], capsys)
    assert json.loads((run / "evaluation.json").read_text())["images"] == 9
    assert "holds no run" in error_of(["evaluate", str(tmp_path / "none")], capsys)


def test_info(capsys):
    assert main(["info"]) == 0
    out, about = capsys.readouterr().out, aevb.build_info()
    for key in ("aevb", "torch", "python", "isa", "threads", "compiler", "cuda"):
        assert str(about[key]) in out
    assert set(about["isas"]) >= {"plain", about["isa"]}


def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    # A shell that runs this in the background hands down an ignored SIGINT; the handler is Python's own.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from aevb.cli import main; sys.exit(main())"
    run = tmp_path / "run"
    args = [sys.executable, "-c", code, "train", "--epochs", "1000000", "--hidden-dims", "8", "--out", str(run)]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out.startswith("data      digits: 1,500 training, 297 test images of 8x8, values 0..16")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("aevb: interrupted after ")
    assert str(run / "model.safetensors") in err.splitlines()[-1]
    assert aevb.VAE.load(run / "model.safetensors").hidden_dims == (8,)
    assert (run / "samples.png").exists()


def test_importing_aevb_stays_light():
    code = "import sys, aevb; print([m for m in ('matplotlib', 'tyro') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_python_m_aevb():
    done = subprocess.run([sys.executable, "-m", "aevb", "info"], capture_output=True, text=True, check=True)
    assert aevb.__version__ in done.stdout


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(capsys, flag):
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"aevb {aevb.__version__}\n"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["train", "--lr", "1e-3"], "--lr; expected --learning-rate"),
        (["train", "--lr=1e-3"], "--lr; expected --learning-rate"),
        (["train", "--z_dim", "3"], "--z-dim; expected --latent-dim"),
        (["train", "--gpu"], "--gpu; expected --device cuda"),
        (["embed", "run", "--output", "a.npz"], "--output; expected --out"),
    ],
)
def test_what_other_programs_call_an_option(capsys, args, expected):
    assert main(args) == 2
    assert capsys.readouterr().err == f"aevb: there is no option {expected}\n"


def groups(command):
    """The classes of a command's options."""
    return [hint for name, hint in get_type_hints(command).items() if name != "return"]


def test_no_option_is_one_that_other_programs_have():
    named = {field.name for command in cli.COMMANDS for group in groups(command) for field in dataclasses.fields(group)}
    named = {f"--{name.replace('_', '-')}" for name in named}
    assert not named & set(cli.OTHERS_NAMES)
    assert {name.split()[0] for name in cli.OTHERS_NAMES.values()} <= named
