"""docs/numerics.md adds a numerics to a copy of the package, by its one entry; a second one has a rounding that is new.

Then both are asked like any other: the tests of all numerics run them, native against the oracle within derived bounds
and the kernels in Triton's interpreter, and the kernels give native's bits where every sum is exact.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.spec.package_copies import ROOT, copy_package, python

PAGE = ROOT / "docs" / "numerics.md"

SECTION = PAGE.read_text(encoding="utf-8").partition("\n## Adding a numerics\n")[2].partition("\n## ")[0]

#: The entry of the page, and one of a rounding that no kernel has: that of the weight, to the dtype of the activations.
ENTRIES = (
    *re.findall(r"```python\n# norm_plugin/numerics.py\n(.*?)```", SECTION, re.DOTALL),
    'recipe("toy_weight", formula="b(h * s * b(w))", used_by="nobody", known_by=(NUMERICS, GATED_NUMERICS),\n'
    "       round_weight=True)\n",
)

#: The new rounding, where the page says that it goes: file, function or class, a line there, and what goes before it.
#: Each line stands there once.
ROUNDING = [
    ("numerics.py", "Numerics", "    round_before_quant:", "    round_weight: bool = False\n"),
    (
        "native/rms.py", "scaled", "    if numerics.weight_before_scale:",
        "    if numerics.round_weight and w is not None:\n        w = w.to(dtype).to(h.dtype)\n",
    ),
    (
        "native/gated.py", "weighted", "    if not numerics.round_before_weight:",
        "    if numerics.round_weight and weight is not None:\n        weight = weight.to(dtype)\n",
    ),
    ("kernels/rms_kernel.py", "Recipe", "    weight_before_scale: bool", "    round_weight: bool\n"),
    (
        "kernels/rms_kernel.py", "scale", "        if recipe.weight_before_scale:",
        "        if recipe.round_weight:\n            w = w.to(dtype).to(tl.float32)\n",
    ),
    ("kernels/gated_kernel.py", "Recipe", "    round_before_weight: bool", "    round_weight: bool\n"),
    (
        "kernels/gated_kernel.py", "finish", "    if w is not None:",
        "    if w is not None and recipe.round_weight:\n        w = w.to(dtype)\n",
    ),
    (
        "accuracy/oracle.py", "weighted", "    return xhat * factor(weight, gemma)",
        "    if numerics.round_weight and weight is not None:\n"
        "        weight, gemma = rounded(factor(weight, gemma), dtype, nudge), False\n",
    ),
]  # fmt: skip


def insert(text: str, of: str, line: str, before_it: str) -> str:
    """`before_it` goes before the one line that begins with `line` in a function or class."""
    (start,) = [found.start() for found in re.finditer(rf"^(def|class) {of}\b", text, re.MULTILINE)]
    end = re.compile(r"^\S.*\n", re.MULTILINE).search(text, text.index(":\n", start) + 2)
    body = text[start : end.start() if end else len(text)]
    assert body.count(f"\n{line}") == 1, (of, line)
    return text[:start] + body.replace(f"\n{line}", f"\n{before_it}{line}") + text[start + len(body) :]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of its tests, with both numerics."""
    root = tmp_path_factory.mktemp("extended")
    copy_package(root)
    for file, of, line, before_it in ROUNDING:
        path = root / "norm_plugin" / file
        path.write_text(insert(path.read_text(encoding="utf-8"), of, line, before_it), encoding="utf-8")
    with (root / "norm_plugin" / "numerics.py").open("a", encoding="utf-8") as file:
        file.write("\n\n" + "\n".join(ENTRIES))
    return root


ASKED = """
import torch
from norm_plugin import numerics
from norm_plugin.accuracy import table
from norm_plugin.accuracy.cases import cases

print(*(line for line in numerics.table().splitlines() if "toy" in line), sep="\\n")
for name in ("toy", "toy_weight"):
    found = {case.op: case for case in cases() if case.numerics == name}
    print(*found, table.row(found["add_rmsnorm"], "bf16", torch.device("cpu")).passed)
"""


def test_its_table_and_cases_follow_from_the_entry(extended: Path) -> None:
    assert python(extended, "-c", ASKED).splitlines() == [
        "| `toy` | `b(b(b(x + r) * s) * w), s from x + r` | nobody |",
        "| `toy_weight` | `b(h * s * b(w))` | nobody |",
        "add_rmsnorm fused_add_rmsnorm rmsnorm True",
        "add_rmsnorm fused_add_rmsnorm fused_add_rmsnorm_quant rmsnorm rmsnorm_block_quant rmsnorm_dynamic_quant "
        "rmsnorm_fn rmsnorm_quant True",
    ]


def passed(extended: Path, **environment: str) -> int:
    """How many tests of the numerics passed; none may fail. Where TRITON_INTERPRET=1 is set, they run the kernels."""
    paths = ["tests/spec/test_rms.py", "tests/spec/test_gated.py"]
    said = python(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, "-k", "toy", **environment)
    found = re.search(r"(\d+) passed", said)
    assert found, said
    assert "skipped" not in said
    return int(found[1])


def test_the_tests_of_all_numerics_have_it(extended: Path) -> None:
    assert passed(extended) >= 150


#: Sums of squares of small integers are exact in any order, and so is a mean of 64 of them.
SAME_BITS = """
import torch, norm_plugin
from norm_plugin import settings
from tests.kernels.interpreter import repaired

def integers(seed):
    return torch.randint(-3, 4, (16, 64), generator=torch.Generator().manual_seed(seed)).bfloat16()

def outputs(how, **flags):
    x, r, w = integers(1), integers(2) / 64, 1 + torch.rand(64, generator=torch.Generator().manual_seed(3)) / 3
    with settings.override(**flags):
        yield norm_plugin.rmsnorm(x, w, 0.5, numerics=how)
        yield from norm_plugin.add_rmsnorm(x, r, w, 0.5, numerics=how)
        yield norm_plugin.rmsnorm_dynamic_quant(x, w, r.clone(), 0.5, numerics=how)[0].float()
        if how in ("fp32", "toy_weight"):
            yield norm_plugin.rmsnorm_fn(x, w, None, None, 0.5, numerics=how)

with repaired():
    for how in ("toy", "toy_weight"):
        ours, native, plain = (
            list(outputs(*asked, strict=True, backend=backend))
            for asked, backend in (((how,), "triton"), ((how,), "native"), (("fp32",), "native"))
        )
        print(how, "same bits", *map(torch.equal, ours, native))
        print(how, "other than fp32", *(not torch.equal(a, b) for a, b in zip(native, plain)))
"""


def test_the_kernels_have_it(extended: Path) -> None:
    pytest.importorskip("triton")
    assert python(extended, "-c", SAME_BITS, TRITON_INTERPRET="1").splitlines() == [
        "toy same bits True True True True",
        "toy other than fp32 True True False True",  # the third is the sum that is written
        "toy_weight same bits True True True True True",
        "toy_weight other than fp32 True True False True True",
    ]
    assert passed(extended, TRITON_INTERPRET="1") >= 15
