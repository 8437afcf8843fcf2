"""Each call of refused.py: its error and message, and nothing written; again after a right call of the function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.spec.backend import Backend
from tests.spec.refused import REFUSED, Refused, names


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.call)
def test_refused(backend: Backend, refused: Refused) -> None:
    for _ in range(2):
        named = names(backend)
        before = {name: t.detach().clone() for name, t in named.items() if isinstance(t, Tensor)}
        with pytest.raises(refused.error) as raised:
            eval(refused.call, named)
        assert type(raised.value) is refused.error
        assert str(raised.value).split("\n")[0] == refused.message
        assert all(torch.equal(value, named[name]) for name, value in before.items())
        eval(refused.right, named)
