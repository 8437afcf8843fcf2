"""docs/errors.md is what scripts/errors_page.py makes of the tests."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_page_is_that_of_the_tests() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "errors_page.py"))["page"]
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == page(), "run: python scripts/errors_page.py"
