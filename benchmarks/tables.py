"""Results as Markdown: what the README shows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from .measure import Json, duration

COMPILED = ("compile", "tuned")
PEERS = {"eager": "eager", "compile": "torch.compile", "tuned": "tuned", "jax": "JAX"}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def ratio(found: Json, digits: int = 1) -> str:
    r = found["ratio"]
    return f"**{r['median']:.{digits}f}x** ({r['q1']:.{digits}f} - {r['q3']:.{digits}f})"


def time(providers: Mapping, names: Sequence[str]) -> str:
    """The least median of some providers."""
    times = [providers[name]["median"] for name in names if name in providers]
    return duration(min(times)) if times else ""


def verdict(reached: float, target: float | None) -> str:
    return "" if target is None else f"{target:g}x: {'met' if reached >= target else 'missed'}"


def limit(case: Json, bandwidth: float) -> str:
    """How close an op is to what bounds it: a copy's bytes a second, or the instructions it takes."""
    ours = case["providers"]["aevb"]
    if "peak_bytes" in ours:  # measured of the large ones, which caches do not hold
        return f"{case['traffic'] / ours['median'] / bandwidth:.0%} of a copy"
    if case.get("instructions"):
        return f"{case['instructions'] / case['elements']:.1f} instr."
    return ""


def memory(case: Json) -> str:
    found, peer = case["providers"], case["fastest_peer"]
    if "peak_bytes" not in found["aevb"]:
        return ""
    least = min(about["peak_bytes"] for name, about in found.items() if name != "aevb")
    return f"{found['aevb']['peak_bytes'] / 1e6:.0f} / {found[peer]['peak_bytes'] / 1e6:.0f} / {least / 1e6:.0f} MB"


def settings(cases: Mapping[str, Json]) -> str:
    """Which way of writing or compiling it was each peer's fastest, and how often."""
    said = []
    for peer, label in PEERS.items():
        ways = Counter(case["providers"][peer]["settings"] for case in cases.values() if peer in case["providers"])
        if ways:
            said.append(f"{label}: " + "; ".join(f"{way} ({count})" for way, count in ways.most_common()))
    return f"The peers' fastest ways, and in how many rows. {'. '.join(said)}."


def op_row(name: str, case: Json, bandwidth: float) -> list[str]:
    found, peer = case["providers"], case["fastest_peer"]
    times = [time(found, names) for names in (("aevb",), ("eager",), COMPILED, ("jax",))]
    against = verdict(found[peer]["ratio"]["median"], case.get("target"))
    return [name, *times, ratio(found[peer]), against, limit(case, bandwidth), memory(case)]


def ops(results: Json) -> str:
    bandwidth = results["copy_bytes_per_second"]["ops"]["median"]
    rows = [op_row(name, case, bandwidth) for name, case in results["ops"].items()]
    rows += [
        [f"{name}, malloc keeping memory", *op_row(name, case, bandwidth)[1:]]
        for name, case in results.get("ops_keeping_memory", {}).items()
    ]
    head = ["forward + backward", "aevb", "eager", "torch.compile", "JAX", "against the fastest", "target"]
    table = markdown([*head, "limit", "peak: aevb / fastest / leanest peer"], rows)
    return f"{table}\n\n{settings(results['ops'])}"


def step_row(name: str, case: Json, peak: float) -> list[str]:
    found = case["providers"]
    cells = [duration(found["aevb"]["median"])]
    for peer in ("eager", "compile", "jax"):
        cells.append(f"{duration(found[peer]['median'])}, {ratio(found[peer], 2)}" if peer in found else "")
    against = [
        f"{peer} {verdict(found[peer]['ratio']['median'], target)}"
        for peer, target in case["targets"].items()
        if peer in found
    ]
    if "aevb in float32" in found:
        against[0] += f" ({found['aevb in float32']['ratio']['median']:.2f}x)"
    return [name, *cells, "; ".join(against), f"{case['flops'] / peak / found['aevb']['median']:.0%}"]


def steps(results: Json) -> str:
    rows = [step_row(name, case, results["peak_flops"]) for name, case in results["steps"].items()]
    head = ["a training step, 784-500-20", "aevb", "eager", "torch.compile", "JAX", "targets"]
    table = markdown([*head, "its products at the peak / its time"], rows)
    return f"{table}\n\n{settings(results['steps'])}"


def cliffs(results: Json) -> str:
    """By op: the sizes, and the largest fall in elements a second from one size to the next."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name, case in results["sweep"].items():
        rate = case["elements"] / case["providers"]["aevb"]["median"]
        found.setdefault(name.partition(" ")[0], []).append((case["elements"], rate))
    lines = []
    for op, points in found.items():
        falls = [(b[1] / a[1], a[0], b[0]) for a, b in itertools.pairwise(points)]
        least, before, after = min(falls)
        said = f"speed falls most to {least:.0%}, from {before:.2g}" if least < 1 else f"speed grows from {before:.2g}"
        lines.append(f"{op}: {said} to {after:.2g} elements.")
    return "\n".join(lines)


def training(results: Json) -> str:
    found = results["training"]
    ours = found["providers"]["aevb train"]["seconds"]
    rows = []
    for name, about in found["providers"].items():
        seconds, runs, reached = about["seconds"], len(about["runs"]), about["reached"]
        cells = ["never", "", ""]
        if seconds:
            cells[0] = f"{seconds['median']:.1f} s ({seconds['q1']:.1f} - {seconds['q3']:.1f})"
            cells[0] += "" if reached == runs else f", {reached} of {runs} runs"
        if seconds and ours and seconds is not ours:
            times = seconds["median"] / ours["median"]
            cells[1:] = [f"{times:.2f}", verdict(times, found["targets"].get(name))]
        rows.append([name, *cells])
    title = f"MNIST, from the command to a test ELBO of {found['target_elbo']:g} nats"
    return markdown([title, "wall time (middle half of the runs)", "times aevb's", "target"], rows)


def about(results: Json) -> str:
    copy = max(found["median"] for found in results["copy_bytes_per_second"].values()) / 1e9
    jax = f", JAX {results['jax']}" if "jax" in results else ""
    peak = f", and the best product does {results['peak_flops'] / 1e9:.0f} GFLOP/s" if "peak_flops" in results else ""
    return (
        f"{results['cpu']}, {results['threads']} threads, {results['isa']}; torch {results['torch']}{jax}, compiler "
        f"{results['compiler']}; {results['date']}. Medians, float32, Python call included; a copy moves {copy:.1f} "
        f"GB/s{peak}."
    )


PARTS = {"ops": ops, "sweep": cliffs, "steps": steps, "training": training}


def parts_of(results: Json) -> dict[str, str]:
    return {name: make(results) for name, make in PARTS.items() if name in results}


def all_of(results: Json) -> str:
    return "\n\n".join([*parts_of(results).values(), about(results)])


def put_into(text: str, results: Json) -> str:
    """`text` with each part between its markers: <!-- ops --> ... <!-- /ops -->, and so on, and <!-- about -->."""
    for name, part in {**parts_of(results), "about": about(results)}.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (begin and end):
            raise ValueError(
                f"there is no place for the part {name!r}: a line <!-- {name} -->, and one <!-- /{name} -->"
            )
        text = f"{before}{begin}\n{part}\n\n{end}{after}"
    return text
