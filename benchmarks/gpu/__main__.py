"""Measures aevb on a GPU: see this package's docstring."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from aevb import _C

from ..measure import RESULTS
from .session import Session
from .table import table, verdicts
from .work import SMALL, M, alone, with_peers


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where something failed or gave wrong results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measures aevb on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--quick", action="store_true", help="a short look, at small sizes")
    parser.add_argument("--seconds", type=float, default=230.0, help="what would end later is skipped")
    parser.add_argument("--data", metavar="DIR", help="MNIST, for the training steps (default: random images)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON (default: benchmarks/results)")
    parser.add_argument("--commands", type=int, metavar="RUNS", help="measure only: from a command to a trained model")
    parser.add_argument("--compile", metavar="I/N", help="measure nothing: fill the compilers' caches, a share of N")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: print this JSON's table")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return 0
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --device cpu --quick is a dry run without one")
    if cuda and not _C.build_info()["cuda"].startswith("built"):
        parser.error(f"aevb's CUDA kernels are {_C.build_info()['cuda']}")
    folder = options.out or (RESULTS if cuda and not options.quick else None)
    session = Session(options.device, options.seconds, options.quick, None, options.data)
    torch.manual_seed(0)
    if options.compile:
        fill_caches(session, options.compile)
        return 0
    session.file = folder / f"{session.found['machine']}.json" if folder else None
    if options.commands and session.file and session.file.exists():
        session.found = json.loads(session.file.read_text())
        session.seconds_before = session.found["seconds"]
    try:
        if options.commands:
            session.attempt("commands", functools.partial(session.commands, options.commands))
        else:
            everything(session)
    except KeyboardInterrupt:
        session.found["skipped"].append("the rest: interrupted")
    session.found["targets"] = verdicts(session.found)
    session.save()
    print(f"\n{table(session.found)}")
    if session.file:
        print(f"\nwritten to {session.file}")
    return int(bool(session.found["wrong"]))


Part = tuple[str, Callable[[], None]]


def with_compilers(session: Session) -> list[Part]:
    """What has peers that are compiled, the most wanted first."""
    quick, part = session.quick, functools.partial
    compared = [(work.name, part(session.op, work, peers=True)) for work in with_peers(quick)]
    steps: list[Part] = [
        (f"training step, batch {batch}", part(session.training_step, batch))
        for batch in ((100,) if quick else (100, 1000, 4096))
    ]
    small = [
        (f"{work.name}, {work.rows} x {work.width}, from Python", part(session.small, work))
        for work in (SMALL[:2] if quick else SMALL)
    ]
    return [*compared[:1], *steps, *small, *compared[1:]]


def everything(session: Session) -> None:
    session.attempt("copy bandwidth", session.bandwidth)
    if "copy_bytes_per_second" not in session.found:
        return
    for what, part in with_compilers(session):
        session.attempt(what, part)
    for batch in () if session.quick else (1000, 4096):
        with_tf32 = functools.partial(session.training_step, batch, tf32=True)
        session.attempt(f"training step, batch {batch}, tf32", with_tf32)
    for work in alone(session.quick):
        session.attempt(f"{work.name}, {work.elements / M:.3g}M", functools.partial(session.op, work, peers=False))
    session.attempt("copy bandwidth", session.bandwidth)


def fill_caches(session: Session, share: str) -> None:
    """A share, such as "2/4", of what is compiled, which is then in the compilers' caches."""
    number, of = map(int, share.split("/"))
    session.seconds, session.rounds, session.filling_caches = 0.0, 1, True
    session.attempt("copy bandwidth", session.bandwidth)
    for what, part in with_compilers(session)[number - 1 :: of]:
        session.attempt(what, part)


if __name__ == "__main__":
    sys.exit(main())
