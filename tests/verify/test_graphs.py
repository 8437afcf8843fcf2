"""The report under CUDA graphs, where Python does not run at a replay: real ones, and a stand-in without a GPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.engines import call_counts, report_file

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A report that is wanted."""
    dispatch.reset()
    call_counts.reset()
    with settings.override(report=str(tmp_path), backend="auto"):
        yield tmp_path
        call_counts.reset()
    dispatch.reset()


class Graph:
    """What torch.cuda.CUDAGraph looks like to a hook."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def capture_begin(self, pool: object = None) -> None:
        self.done.append(f"begin {pool}")

    def capture_end(self) -> None:
        self.done.append("end")

    def replay(self) -> None:
        self.done.append("replay")


def test_what_a_graph_captures_is_counted_at_its_replays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    stock = dict(vars(Graph))
    weights = torch.rand(4), torch.rand(4)
    for weight in weights:
        call_counts.count("rmsnorm", weight, weight)
    graph = Graph()
    graph.capture_begin(pool="p")
    for weight in (*weights, weights[1]):
        call_counts.count("rmsnorm", weight, weight)
    graph.capture_end()
    assert call_counts.calls("rmsnorm") == 2, "what is captured has not run"
    for _ in range(10):
        graph.replay()
    assert graph.done == ["begin p", "end", *["replay"] * 10]
    (process,) = report_file.read(folder)
    assert [(row["calls"], row["eager"], row["replayed"]) for row in process["rows"]] == [(11, 1, 10), (21, 1, 20)]
    call_counts.reset()
    assert dict(vars(Graph)) == stock


@needs_gpu
def test_replays_are_counted_and_say_what_ran(folder: Path) -> None:
    weights = [torch.rand(4096, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)

    def model(x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            call_counts.count("rmsnorm", x, weight)
            x = norm_plugin.rmsnorm(x, weight)
        return x

    eager = model(x).clone()
    torch.cuda.synchronize()
    graphs = []
    for rows in (8, 4, 2):  # the same calls at several batch sizes, as engines capture them
        static = x[:rows].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(static)
        graphs.append((graph, out, rows))
    for graph, out, rows in graphs:
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, eager[:rows])
    (process,) = report_file.read(folder)
    assert [(row["calls"], row["eager"], row["replayed"]) for row in process["rows"]] == [(31, 1, 30)] * 3
    assert len(process["graphs"]) == 1, "the same calls are one entry"
    for row in process["rows"]:
        (how,) = row["implementations"]
        assert how["backend"] == "triton"
        assert "warps" in how["configuration"]
    assert json.loads(next(folder.glob("*.json")).read_text())["pid"]


@needs_gpu
def test_a_compiled_model_in_graphs_is_counted(folder: Path) -> None:
    """torch.compile's own graphs (mode reduce-overhead) are torch.cuda.CUDAGraphs too."""
    # a parameter, as in a model: of any other tensor torch.compile's graphs make a copy, which is a layer of its own
    weight = torch.nn.Parameter(torch.rand(1024, device="cuda", dtype=torch.bfloat16))

    @torch.library.custom_op("norm_plugin_test::counted", mutates_args=())
    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        call_counts.count("rmsnorm", x, weight)
        return norm_plugin.rmsnorm(x, weight)

    counted.register_fake(lambda x, weight: torch.empty_like(x))
    call_counts.count("rmsnorm", weight, weight)  # the report has begun before a graph is captured

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normed: torch.Tensor = counted(x * 2, self.weight)
            return normed + 1

    compiled = torch.compile(Model(), mode="reduce-overhead", fullgraph=True)
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(20):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(x)
    (process,) = report_file.read(folder)
    (row,) = process["rows"]
    assert row["calls"] >= 20
    assert row["replayed"] >= 10
