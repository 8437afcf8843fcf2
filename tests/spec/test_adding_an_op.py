"""A copy of the package follows docs/adding_an_op.md. Then its new op does what any op does, native and on Triton."""

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
    """Code of the page: its heading, the file that it goes into, and the part of that file; '' is its end."""

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
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not block.into:
        path.write_text("\n".join([*lines, "", "", block.code]), encoding="utf-8")
        return
    statements = ast.parse("\n".join(lines)).body
    if block.into == "the imports":
        last = max(node.lineno for node in statements if isinstance(node, ast.ImportFrom))
        lines[last - 1 : last - 1] = block.code.splitlines()
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
        return
    (named,) = [node for node in statements if block.into in names(node)]
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


KERNEL = """
import torch, norm_plugin
from norm_plugin import dispatch
from norm_plugin.accuracy import cases, oracle, table, ulps

torch.manual_seed(0)
(case,) = [case for case in cases.cases() if case.op == "l1norm"]
for dtype in ("fp16", "fp32"):  # Triton's interpreter cannot round to bf16
    row = table.row(case, dtype, torch.device("cpu"))
    print("judged", row.backend, row.passed)

for shape in ((1, 5), (33, 96), (2, 3, 5000), (4, 70000)):
    wide, w = torch.randn(*shape[:-1], 2 * shape[-1]), torch.randn(shape[-1])
    x = wide[..., : shape[-1]]
    for weight in (w, None):
        found = norm_plugin.l1norm(x, weight, 1e-3)
        print(*shape, ulps.measure(found, oracle.l1norm(x, weight, 1e-3)).max < 4, end=" ")
        print(torch.equal(found[:1], norm_plugin.l1norm(x[:1], weight, 1e-3)))
print("native", dispatch.calls("l1norm", "native"))
"""


def test_the_kernel_runs_in_the_interpreter(followed: Path) -> None:
    pytest.importorskip("triton")
    triton = {"NORM_PLUGIN": "triton", "NORM_PLUGIN_STRICT": "1", "TRITON_INTERPRET": "1"}
    assert python(followed, "-c", KERNEL, **triton).splitlines() == [
        *["judged triton True"] * 2,
        *[f"{shape} True True" for shape in ("1 5", "33 96", "2 3 5000", "4 70000") for _ in range(2)],
        "native 0",
    ]


COMPILED = """
from tests.kernels.compile_only import Task, reports

(report,) = reports(Task("l1norm", {}, (4, 4096)))
print(report.error, report.waits, any(before for _, _, _, before in report.accesses), report.no_short_road)
"""


def test_the_kernel_compiles_for_a_gpu(followed: Path) -> None:
    """For Hopper, with one wait, no access before it, and arguments that the driver takes."""
    pytest.importorskip("triton")
    assert python(followed, "-c", COMPILED, NORM_PLUGIN="triton").split() == ["1", "False"]
