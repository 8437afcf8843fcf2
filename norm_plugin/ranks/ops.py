"""The ops across ranks, declared like all others. They are not in ops.OPS: nobody can call them alone."""

from __future__ import annotations

from functools import partial

from norm_plugin import library
from norm_plugin.native import ranks
from norm_plugin.native.rms import new_output
from norm_plugin.numerics import NUMERICS
from norm_plugin.op import Op

RANK_OPS: dict[str, Op] = {}

declare = partial(library.declare, RANK_OPS)

ALLREDUCE_RMSNORM = declare(ranks.allreduce_rmsnorm, normalized="input", shared="weight", numerics=NUMERICS)
ALLREDUCE_ADD_RMSNORM = declare(
    ranks.allreduce_add_rmsnorm,
    fake=lambda a: (new_output(a["input"]), new_output(a["residual"])),
    normalized="input",
    by_element="residual",
    shared="weight",
    numerics=NUMERICS,
)
ALLREDUCE_NORM_ADD_NORM = declare(
    ranks.allreduce_norm_add_norm,
    fake=lambda a: (new_output(a["input"]), new_output(a["residual"])),
    normalized="input",
    by_element="residual",
    shared="post_weight weight",
    numerics=NUMERICS,
)
