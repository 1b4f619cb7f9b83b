"""`python -m benchmarks.worker PROVIDER`: a provider's own process, which builds, checks and times what it is told.

Libraries' threads get in each other's way within a process: JAX's and PyTorch's slow each other down by a third. So
every provider has a process, which sleeps while another is timed. It reads a line of JSON a command from its standard
input and answers with one.
"""

from __future__ import annotations

import gc
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import cases, counters, steps


class Worker:
    call: Callable[[], object]

    def __init__(self, provider: str):
        self.provider = provider
        if provider == "jax":  # which only some machines have, and only this process loads
            from . import jax_peers, jax_steps  # noqa: F401  they add themselves to cases.py and steps.py
        torch.set_num_threads(cases.THREADS)

    def op(self, name: str, way: str | None = None) -> dict[str, Any]:
        """Builds an op of cases.py."""
        found = cases.Case(cases.find(name)).provider(self.provider, way)
        self.call = found.call
        return {"settings": found.settings, "tried": dict(found.tried)}

    def step(self, name: str, data: str) -> dict[str, Any]:
        """Builds a step of steps.py."""
        found, learned = steps.StepCase(steps.find(name), data).provider(self.provider)
        self.call = found.call
        return {"settings": found.settings, "tried": dict(found.tried), "learned": learned}

    def burst(self, seconds: float) -> dict[str, Any]:
        return {"times": cases.timed(self.call, seconds)}

    def memory(self) -> dict[str, Any]:
        """Bytes at the peak of a call beyond what was there before. The process was told to keep no freed memory."""
        self.call()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        before = status("VmRSS")
        self.call()
        return {"bytes": max(0, status("VmHWM") - before)}

    def instructions(self) -> dict[str, Any]:
        """Instructions of a call on one thread; None where the machine does not count them."""
        torch.set_num_threads(1)
        self.call()
        found = counters.instructions(self.call)
        torch.set_num_threads(cases.THREADS)
        return {"instructions": found}


def status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    # What the libraries print must not come between the answers.
    answers = io.TextIOWrapper(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
