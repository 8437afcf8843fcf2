"""Dependent launches: the bits are the same whatever the kernels before and after a norm do, in 100,000 rounds.

In a round a producer writes everything that the norm reads (rows, residual, gate, weight, bias, scale), the norm or its
gradient runs (the kernels of a gradient depend on each other too), and a consumer compares all of its memory with the
expected bits, and poisons it. Each kernel may start while the one before it still runs. Rounds run in graphs.

The grid: calls of every kernel, with rows that are read once or again, and launches that release the next kernel early
or late, or are lean x producers: one that releases the norm before it writes, the same with a kernel in between that
releases the norm before its own wait, and PyTorch's copies, which release nothing (in fewer rounds). Kernels are also
issued one by one. There the host is slower than the kernels, so the first producer is so late that launches queue up.

test_compile_only shows without a GPU that no kernel has a load or a store before its wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.ops import OPS
from tests.kernels.device import COMPILED, DEVICE, on_a_gpu
from tests.kernels.twins import TRITON
from tests.spec import samples

pytestmark = [
    pytest.mark.alone,
    on_a_gpu,
    pytest.mark.skipif(
        COMPILED and torch.cuda.get_device_capability() < (9, 0), reason="needs dependent launches: Hopper or later"
    ),
]

ROUNDS = 100_000
IN_A_GRAPH = 200  # rounds
VERSIONS = 8  # different values to write, so that those of another round are wrong
BLOCK = 1024  # words a program of the adversaries
GRAPH_DELAY, EAGER_DELAY = 3_000, 100_000  # ns: more than it takes to start the norm, and to issue a round

CALLS: list[tuple[str, samples.Arguments, tuple[int, ...]]] = [
    ("rmsnorm_out", {}, (64, 4096)),
    ("rmsnorm_out", {}, (64, 7168)),
    ("rmsnorm_out", {}, (4096, 64)),
    ("rmsnorm_out", {"gemma": True}, (2, 65536)),
    ("fused_add_rmsnorm", {}, (64, 4096)),
    ("fused_add_rmsnorm", {"numerics": "vllm_c"}, (300, 8192)),
    ("layernorm", {}, (64, 4096)),
    ("gated_norm", {"is_rms_norm": True, "bias": None}, (64, 4096)),
    ("gated_norm", {"norm_before_gate": False, "group_size": 512}, (64, 4096)),
    ("split_sums", {}, (64, 4096)),
    ("split_rmsnorm", {"numerics": "hf"}, (64, 4096)),
    ("fused_add_rmsnorm_quant", {}, (64, 7168)),
    ("rmsnorm_dynamic_quant", {"scale_ub": torch.tensor(1.5)}, (64, 4096)),
    ("rmsnorm_backward", {}, (64, 4096)),
    ("layernorm_backward", {}, (300, 8192)),
    ("gated_norm_backward", {"norm_before_gate": False, "group_size": 512}, (64, 4096)),
    ("rmsnorm_backward", {}, (4, 65536)),
]
LABELS = [samples.label(name, variant) + "-" + "x".join(map(str, shape)) for name, variant, shape in CALLS]


def words(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.int32)


def programs(t: Tensor) -> tuple[int]:
    return (-(-t.numel() // BLOCK),)


@dataclass
class Stage:
    """A call whose tensors lie in one buffer, the words that a producer writes there, and the words expected
    afterwards."""

    run: Callable[[], tuple[Tensor, ...]]
    state: Tensor
    written: list[Tensor]
    expected: list[tuple[Tensor, ...]]
    wrong: Tensor

    def check(self, version: int, returned: tuple[Tensor, ...]) -> None:
        from tests.kernels.pdl_adversaries import consume

        for found, expected in zip((self.state, *returned), self.expected[version], strict=True):
            consume[programs(found)](found, expected, self.wrong, found.numel(), BLOCK=BLOCK, launch_pdl=True)


def in_one_buffer(a: samples.Arguments) -> tuple[Tensor, samples.Arguments]:
    """(a buffer, the arguments with all of their tensors in it, each aligned for 16-byte accesses)."""
    places, end = {}, 0
    for name, value in a.items():
        if isinstance(value, Tensor):
            places[name] = end
            end += -(-value.numel() * value.itemsize // 128) * 128
    buffer = torch.zeros(end, dtype=torch.uint8, device=DEVICE)
    inside = dict(a)
    for name, place in places.items():
        t = a[name]
        inside[name] = buffer[place : place + t.numel() * t.itemsize].view(t.dtype).view(t.shape).copy_(t)
    return buffer.view(torch.int32), inside


def fill(a: samples.Arguments, version: int) -> None:
    """Puts other values into every tensor that a norm reads."""
    generator = torch.Generator(DEVICE).manual_seed(version)
    for name, value in a.items():
        if name == "sums":
            value.copy_(torch.rand(value.shape, generator=generator, device=DEVICE) * a["full_width"])
        elif isinstance(value, Tensor) and value.dim() == 0:
            value.copy_(0.02 * (version + 1))
        elif isinstance(value, Tensor) and value.itemsize > 1:
            value.copy_(torch.randn(value.shape, generator=generator, device=DEVICE))


def stage(name: str, variant: samples.Arguments, shape: tuple[int, ...]) -> Stage:
    """A call, and the result of each version of its arguments without dependent launches."""
    op = (OPS | BACKWARD_OPS)[name]
    made = TRITON.arguments(op, shape, **variant)
    if "grad" in made:
        made["grad"] = TRITON.make("normal", shape, torch.bfloat16)
    state, a = in_one_buffer(made)

    def run() -> tuple[Tensor, ...]:
        returned = dispatch.call(op, *a.values())
        returned = (returned,) if isinstance(returned, Tensor) else returned or ()
        return tuple(words(t) for t in returned)

    written, expected = [], []
    with settings.override(pdl=False):
        for version in range(VERSIONS):
            fill(a, version)
            written.append(state.clone())
            returned = run()
            expected.append((state.clone(), *(t.clone() for t in returned)))
    assert all(not torch.equal(one, other) for one, other in zip(expected[0], expected[1], strict=True)), (
        "the versions do not differ"
    )
    return Stage(run, state, written, expected, torch.zeros((), dtype=torch.int64, device=DEVICE))


# --- producers ----------------------------------------------------------------------------------------------------


def dependent(written: Tensor, state: Tensor, delay: int = GRAPH_DELAY) -> None:
    from tests.kernels.pdl_adversaries import produce

    produce[programs(state)](written, state, state.numel(), delay, BLOCK=BLOCK, launch_pdl=True)


def with_a_bystander(written: Tensor, state: Tensor) -> None:
    from tests.kernels.pdl_adversaries import bystand

    dependent(written, state)
    bystand[(1,)](BLOCK=BLOCK, launch_pdl=True)


def ordinary(written: Tensor, state: Tensor) -> None:
    """An elementwise kernel, which is no memory copy."""
    torch.bitwise_or(written, 0, out=state)


def memory_copy(written: Tensor, state: Tensor) -> None:
    state.copy_(written)


PRODUCERS = [(dependent, ROUNDS), (with_a_bystander, ROUNDS // 5), (ordinary, ROUNDS // 5), (memory_copy, ROUNDS // 5)]


# --- rounds -------------------------------------------------------------------------------------------------------


def rounds_in_graphs(it: Stage, producer: Callable[[Tensor, Tensor], None], rounds: int) -> int:
    """The number of wrong words of so many rounds, replayed."""

    def several(count: int) -> None:
        for i in range(count):
            producer(it.written[i % VERSIONS], it.state)
            it.check(i % VERSIONS, it.run())

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        several(2)
    torch.cuda.synchronize()
    it.wrong.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        several(IN_A_GRAPH)
    for _ in range(rounds // IN_A_GRAPH):
        graph.replay()
    return int(it.wrong)


def rounds_eagerly(it: Stage, rounds: int) -> int:
    for i in range(rounds):
        dependent(it.written[i % VERSIONS], it.state, EAGER_DELAY)
        it.check(i % VERSIONS, it.run())
    return int(it.wrong)


@pytest.mark.parametrize(("producer", "rounds"), PRODUCERS)
@pytest.mark.parametrize(("name", "variant", "shape"), CALLS, ids=LABELS)
def test_rounds_in_graphs(
    name: str,
    variant: samples.Arguments,
    shape: tuple[int, ...],
    producer: Callable[[Tensor, Tensor], None],
    rounds: int,
) -> None:
    with settings.override(pdl=True):
        assert rounds_in_graphs(stage(name, variant, shape), producer, rounds) == 0


@pytest.mark.parametrize(("place", "rounds"), [(4, ROUNDS), (0, ROUNDS // 5)], ids=[LABELS[4], LABELS[0]])
def test_rounds_issued_one_by_one(place: int, rounds: int) -> None:
    with settings.override(pdl=True):
        it = stage(*CALLS[place])
        before = dispatch.calls(CALLS[place][0], "triton")
        assert rounds_eagerly(it, rounds) == 0
        assert dispatch.calls(CALLS[place][0], "triton") == before + rounds


@pytest.mark.parametrize("in_graphs", [True, False], ids=["in graphs", "one by one"])
def test_a_kernel_that_reads_too_early_is_found(in_graphs: bool) -> None:
    """A copy that reads before it waits stands in for the norm: most of its rounds are wrong."""
    from tests.kernels.pdl_adversaries import hasty_copy

    read = torch.zeros(64 * 2048, dtype=torch.int32, device=DEVICE)
    out = torch.zeros_like(read)
    written = [torch.full_like(read, version) for version in range(VERSIONS)]

    def run() -> tuple[Tensor, ...]:
        hasty_copy[programs(read)](read, out, read.numel(), BLOCK=BLOCK, launch_pdl=True)
        return (out,)

    it = Stage(run, read, written, [(w, w) for w in written], torch.zeros((), dtype=torch.int64, device=DEVICE))
    rounds = 10 * IN_A_GRAPH
    wrong = rounds_in_graphs(it, dependent, rounds) if in_graphs else rounds_eagerly(it, rounds)
    assert wrong > rounds * read.numel() // 2


@pytest.mark.parametrize("width", [4096, 8192])
def test_a_norm_whose_output_is_the_weight_of_the_next(width: int) -> None:
    """Sixteen norms in a row: each releases the next before it writes the weight that the next one reads."""
    rows, first = (torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16) for n in (64, 1))
    outs = torch.zeros(16, *rows.shape, device=DEVICE, dtype=rows.dtype)

    def chain() -> Tensor:
        weight = first[0]
        for i, out in enumerate(outs):
            norm_plugin.rmsnorm(rows, weight, out=out)
            weight = out[7 * i % 64]
        return outs

    with settings.override(pdl=False):
        expected = chain().clone()
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    with settings.override(pdl=True):
        for _ in range(3):
            chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        for _ in range(ROUNDS // len(outs)):
            outs.zero_()
            graph.replay()
            wrong += (outs != expected).sum()
    assert int(wrong) == 0
