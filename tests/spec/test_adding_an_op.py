"""docs/adding_an_op.md adds an op to a copy of the package, as it stands there: then the op is asked like any other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.spec.package_copies import ROOT, copy_package, python

PAGE = ROOT / "docs" / "adding_an_op.md"


class Block(NamedTuple):
    """Code of the page, its heading, the file that it is added to, and what it is added to there; '' is the end."""

    heading: str
    file: str
    into: str
    code: str


def blocks() -> Iterator[Block]:
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            place, _, code = code.partition("\n")
            file, _, into = place.removeprefix("# ").partition(", in ")
            yield Block(section.partition("\n")[0], file, into, code)


def add(block: Block, root: Path) -> None:
    """Do what the page says of a block."""
    path = root / block.file
    lines = path.read_text(encoding="utf-8").splitlines()
    if not block.into:
        path.write_text("\n".join([*lines, "", "", block.code]), encoding="utf-8")
        return
    (named,) = [node for node in ast.parse("\n".join(lines)).body if block.into in names(node)]
    is_function = isinstance(
        named, ast.FunctionDef
    )  # its last statement returns; a list or a dict ends with its bracket
    last = named.body[-1].lineno if is_function else named.end_lineno
    lines[last - 1 : last - 1] = [f"    {line}{'' if is_function else ','}" for line in block.code.splitlines()]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def names(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of its tests, after the page was followed."""
    root = tmp_path_factory.mktemp("followed")
    copy_package(root)
    for block in blocks():
        add(block, root)
    return root


def test_an_op_touches_five_files_of_the_package() -> None:
    own = {block.file for block in blocks() if block.heading not in ("A gradient", "A kernel", "Tests")}
    assert len(own) == 5


ASKED = """
import torch, norm_plugin
from norm_plugin import dispatch
from norm_plugin.accuracy import cases, table

print("l1norm" in norm_plugin.__all__, torch.ops.norm_plugin.l1norm.default._schema)

x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 8), (8,)))
print("counted", norm_plugin.l1norm(x.detach(), w.detach()).shape, dispatch.calls("l1norm", "native"))
print("gradients", *(torch.autograd.gradcheck(norm_plugin.l1norm, (x, weight)) for weight in (w, None)))

utils = ("test_schema", "test_autograd_registration", "test_faketensor")
print("checked", *torch.library.opcheck(torch.ops.norm_plugin.l1norm.default, (x, w), test_utils=utils).values())

try:
    norm_plugin.l1norm(x, w[1:])
except ValueError as error:
    print("refused:", error)

(case,) = [case for case in cases.cases() if case.op == "l1norm"]
print("judged", *(table.row(case, dtype, torch.device("cpu")).passed for dtype in table.DTYPES))
"""


def test_the_op_is_like_any_other(followed: Path) -> None:
    assert python(followed, "-c", ASKED).splitlines() == [
        "True norm_plugin::l1norm(Tensor input, Tensor? weight, float eps=9.9999999999999995e-07) -> Tensor",
        "counted torch.Size([3, 8]) 1",
        "gradients True True",
        "checked SUCCESS SUCCESS SUCCESS",
        "refused: weight has shape [7]; it must be [8], the last dimension of input.",
        "judged True True True",
    ]


def test_the_tests_of_all_ops_have_it(followed: Path) -> None:
    files = ("tests/spec/test_layouts.py", "tests/spec/test_rows.py")
    said = python(followed, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "l1norm")
    passed = re.search(r"(\d+) passed", said)
    assert passed
    assert int(passed[1]) >= 10
