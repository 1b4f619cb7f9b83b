"""`python -m benchmarks.report`: the speed tables and plots of this machine, and benchmarks/results/<machine>.json.

Every provider runs in a process of its own. All providers of a case take turns, a short burst each, so that a machine
that drifts does so for all of them; a round is one burst of each. A ratio is that of the medians over all calls; its
range holds the middle half of the rounds' own ratios.

PyTorch's CPU tensors come from malloc, which gives large ones back to the system and pays for each page again; aevb
keeps its results' memory. So the large cases are measured a second time with a malloc that keeps memory too (glibc).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import cases, plots, steps, tables
from .measure import (
    GIVING_BACK,
    KEEPING,
    RESULTS,
    Json,
    Process,
    WorkerError,
    copies,
    describe,
    has_jax,
    peak_flops,
    providers,
    quartiles,
    race,
)
from .training import learn

README = Path(__file__).parent.parent / "README.md"
LARGE = 2**20  # elements of an input
MINUTES = 2e7  # elements from which on checks and peers take that long


def op(name: str, ways: Mapping[str, str] | None = None) -> Callable[[Process], Json]:
    """Builds an op, each provider in the fastest of its ways, or in that of `ways`."""
    return lambda worker: worker.ask("op", name=name, way=(ways or {}).get(worker.provider))


def peak_memory(name: str, found: Json) -> None:
    """Adds the bytes at the peak of a call to each provider's, whose way is known."""
    for provider, about in found["providers"].items():
        with Process(provider, GIVING_BACK) as worker:
            worker.ask("op", name=name, way=about["settings"])
            about["peak_bytes"] = worker.ask("memory")["bytes"]


def measured_op(work: cases.Work, seconds: float) -> Json:
    found = race(providers(), op(work.name), seconds)
    about = {"target": work.target, "elements": work.elements, "traffic": work.traffic}
    with Process("aevb") as worker:
        worker.ask("op", name=work.name)
        about["instructions"] = worker.ask("instructions")["instructions"]
    if work.elements >= LARGE:
        peak_memory(work.name, found)
    return about | found


def measured_step(work: steps.StepWork, data: str, seconds: float) -> Json:
    peers = [name for name in work.peers if name != "jax" or has_jax()]
    found = race(["aevb", *peers], lambda worker: worker.ask("step", name=work.name, data=data), seconds)
    learned = {name: about["learned"] for name, about in found["providers"].items()}
    if max(learned.values()) > 1.03 * min(learned.values()):
        raise AssertionError(f"{work.name}: after {steps.LEARNED} steps the losses are {learned}")
    return {"targets": dict(work.targets), "flops": work.flops, **found}


class Run:
    """Results, and the file that has them after each part."""

    def __init__(self, file: Path | None, found: Json, quick: bool):
        self.file, self.found = file, found
        self.seconds, self.copied = (0.3, 2**24) if quick else (3.0, 2**26)
        self.quick = quick

    def each(self, part: str, work: Sequence, measure: Callable[..., Json]) -> None:
        """measure(work, seconds) of each, as results[part][name]. What a provider cannot do is named and left out."""
        self.found[part] = {}
        bandwidth = copies(self.copied)
        for one in work:
            print(f"{part}: {one.name} ...", flush=True)
            try:
                self.found[part][one.name] = measure(one, self.seconds)
            except WorkerError as error:
                print(f"  left out: {error}")
            bandwidth += copies(self.copied)
            self.save()
        about = {"date": self.found["date"], "load": self.found["load"]}
        self.found.setdefault("measured", {})[part] = about
        self.found.setdefault("copy_bytes_per_second", {})[part] = quartiles(bandwidth)
        self.save()

    def save(self) -> None:
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.found, indent=1) + "\n")

    def ops(self) -> None:
        self.each("ops", cases.WORK, measured_op)
        large = [work for work in cases.WORK if work.elements >= LARGE]
        self.each("ops_keeping_memory", large, lambda work, s: race(providers(), op(work.name), s, KEEPING))

    def sweep(self) -> None:
        before: Json = {}

        def swept(work: cases.Work, seconds: float) -> Json:
            nonlocal before
            about = {"elements": work.elements, "traffic": work.traffic}
            if work.elements < MINUTES:
                before = race(providers(), op(work.name), seconds / 4)
                return about | before
            # The fastest peer of the size before, in its way: trying all would take a quarter of an hour.
            names = ("aevb", before["fastest_peer"])
            ways = {name: before["providers"][name]["settings"] for name in names}
            return about | race(names, op(work.name, ways), seconds / 4)

        self.each("sweep", cases.sweep()[: 4 if self.quick else None], swept)

    def steps(self, data: str) -> None:
        self.found["peak_flops"] = peak_flops()
        work = [work for work in steps.STEPS if not (self.quick and work.bf16)]
        self.each("steps", work, lambda work, s: measured_step(work, data, s))

    def training(self, data: str) -> None:
        print("training: from a cold start ...", flush=True)
        self.found["training"] = learn(data, runs=1 if self.quick else 3, epochs=1 if self.quick else 20)
        self.save()


PARTS = ("ops", "sweep", "steps", "training")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Measures aevb against its peers.")
    parser.add_argument("--data", metavar="DIR", help="a folder with MNIST's four IDX files: for steps and training")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="measure these parts; the rest stays as it was")
    parser.add_argument("--output", type=Path, help="folder of the JSON and the plots (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="a short look; writes nothing unless --output is given")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: this JSON's tables and plots")
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md and the plots into docs/")
    options = parser.parse_args(arguments)
    wanted = options.only or (PARTS if options.data else PARTS[:2])
    if {"steps", "training"} & {*wanted} and not (options.data or options.table):
        parser.error("steps and training need MNIST: --data with its folder")

    if options.table:
        file, found = options.table, json.loads(options.table.read_text())
    else:
        found = describe()
        file = (options.output or RESULTS) / f"{found['machine']}.json" if options.output or not options.quick else None
        if found["load"] > 0.5:
            print(f"The load is {found['load']:.1f}: other work is running, and the figures will not be worth keeping.")
        before = json.loads(file.read_text()) if file and file.exists() else {}
        run = Run(file, {**before, **found, "unit": "seconds"}, options.quick)
        for part in wanted:
            getattr(run, part)(*([options.data] if part in ("steps", "training") else []))
        found = run.found
    print(f"\n{tables.all_of(found)}")
    if options.readme:
        README.write_text(tables.put_into(README.read_text(), found))
        written = [README, *plots.draw(found, README.parent / "docs", "")]
    else:
        written = plots.draw(found, file.parent, f"{found['machine']}-") if file else []
    if file:
        print(f"\nwritten: {', '.join(map(str, [file, *written]))}")


if __name__ == "__main__":
    main()
