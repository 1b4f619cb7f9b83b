"""The goals, and the results as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..measure import Json, duration
from .work import TARGET_SIZE, M, Work

LIKELIHOODS = (
    ("gaussian_kl", None),
    ("bernoulli_log_prob", "float32"),
    ("gaussian_log_prob, fixed", "float32"),
    ("gaussian_log_prob, learned", "float32"),
)


def work_of(result: Json) -> Work:
    return Work(*(result[key] for key in ("op", "dtype", "targets", "rows", "width")))


def at_target_size(results: Json, op: str, dtype: str, targets: str | None) -> Json:
    """An op's result at TARGET_SIZE; of a dry run the largest there is."""
    found = [r for r in results["ops"] if (r["op"], r["dtype"], r["targets"]) == (op, dtype, targets)]
    return min(found, key=lambda r: abs(r["rows"] * r["width"] - TARGET_SIZE), default={"directions": {}})


def fastest(times: Json, kind: str) -> str | None:
    """The fastest of the providers whose names begin so."""
    return min((n for n in times if n.startswith(kind)), key=lambda n: times[n]["median"], default=None)


def ratio(times: Json, kind: str, ours: str = "aevb") -> float | None:
    """How many times as long the fastest of a kind takes as ours."""
    peer = fastest(times, kind)
    return times[peer]["median"] / times[ours]["median"] if peer and ours in times else None


def verdicts(results: Json) -> list[Json]:
    """Each goal: what it is of, what was wanted, what was measured (None: nothing), and whether it is met."""
    found: list[Json] = []

    def add(what: str, wanted: float, measured: float | None, unit: str = "x") -> None:
        met = measured is not None and measured >= wanted
        found.append({"target": what, "wanted": wanted, "measured": measured, "unit": unit, "met": met})

    for op, targets in LIKELIHOODS:
        directions = at_target_size(results, op, "float32", targets)["directions"]
        for direction in ("forward", "backward"):
            add(f"{op} float32, {direction}: of the copy", 0.9, directions.get(direction, {}).get("of_copy"), "")
    loss = at_target_size(results, "FusedELBO", "float32", "float32").get("peers", {})
    for peer, wanted in (("eager", 5.0), ("compile", 1.4), ("triton", 0.95)):
        add(f"FusedELBO float32, forward and backward: against {peer}", wanted, ratio(loss, peer))
    for batch in (100, 1000, 4096):
        times: Json = next((s["providers"] for s in results["steps"] if s["batch"] == batch and not s["tf32"]), {})
        for peer, wanted in (("eager", 3.0), ("compile, reduce-overhead", 1.5), ("jax", 1.0)):
            times_of = {n: t for n, t in times.items() if n != "eager, captured"}
            add(
                f"a step from the data set, batch {batch}: against {peer}",
                wanted,
                ratio(times_of, peer, "aevb, trainer"),
            )
    for small in results["small"]:
        for peer in ("eager", "compile"):
            what = f"{small['op']} {small['rows']}x{small['width']} from Python: against {peer}"
            add(what, 1.0, ratio(small["providers"], peer))
    return found


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["", f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def table(results: Json) -> str:
    """The results as Markdown, in short."""
    lines = [f"### {results.get('gpu', 'A dry run on the CPU: no figure here means anything')}", ""]
    if copy := results.get("copy_bytes_per_second"):
        lines += [f"A copy moves {copy['median'] / 1e9:.0f} GB/s ({copy['q1'] / 1e9:.0f} - {copy['q3'] / 1e9:.0f})."]
    lines += [f"torch {results['torch']}; kernels {results['kernels']}; {results['date']}; {results['seconds']:.0f} s."]
    lines += [f"Skipped: {text}" for text in results["skipped"][:5]]
    lines += [f"... and {more} more" for more in [len(results["skipped"]) - 5] if more > 0]
    lines += [f"WRONG: {text}" for text in results["wrong"]]
    lines += markdown(["of the copy bandwidth", "", *(_size(s) for s in _sizes(results))], _fractions(results))
    lines += markdown(["forward + backward, 64M", "", "median", "aevb is faster by"], _races(results["ops"], "peers"))
    lines += markdown(["from Python, forward + backward", "", "", ""], _races(results["small"], "providers"))
    lines += markdown(["training step", "", "", ""], _races(results["steps"], "providers", "aevb, trainer"))
    if commands := results.get("commands"):
        rows = []
        for name, found in commands["providers"].items():
            seconds = f"{found['seconds']['median']:.1f} s" if found["seconds"] else ""
            rows.append([name, seconds, f"{found['reached']} of {len(found['runs'])} runs"])
        lines += markdown([f"from the command to {commands['target_elbo']} nats of MNIST", "", ""], rows)
    for name, profile in results["profiles"].items():
        if profile:
            rows = [
                [row["kernel"][:90], f"{row['a step']:.1f}", f"{row['us a step']:.1f}"]
                for row in profile["kernels"][:40]
            ]
            lines += markdown([f"{name}: {profile['us']} us", f"{profile['launches']:.0f} launches", "us"], rows)
    goals = []
    for v in verdicts(results):
        form = "{:.2f}x" if v["unit"] else "{:.0%}"
        measured = "not measured" if v["measured"] is None else form.format(v["measured"])
        verdict = "" if v["measured"] is None else "reached" if v["met"] else "missed"
        goals.append([v["target"], form.format(v["wanted"]), measured, verdict])
    return "\n".join([*lines, *markdown(["goal", "wanted", "measured", ""], goals)])


def _races(results: list[Json], key: str, ours: str = "aevb") -> list[list[str]]:
    rows = []
    for result in results:
        times = result.get(key, {})
        what = f"batch {result['batch']}{', tf32' if result['tf32'] else ''}" if "batch" in result else None
        what = what or f"{result['op']} {result.get('dtype', '')} {result['rows']}x{result['width']}"
        for name in sorted(times, key=lambda n: times[n]["median"]):
            t = times[name]
            faster = f"{t['median'] / times[ours]['median']:.2f}x" if ours in times else ""
            rows.append([what, name, f"{duration(t['median'])} ({duration(t['q1'])} - {duration(t['q3'])})", faster])
    return rows


def _sizes(results: Json) -> list[int]:
    """Powers of two, which the elements, being whole rows, only nearly are."""
    return sorted({_round(r["rows"] * r["width"]) for r in results["ops"]})


def _round(elements: int) -> int:
    return 2 ** round(math.log2(elements))


def _size(elements: int) -> str:
    return f"{elements / M:.3g}M"


def _fractions(results: Json) -> list[list[str]]:
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for r in results["ops"]:
        for direction, timing in r["directions"].items():
            at = cells.setdefault((work_of(r).name, direction), {})
            at[_round(r["rows"] * r["width"])] = f"{timing['of_copy']:.0%}"
    return [[*what, *(by_size.get(size, "") for size in _sizes(results))] for what, by_size in cells.items()]
