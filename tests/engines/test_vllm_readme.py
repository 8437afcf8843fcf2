"""The README, word by word: what each command prints, and its exit code, in a new environment beside the real vLLM."""

from __future__ import annotations

from pathlib import Path

from tests.engines import follow
from tests.engines.runs import ROOT, python


def test_every_command_of_the_readme(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    reader = follow.Reader(tmp_path, python("vllm"))
    done = []
    for step, code, said, difference in follow.follow(text, reader):
        name = step.command.splitlines()[0]
        assert code == 0, f"{name}\nends with {code}:\n" + "\n".join(said[-40:])
        assert difference == "", f"{name}\n{difference}\npython -m tests.engines.follow --write puts it there"
        done.append(name.split()[1] if name.startswith("norm-plugin") else name.split()[0])
    assert [verb for verb in done if verb != "import"] == ["pip", "doctor", "verify", "run", "report"]
    assert reader.code == 0, "the server's, after Ctrl-C"
