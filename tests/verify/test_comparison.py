"""The comparison: what is the same is said to be, what differs is measured, and chance is given what stock gives it."""

import math

import pytest

from norm_plugin.verify import verdict
from norm_plugin.verify.comparison import IDENTICAL, INSIDE, OUTSIDE, compare, judge, kl, logprob_deltas
from tests.verify.samples import answer, outcome, row


def test_the_same_answers_are_identical() -> None:
    difference = compare([answer([5, 6, 7])], [answer([5, 6, 7])])
    assert difference.identical
    assert (difference.max, difference.mean, difference.kl, difference.agreement, difference.diverged) == (
        0,
        0,
        0,
        1,
        0,
    )


def test_a_difference_of_a_logprob() -> None:
    difference = compare([answer([5, 6, 7])], [answer([5, 6, 7], shift=0.01)])
    assert not difference.identical
    assert difference.max == pytest.approx(0.01)
    assert difference.mean == pytest.approx(0.01 * 2 / 5)
    assert difference.diverged == 0
    assert 0 < difference.kl < 1e-4


def test_the_mean_is_of_the_positions_that_differ() -> None:
    same, other = answer([5, 6, 7], prompt=[1]), answer([5, 6, 7], shift=0.01, prompt=[2])
    stock = [same, answer([5, 6, 7], prompt=[2])]
    half, all_of_them = compare(stock, [same, other]), compare(stock, [answer([5, 6, 7], 0.01, [1]), other])
    assert half.mean == all_of_them.mean == pytest.approx(0.01 * 2 / 5)
    assert [prompt.mean for prompt in half.prompts] == [0, pytest.approx(0.01 * 2 / 5)]
    assert judge(half, all_of_them) == INSIDE


def test_nothing_is_compared_after_the_first_other_token() -> None:
    first, second = answer([5, 6, 7, 8]), answer([5, 60, 7, 8])
    (prompt,) = compare([first], [second]).prompts
    assert prompt.diverged_at == 1
    assert len(prompt.deltas) == 2
    assert prompt.deltas[0] == 0
    assert prompt.agreement == 0.5


def test_a_token_that_only_one_names_counts_as_the_least_it_can_be() -> None:
    deltas = logprob_deltas({"1": -1.0, "2": -2.0}, {"1": -1.0, "3": -1.5})
    assert sorted(deltas) == [0.0, 0.0, 0.5]
    assert sorted(logprob_deltas({"1": 0.0}, {"2": -3.0})) == [0.0, 3.0]


def test_kl_is_a_lower_bound() -> None:
    whole_p, whole_q = [0.5, 0.3, 0.15, 0.05], [0.4, 0.3, 0.1, 0.2]
    true = sum(p * math.log(p / q) for p, q in zip(whole_p, whole_q, strict=True))
    named = kl({"a": math.log(0.5), "b": math.log(0.3)}, {"a": math.log(0.4), "b": math.log(0.3)})
    assert 0 < named < true


def test_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        compare([answer([5], prompt=[1])], [answer([5], prompt=[2])])


def test_where_stock_is_the_same_twice_patched_has_to_be_too() -> None:
    stock, same = [answer([5, 6, 7])], [answer([5, 6, 7])]
    floor = compare(stock, same)
    assert judge(floor, compare(stock, same)) == IDENTICAL
    assert judge(floor, compare(stock, [answer([5, 6, 7], shift=1e-6)])) == OUTSIDE


def test_where_stock_differs_from_itself_patched_may_as_much() -> None:
    stock = [answer([5, 6, 7])]
    floor = compare(stock, [answer([5, 6, 7], shift=0.01)])
    assert judge(floor, compare(stock, [answer([5, 6, 7], shift=0.012)])) == INSIDE
    assert judge(floor, compare(stock, [answer([5, 6, 7], shift=0.03)])) == OUTSIDE
    assert judge(floor, compare(stock, [answer([5, 60, 7])])) == OUTSIDE


def ran(backend: str, dtype: str, shift: float, mode: str = "eager") -> verdict.Verdict:
    """Stock that is the same twice, and patched that is off by `shift`; the median of the largest logprobs is 3.6."""
    stock = [answer([5, 6, 7])]
    rows = [row("model.norm")]
    rows[0]["implementations"][0]["backend"] = backend
    patched = outcome([answer([5, 6, 7], shift=shift)], rows)
    patched.dtype, patched.mode, patched.flags = dtype, mode, {"NORM_PLUGIN": backend}
    return verdict.judged(outcome(stock), outcome(stock), patched)


@pytest.mark.parametrize(
    ("dtype", "step"),
    [("bfloat16", 2.0**-7 * 2), ("float16", 2.0**-10 * 2), ("float32", 2.0**-23 * 2 * math.sqrt(128))],
)
def test_where_sums_have_another_order_the_floor_has_the_rounding_of_the_dtype(dtype: str, step: float) -> None:
    assert ran("triton", dtype, step).step == pytest.approx(step)
    assert ran("triton", dtype, step).verdict == INSIDE
    assert ran("native", dtype, step, "compiled").verdict == INSIDE
    for shift in (2.1 * step, -2.1 * step):
        assert ran("triton", dtype, shift).verdict == OUTSIDE
    everywhere = compare([answer([5, 6])], [answer([5, 6])])
    everywhere.prompts[0].deltas = everywhere.prompts[0].means = [step, step]
    assert judge(compare([answer([5])], [answer([5])]), everywhere, step) == OUTSIDE, "all tokens moved by a step"


def test_where_sums_have_the_same_order_nothing_is_given_to_rounding() -> None:
    for dtype in ("bfloat16", "float32"):
        assert ran("native", dtype, 1e-7).verdict == OUTSIDE


def test_a_fault_of_a_hundredth_of_a_percent_is_more_than_the_rounding_of_fp32() -> None:
    """Logits that are 1.0001 times as large move the logprobs here, of about 3, by as much."""
    assert ran("triton", "float32", 1e-4 * 3).verdict == OUTSIDE


def test_an_inert_plugin_does_not_pass() -> None:
    stock = outcome([answer([5, 6])])
    found = verdict.judged(stock, stock, outcome([answer([5, 6])], [row("model.norm", op="", calls=0)]))
    assert (found.verdict, found.passed) == (verdict.INERT, False)
    assert found.silent == ["model.norm"]


@pytest.mark.parametrize(
    ("mode", "flags", "word"),
    [
        ("compiled", {"NORM_PLUGIN": "auto"}, verdict.LEFT),
        ("compiled", {"NORM_PLUGIN": "auto", "NORM_PLUGIN_SCOPE": "all"}, verdict.INERT),
        ("eager", {"NORM_PLUGIN": "auto"}, verdict.INERT),
    ],
)
def test_layers_that_are_compiled_are_said_to_be_left_to_the_compiler(
    mode: str, flags: dict[str, str], word: str
) -> None:
    stock = outcome([answer([5, 6])])
    patched = outcome([answer([5, 6])], [row("model.norm", op="", calls=0)])
    patched.mode, patched.flags = mode, flags
    found = verdict.judged(stock, stock, patched)
    assert (found.verdict, found.passed, found.differs) == (word, False, False)
    said = " ".join(verdict.remarks(found, {"engine": "vllm", "mode": mode, "flags": flags}))
    assert ("compiled by vllm" in said) is (word == verdict.LEFT)
    other = outcome([answer([5, 6], shift=0.1)])
    other.mode, other.flags = mode, flags
    assert verdict.judged(stock, stock, other).differs


def test_who_normalized_is_said() -> None:
    stock = outcome([answer([5, 6])])
    rows = [row("a"), row("b", "too strange"), row("c", op="", calls=0), row("d", "once", calls=0)]
    found = verdict.judged(stock, stock, outcome([answer([5, 6])], rows))
    assert (found.verdict, found.passed) == (IDENTICAL, True)
    assert (found.taken, found.others) == (["a"], ["b", "c", "d"])
    assert found.kept == {"too strange": ["b"]}
    assert (found.backends, found.numerics, found.silent) == (["native"], ["hf"], ["c"])
    assert verdict.summary([found, found]) == "2 models: 2 identical"


def test_what_did_an_all_reduce_is_said() -> None:
    """Sums over ranks have an order and a rounding of their own, so the same bits are not asked for."""
    stock = outcome([answer([5, 6])])
    rows = [
        row("a.norm", op="allreduce_add_rmsnorm"),
        row("b.norm", op="rmsnorm"),
        row("b.o_proj", "its sum goes to torch.Tensor.mul", op="allreduce"),
    ]
    found = verdict.judged(stock, stock, outcome([answer([5, 6], shift=1e-4)], rows))
    assert (found.verdict, found.taken, found.fused, found.others) == (INSIDE, ["a.norm", "b.norm"], ["a.norm"], [])
    said = [*verdict.remarks(found, {"engine": "vllm", "mode": "eager", "flags": {}})]
    assert said == [
        "all-reduce and norm are one op in a.norm",
        "kept by the engine in b.o_proj: its sum goes to torch.Tensor.mul",
    ]
    one_rank = [row("a.norm", op="fused_add_rmsnorm")]
    assert verdict.judged(stock, stock, outcome([answer([5, 6], shift=1e-4)], one_rank)).differs
