"""Which folders the names of models mean."""

from pathlib import Path

import pytest

from norm_plugin.commands.errors import CommandError
from norm_plugin.verify.models import find_models, names


def cached(home: Path, name: str, *commits: str, main: str = "") -> list[Path]:
    """A model as the Hugging Face cache has it."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    for commit in commits:
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "snapshots" / commit / "config.json").write_text("{}")
    if main:
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(main)
    return [place / "snapshots" / commit for commit in commits]


def test_a_name_of_the_hub_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    first, _ = cached(tmp_path, "org/name", "aaa", "bbb", main="aaa")
    (only,) = cached(tmp_path, "org/other", "ccc")
    assert find_models("org/name", "vllm", "cpu") == [first]
    assert find_models("org/other", "vllm", "cpu") == [only]
    assert names(["org/name", "org/other"], [[first], [only]]) == ["org/name", "org/other"]
    with pytest.raises(CommandError, match=r"no such model in .*HF_HOME.*Nothing is downloaded"):
        find_models("org/third", "vllm", "cpu")


def test_two_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "model", tmp_path / "b" / "model", tmp_path / "b" / "another"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert names(list(map(str, folders)), [[folder] for folder in folders]) == [
        *map(str, folders[:2]), "another",
    ]  # fmt: skip


def test_a_home_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file, so that nobody can write below it, whoever runs this")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(CommandError, match=r"home/.cache/norm_plugin/\S+ cannot be written .*set XDG_CACHE_HOME"):
        find_models("tiny:llama", "vllm", "cpu")
