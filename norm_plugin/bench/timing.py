"""Time of a call on the GPU, without its host: replayed CUDA graphs over rotating buffers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Time:
    """Microseconds a call: the median of the replays, and their interquartile range."""

    median: float
    spread: float


def graph_time(calls: Sequence[Call], replays: int = 25, launches: int = 64) -> Time:
    """The time of one call, the calls taken in turn, `launches` of them in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    for _ in range(3):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) * 1000 / launches for start, end in events)
    quarter = len(times) // 4
    return Time(statistics.median(times), times[-1 - quarter] - times[quarter])


def host_time(call: Call, calls: int = 300, repeats: int = 9) -> Time:
    """Host microseconds of one eager call. There are few enough of them between two waits that the GPU keeps up."""
    call()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - begin) * 1e6 / calls)
    torch.cuda.synchronize()
    found.sort()
    return Time(statistics.median(found), found[-2] - found[1])
