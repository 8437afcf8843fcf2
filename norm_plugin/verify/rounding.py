"""Says how far two runs may differ by rounding alone, if stock is the same twice and patched sums in another order.

Logits have the dtype of the model. The smallest change of a logit is one step: the distance of neighbours of that
dtype at the size of the logits. A sum in another order changes last bits, and a few layers later each logit has moved
by no step or by one, seldom by two. So the largest difference is about one step. The mean over the five tokens that
are compared at a position is a third of a step: most do not move.

In bf16 and fp16, sums are computed in fp32 and rounded once, and this rounding is larger than all others. In fp32 a
sum of `width` products is rounded after each of them, in each of the `norms`. These roundings have random signs, so
they add up to the root of their number.

The size of the logits is taken from the logprobs, because a shift that all logits share makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from norm_plugin.verify.outcome import Answer

#: The distance of neighbours at 1, by dtype.
EPSILON = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}

#: The mean, in steps.
MEAN = 1 / 3


def step(answers: Sequence[Answer], dtype: str, width: int, norms: int) -> float:
    """One step of the logits, behind sums over `width` columns and `norms` layers of ours."""
    sizes = [max(abs(logprob) for logprob in position.values()) for answer in answers for position in answer.top]
    size = median(sizes) if sizes else 0.0
    if size == 0 or dtype not in EPSILON:
        return 0.0
    at_size = EPSILON[dtype] * 2.0 ** math.floor(math.log2(size))
    return at_size * math.sqrt(width * norms) if dtype == "float32" else at_size
