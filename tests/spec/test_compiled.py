"""NORM_PLUGIN_COMPILE=1: a route that says it is compiled is compiled, however many routes there are."""

import functools
import itertools
import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.native import rms
from norm_plugin.numerics import NUMERICS

WIDTHS = (8, 16, 24)


class Counter(CompileCounter):
    """A backend that counts its graphs: these tests are about requests to torch.compile, not about Inductor."""

    def __call__(self, graph, inputs, options=None):
        return super().__call__(graph, inputs)


@pytest.fixture
def counter(monkeypatch):
    torch._dynamo.reset()
    counter = Counter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    with settings.override(backend="native", compile=True, strict=True):
        yield counter


def test_every_route_is_compiled_for_itself(counter):
    every = list(itertools.product(WIDTHS, (1e-6, 0.5), NUMERICS))
    for width, eps, numerics in every:
        x = torch.randn(4, width)
        assert torch.equal(norm_plugin.rmsnorm(x, None, eps, numerics=numerics), rms.rmsnorm(x, None, eps, numerics))
    assert counter.frame_count == len(every)
    assert {route.backend for route in dispatch.routes()} == {"native, compiled"}


def test_the_number_of_rows_compiles_again_only_once(counter):
    for rows in (2, 3, 5, 7, 11, 64):
        norm_plugin.rmsnorm(torch.randn(rows, 32), None)
    assert counter.frame_count == 2


def test_the_mode_of_torch_is_still_checked(counter):
    x = torch.randn(4, 8)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(norm_plugin.rmsnorm(x, None), rms.rmsnorm(x, None))
    assert counter.frame_count == 2


def in_place(rows: int) -> tuple[Tensor, Tensor]:
    x, residual = torch.full((rows, 64), 3.0), torch.ones(rows, 64)
    x[:, 0] = 7
    norm_plugin.fused_add_rmsnorm(x, residual, torch.ones(64))
    return x, residual


def test_what_is_written_in_place_is_compiled_and_written(counter):
    for rows in (1, 6, 9):
        with settings.override(compile=False):
            expected = in_place(rows)
        assert all(map(torch.equal, in_place(rows), expected))
        assert dispatch.calls("fused_add_rmsnorm", "native, compiled") > 0
    assert counter.frame_count > 0


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_what_is_written_in_place():
    torch._dynamo.reset()
    expected = {rows: in_place(rows) for rows in (1, 6)}
    with settings.override(backend="native", compile=True, strict=True):
        for rows, tensors in expected.items():
            for actual, eager in zip(in_place(rows), tensors, strict=True):
                torch.testing.assert_close(actual, eager, rtol=2**-22, atol=0)
