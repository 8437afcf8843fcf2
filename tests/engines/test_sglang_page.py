"""The page "use with SGLang", command by command."""

from pathlib import Path

from tests.engines import pages


def test_every_command_of_the_page(tmp_path: Path) -> None:
    assert pages.follow("sglang", tmp_path) == ["doctor", "verify", "run", "report"]
