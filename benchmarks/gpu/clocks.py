"""Clocks: calls timed by the host, by CUDA events, and as a CUDA graph; providers by turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..measure import Json, quartiles

Call = Callable[[], Any]


class Series:
    """Calls that are timed together by the host's clock, a GPU idle before and after."""

    SAMPLE = 2e-3  # seconds that one timing takes at least

    def __init__(self, calls: Sequence[Call], wait: Call = lambda: None, quick: bool = False):
        self.calls, self.wait = len(calls), wait
        self.replay = self.prepare(calls)
        self.replay()
        self.repeats = 1 if quick else max(1, math.ceil(self.SAMPLE / max(self.elapsed(self.replay), 1e-9)))

    def prepare(self, calls: Sequence[Call]) -> Call:
        """Something that makes all the calls."""

        def replay() -> None:
            for call in calls:
                call()

        return replay

    def elapsed(self, work: Call) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def sample(self) -> float:
        """Seconds of one call."""

        def work() -> None:
            for _ in range(self.repeats):
                self.replay()

        return self.elapsed(work) / (self.repeats * self.calls)


class CudaSeries(Series):
    """The calls from Python, timed by events."""

    SAMPLE = 3e-4

    def elapsed(self, work: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class CapturedSeries(CudaSeries):
    """The calls in a CUDA graph."""

    def prepare(self, calls: Sequence[Call]) -> Call:
        self.graph, _ = captured(lambda: [call() for call in calls], lambda: [call() for call in calls[:3]])
        return self.graph.replay


def captured(work: Callable[[], Any], warm_up: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of `work`, and what that returned: its memory stays the graph's own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = work()
    return graph, found


def take_turns(series: dict[str, Series], seconds: float, at_least: int) -> Json:
    """Times all of them in rounds, the first in turn; {name: median, quartiles, rounds}."""
    samples: dict[str, list[float]] = {name: [] for name in series}
    until, rounds = time.perf_counter() + seconds * len(series), 0
    while rounds < at_least or (time.perf_counter() < until and rounds < 500):
        names = list(series)
        turn = rounds % max(len(names), 1)
        for name in (*names[turn:], *names[:turn]):
            samples[name].append(series[name].sample())
        rounds += 1
    return {name: {**quartiles(times), "rounds": rounds} for name, times in samples.items()}
