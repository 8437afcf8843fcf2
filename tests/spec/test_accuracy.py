"""The table of `python -m norm_plugin.accuracy`: it has every op, and it finds a wrong one."""

import dataclasses

import pytest
import torch

import norm_plugin
from norm_plugin import settings
from norm_plugin.accuracy import cases, oracle, table

CPU = torch.device("cpu")


def case(op: str, numerics: str = "fp32") -> cases.Case:
    return next(c for c in cases.cases() if (c.op, c.numerics) == (op, numerics))


def test_every_public_function_is_compared():
    assert {c.op for c in cases.cases()} == set(norm_plugin.__all__)


@pytest.mark.parametrize("dtype", table.DTYPES)
def test_a_right_op_passes(dtype):
    with settings.override(backend="native"):
        row = table.row(case("rmsnorm"), dtype, CPU)
    assert row.passed
    assert (row.backend, row.dtype, row.numerics) == ("native", dtype, "fp32")
    assert row.mean <= row.error <= row.bound


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_another_rounding_fails(dtype):
    rounded_twice = dataclasses.replace(case("rmsnorm", "hf"), oracle=case("rmsnorm").oracle)
    row = table.row(rounded_twice, dtype, CPU)
    assert not row.passed
    assert row.error > 0.6


def test_another_eps_fails():
    def other_eps(i: cases.Inputs, nudge: float) -> cases.Outputs:
        return (oracle.layernorm(i.x, i.weight, i.bias, 2 * cases.EPS),)

    assert not table.row(dataclasses.replace(case("layernorm"), oracle=other_eps), "fp32", CPU).passed


def test_a_nan_fails():
    def spoiled(i: cases.Inputs) -> cases.Outputs:
        y = norm_plugin.rmsnorm(i.x, i.weight, cases.EPS)
        y[3, 5] = float("nan")
        return (y,)

    row = table.row(dataclasses.replace(case("rmsnorm"), call=spoiled), "bf16", CPU)
    assert not row.passed
    assert row.error == float("inf")
