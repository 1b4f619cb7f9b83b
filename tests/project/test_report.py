"""benchmarks/: the README shows what was measured, and every part of a table says what it is of."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-avx2-2-threads.json"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import tables

    return tables


def test_the_readme_shows_the_results(tables):
    readme = (ROOT / "README.md").read_text()
    results = json.loads(RESULTS.read_text())
    assert tables.put_into(readme, results) == readme
    results["steps"]["batch 100"]["providers"]["aevb"]["median"] *= 2
    assert tables.put_into(readme, results) != readme


def test_a_part_without_a_place_is_named(tables):
    with pytest.raises(ValueError, match="no place for the part 'ops'"):
        tables.put_into("<!-- about -->\n<!-- /about -->\n", json.loads(RESULTS.read_text()))


def test_a_target_is_met_or_missed(tables):
    assert tables.verdict(2.03, 2.0) == "2x: met"
    assert tables.verdict(1.99, 2.0) == "2x: missed"


def test_ratios_are_those_of_medians(tables):
    """Of every row: the peer's median over ours, as the table says."""
    results = json.loads(RESULTS.read_text())
    for part in ("ops", "ops_keeping_memory", "steps", "sweep"):
        for case in results[part].values():
            ours = case["providers"]["aevb"]["median"]
            for name, about in case["providers"].items():
                if name != "aevb":
                    assert about["ratio"]["median"] == pytest.approx(about["median"] / ours)
