"""docs/errors.md is what tests/spec/errors_page.py makes of the tests."""

from tests.spec.errors_page import PAGE, page


def test_page_is_that_of_the_tests() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.spec.errors_page"
