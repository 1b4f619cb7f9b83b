"""Commands as a user gives them, and what they answer."""

from typing import Any

import pytest

from aevb.cli import main


def ask(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """What a command prints that succeeds."""
    assert main([str(a) for a in args]) == 0
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """The one line that a command prints that fails."""
    assert main([str(a) for a in args]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err
