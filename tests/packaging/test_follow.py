"""Follows the README: what is typed, what may differ, and which blocks are left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from norm_plugin.tiny_models import checkpoint
from tests.engines import follow

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Blocks of the README that nobody follows: quickstart and test, which make environments of their own.
MOST_NOT_FOLLOWED = 1
#: Lines that a command with `...` must also have.
LEAST_PRINTED = 1

TEXT = """\
```console
$ norm-plugin doctor   # here
...
nothing wrong
$ true
```
<!-- not followed: why -->
```console
$ norm-plugin bench
```
```python
import sys
```
```sh
docker run
```
"""


def test_blocks_become_steps() -> None:
    found, skipped = follow.steps(TEXT)
    assert [(step.command, step.printed, step.python) for step in found] == [
        ("norm-plugin doctor   # here", ["...", "nothing wrong"], False),
        ("true", [], False),
        ("import sys\n", [], True),
    ]
    assert skipped == 1


@pytest.mark.parametrize(
    ("printed", "said", "same"),
    [
        (["stock: 24 s", "a  b"], ["stock: 31 s", "a      b  "], True),
        (["one", "two"], ["one"], False),
        (["one"], ["one", "two"], False),
        ([], ["a line that nobody printed"], False),
        (["..."], ["anything", "at all"], True),
        (["...", "the end"], ["one", "the end"], True),
        (["...", "the end"], ["one", "the end", "and more"], False),
        (["first", "...", "last"], ["first", "last"], True),
        (["vllm ... nothing wrong"], ["vllm 0.32.0; nothing wrong"], True),
        (["vllm ... nothing wrong"], ["vllm 0.32.0", "nothing wrong"], False),
        (["7/7 identical"], ["6/7 identical"], False),
        (["max 0.02"], ["max 0.03"], False),
        (["exit code 0"], ["exit code 1"], False),
        (["a.b"], ["axb"], False),
        ([], ["WARNING: Location 'file:///nowhere' is ignored: it is neither a file nor a directory."], True),
    ],
)
def test_what_may_differ(printed: list[str], said: list[str], same: bool) -> None:
    assert (follow.difference(printed, said) == "") is same


def test_what_is_printed_can_be_put_in() -> None:
    step = follow.steps(TEXT)[0][1]
    text = follow.rewritten(TEXT, step, ["one", "two  "])
    assert follow.steps(text)[0][1].printed == ["one", "two"]
    assert text.replace("one\ntwo\n", "") == TEXT


def test_all_but_one_block_is_followed() -> None:
    found, skipped = follow.steps(README)
    assert skipped <= MOST_NOT_FOLLOWED
    assert len(re.findall(r"^```(?:console|python)", README, re.MULTILINE)) > skipped
    assert len([step for step in found if not step.python]) >= 5


def test_nothing_that_is_followed_needs_a_gpu() -> None:
    for step in follow.steps(README)[0]:
        assert not re.search(r"norm-plugin (?:bench|tune)|--backend (?:triton|auto)|--gpus", step.command), step.command


def test_what_is_left_out_is_not_all() -> None:
    """`...` alone would let a command print whatever it likes."""
    for step in follow.steps(README)[0]:
        if follow.LEFT_OUT in step.printed:
            assert len(step.printed) - step.printed.count(follow.LEFT_OUT) >= LEAST_PRINTED, step.command


def test_the_names_in_the_readme_are_those_that_are_replaced() -> None:
    """The one path that stands for the reader's own model. The tiny model has its name."""
    paths = {path for step in follow.steps(README)[0] for path in re.findall(r"(?<= )/[\w/.]+", step.command)}
    assert paths == {follow.MODEL}
    assert checkpoint.make("llama").name == Path(follow.MODEL).name
