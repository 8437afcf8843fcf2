"""The page "use with vLLM", command by command."""

from pathlib import Path

from tests.engines import pages


def test_every_command_of_the_page(tmp_path: Path) -> None:
    assert pages.follow("vllm", tmp_path) == ["verify"], "the README has the others"
