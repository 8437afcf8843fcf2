"""How far two runs may be apart by rounding alone, where stock is the same twice and patched sums in another order.

Logits have the dtype of the model, and the step between neighbours of that dtype at the size of the logits is the
least by which one can change. A sum in another order changes last bits; behind a few layers each logit has moved by
no step or by one, seldom by two. So rounding alone has a largest difference of about one step, and a mean, over the
five tokens that are compared at a position, of a third of one: some move and most do not.

In fp32 a sum of `width` products rounds after each of them in the dtype of the logits, and not once in the end as in
bf16 and fp16, which are summed in fp32; and what each of the `norms` changes is as large, where in bf16 and fp16 the
one rounding in the end is larger than all of it. Those roundings have random signs, and add up to the root of their
number.

The size of the logits is taken from the logprobs: a shift that all logits have in common makes no difference.
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
