"""README's Python runs as it stands: each block alone, and one after the other."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def run(code, names):
    exec(compile(code, "README.md", "exec"), names)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_alone(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    run(BLOCKS[number], {"__name__": "readme"})


def test_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in BLOCKS:
        run(block, names)
    assert names["digits"].shape == (16, 64)


def test_they_were_found():
    assert len(BLOCKS) == TEXT.count("```python") > 5
