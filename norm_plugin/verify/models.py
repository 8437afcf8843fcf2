"""Finds the models that a user names: a folder, a model in the Hugging Face cache, or tiny ones made here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from norm_plugin.commands.errors import WRONG_ARGUMENT, CommandError
from norm_plugin.tiny_models import checkpoint


def find_models(model: str, engine: str, device: str) -> list[Path]:
    """One name's folders; tiny ones are made."""
    if model.startswith("tiny:"):
        return list(_made(model, engine, device))
    folder = Path(model)
    if not folder.is_dir():
        folder = _cached(model)
    if not (folder / "config.json").is_file():
        raise CommandError(f"--model {model}: there is no {folder}/config.json; give a model's folder, or tiny:NAME.")
    return [folder.resolve()]


def names(models: list[str], folders: list[list[Path]]) -> list[str]:
    """What to call each: its folder, or the name by which the cache has it; its path where two have one name."""
    found = [
        model if not model.startswith("tiny:") and not Path(model).is_dir() else folder.name
        for model, several in zip(models, folders, strict=True)
        for folder in several
    ]
    paths = [str(folder) for several in folders for folder in several]
    return [name if found.count(name) == 1 else path for name, path in zip(found, paths, strict=True)]


def _made(model: str, engine: str, device: str) -> Iterator[Path]:
    wanted = model.removeprefix("tiny:").split(",")
    if wanted == ["all"]:
        wanted = list(checkpoint.names(engine))
    if not set(wanted) <= set(checkpoint.NAMES):
        raise CommandError(f"--model {model}: there are {', '.join(checkpoint.NAMES)}, and tiny:all.", WRONG_ARGUMENT)
    for name in wanted:
        try:
            yield checkpoint.make(name, sizes=checkpoint.sizes_for(device))
        except OSError as error:
            raise CommandError(
                f"--model {model}: {checkpoint.cache()} cannot be written ({error.strerror}); set "
                "XDG_CACHE_HOME to a folder where tiny models can be kept."
            ) from error


def _cached(model: str) -> Path:
    """A model that was downloaded before. Nothing is downloaded here."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    place = cache / f"models--{model.replace('/', '--')}"
    snapshots = sorted((place / "snapshots").glob("*"), key=lambda folder: folder.stat().st_mtime)
    if not snapshots:
        raise CommandError(
            f"--model {model}: there is no such folder, and no such model in {cache} (HF_HOME names another cache). "
            "Nothing is downloaded here; give a model's folder, or tiny:NAME."
        )
    head = place / "refs" / "main"
    current = place / "snapshots" / head.read_text().strip() if head.is_file() else snapshots[-1]
    return current if current.is_dir() else snapshots[-1]
