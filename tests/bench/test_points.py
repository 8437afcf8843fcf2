"""What is measured: the sizes, the peers, and those that are left out."""

from __future__ import annotations

import pytest
import torch

from norm_plugin.bench import grid, peers
from norm_plugin.bench.buffers import Buffers, Function
from norm_plugin.bench.formulas import FORMULAS
from norm_plugin.bench.grid import Point
from norm_plugin.bench.libraries import LIBRARIES
from norm_plugin.bench.our_calls import OURS
from norm_plugin.bench.peers import OUR_NAME, Peer

PARTS = [part for part in grid.PARTS if part != "host"]
BACKWARD = [op for op in OURS if op.endswith("_backward")]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


def point_of(op: str) -> Point:
    return Point("small", op, 5, 512, 256 if op == "groups" else None, grid.QKV_HEADS[0] if op == "qk" else 1)


@pytest.mark.parametrize("part", PARTS)
def test_points_are_distinct_and_known(part: str) -> None:
    every = grid.points(part)
    assert len({point.label for point in every}) == len(every)
    assert {point.op for point in every} <= set(OURS)
    quick = grid.points(part, quick=True)
    assert {point.op for point in quick} == {point.op for point in every}
    assert set(quick) <= set(every)
    assert len(quick) <= 2 * len({point.op for point in every})


def test_large_sizes_are_large() -> None:
    assert all(point.rows * point.width * grid.ITEMSIZE >= 64 << 20 for point in grid.points("large"))


def test_cold_buffers_are_larger_than_the_cache() -> None:
    run = pytest.importorskip("norm_plugin.bench.run", reason="Triton is not installed")
    for point in grid.points("cold"):
        assert run.buffer_count(point) * point.traffic >= grid.COLD_BYTES
        assert run.buffer_count(point) <= grid.MOST_COLD_BUFFERS


def test_a_run_that_is_cut_short_has_some_of_each_op() -> None:
    run = pytest.importorskip("norm_plugin.bench.run", reason="Triton is not installed")
    first = run.by_turns(grid.points("decode"))[: len(grid.DECODE_OPS)]
    assert {group[0].op for group in first} == set(grid.DECODE_OPS)


@pytest.mark.parametrize("op", FORMULAS)
def test_the_plain_formula_is_what_we_compute(op: str) -> None:
    buffers = Buffers(point_of(op), "cpu")
    theirs, ours = (peers.values(op, buffers.call(f)()) for f in (FORMULAS[op], OURS[op]))
    assert peers.apart(theirs, ours) < (peers.CLOSE_FP8 if "quant" in op else peers.CLOSE)


def test_every_op_has_a_peer_but_for_torch_compile() -> None:
    for op in FORMULAS:
        assert [library for library in LIBRARIES if op in library.ops and library.name != "torch.compile"], op


def raising(x: torch.Tensor) -> None:
    raise RuntimeError("no such kernel\nand a long story")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x * 2, "computes something else"),
        (lambda x: x * float("nan"), "computes something else"),
        (raising, "RuntimeError: no such kernel"),
        (lambda x: x @ x, "RuntimeError"),
    ],
)
def test_who_computes_something_else_is_left_out(function: Function, why: str) -> None:
    point = point_of("rms")
    good = Peer("good", OURS["rms"])
    taken, left = peers.checked(
        point, [Peer(OUR_NAME, OURS["rms"]), Peer("bad", function), good], Buffers(point, "cpu")
    )
    assert [peer.name for peer in taken] == [OUR_NAME, "good"]
    assert [(entry.peer, entry.where) for entry in left] == [("bad", point.label)]
    assert left[0].reason.startswith(why)
    assert "\n" not in left[0].reason


def test_a_library_that_is_not_there_is_named() -> None:
    missing = peers.unavailable({"gated"})
    assert {entry.peer for entry in missing} <= {library.name for library in LIBRARIES if "gated" in library.ops}
    assert all(entry.reason for entry in missing)


def test_a_gpu_that_is_gone_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("synchronize", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, gone)
    with pytest.raises(peers.Broken, match="illegal memory access"):
        peers.attempt(lambda: None)


@pytest.mark.parametrize("op", BACKWARD)
def test_the_gradients_are_those_of_the_plain_formula(op: str) -> None:
    """All outputs and gradients. A peer that lacks one, or has a gradient twice as large, would be left out."""
    buffers = Buffers(point_of(op), "cpu")
    plain = FORMULAS[op.removesuffix("_backward")]
    ours, theirs = (peers.values(op, Peer("", f).call(buffers)()) for f in (OURS[op], plain))
    assert peers.apart(theirs, ours) < 0.01
    assert peers.apart(theirs[:-1], ours) > peers.CLOSE
    assert peers.apart([*theirs[:-1], 2 * theirs[-1]], ours) > peers.CLOSE
