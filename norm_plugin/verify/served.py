"""Reads a serving command as somebody typed it: engine, model, what the engine compiles, and so which layers are ours.

This is done without the engine, in no time, before a server starts. `verify` lets the engine's own parser read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from norm_plugin.settings import FAMILIES, Settings

EAGER, COMPILED = "eager", "compiled"

#: Models with these in their config have encoders, which vLLM does not compile.
ENCODERS = ("vision_config", "audio_config", "vit_config", "thinker_config", "encoder_config")


@dataclass(frozen=True)
class Served:
    """One command. `because`: what in it decides the mode."""

    engine: str
    words: tuple[str, ...]
    model: str | None
    mode: str
    because: str


def served(command: Sequence[str], environ: Mapping[str, str]) -> Served | None:
    """What a command serves; None if it starts no engine that is known here."""
    for engine, words in _engines(command):
        mode, because = (_vllm_mode if engine == "vllm" else _sglang_mode)(words, environ)
        return Served(engine, words, _model(engine, words), mode, because)
    return None


def _engines(command: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The engine, and the words after its name; what stands before it (numactl, python -m) does not matter."""
    modules = {"vllm.entrypoints.openai.api_server": "vllm", "sglang.launch_server": "sglang"}
    for i, word in enumerate(command):
        name = Path(word).name
        if name in ("vllm", "sglang") and list(command[i + 1 : i + 2]) == ["serve"]:
            yield name, tuple(command[i + 2 :])
        elif word in modules:
            yield modules[word], tuple(command[i + 1 :])


def _model(engine: str, words: Sequence[str]) -> str | None:
    named = _value(words, "--model") or (_value(words, "--model-path") if engine == "sglang" else None)
    return named or next((word for word in words[:1] if not word.startswith("-")), None)


def _value(words: Sequence[str], *names: str) -> str | None:
    """The last value of an option, as `--name value` or `--name=value`, with _ for - as engines allow."""
    found = None
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if _plain(name) in names:
            found = value if equals else next(iter(words[i + 1 : i + 2]), None)
    return found


def number(words: Sequence[str], *names: str) -> int:
    """The value of an option that is a number, 1 where it is not given."""
    value = _value(words, *names) or "1"
    return int(value) if value.isdecimal() else 1


def _plain(name: str) -> str:
    head, dot, rest = name.partition(".")
    return (head.replace("_", "-") if head.startswith("--") else head) + dot + rest


def _given(words: Sequence[str], name: str) -> bool:
    """Whether a switch is on: the last of --name and --no-name counts."""
    found = [word for word in map(_plain, words) if word in (name, f"--no-{name[2:]}")]
    return found[-1:] == [name]


def _vllm_mode(words: Sequence[str], environ: Mapping[str, str]) -> tuple[str, str]:
    if _given(words, "--enforce-eager"):
        return EAGER, "--enforce-eager"
    if environ.get("TORCH_COMPILE_DISABLE") == "1":
        return EAGER, "TORCH_COMPILE_DISABLE=1"
    mode = _compilation_mode(words)
    if mode is not None:
        return (EAGER if mode.upper() in ("0", "NONE") else COMPILED), f"compilation mode {mode}"
    level = _value(words, "--optimization-level", "-O")
    level = level or next((word[2:].lstrip("=") for word in words if re.fullmatch(r"-O=?\d", word)), None)
    if level is not None:
        return (EAGER if level.upper().lstrip("O") == "0" else COMPILED), f"-O{level.lstrip('oO')}"
    return COMPILED, "its default"


def _compilation_mode(words: Sequence[str]) -> str | None:
    names = ("--compilation-config", "-cc")
    if (mode := _value(words, *(f"{name}.mode" for name in names))) is not None:
        return mode
    try:
        config = json.loads(_value(words, *names) or "{}")
    except ValueError:  # vLLM will say so
        return None
    mode = config.get("mode") if isinstance(config, dict) else None
    return None if mode is None else str(mode)


def _sglang_mode(words: Sequence[str], _: Mapping[str, str]) -> tuple[str, str]:
    if _given(words, "--enable-torch-compile"):
        return COMPILED, "--enable-torch-compile"
    return EAGER, "its default"


# --- what is ours -------------------------------------------------------------------------------------------------


def plan(command: Served, wanted: Settings, environ: Mapping[str, str]) -> str:
    """Which layers will be ours in the mode that was asked for, which will not and why, and what changes it."""
    kinds = "" if wanted.ops == set(FAMILIES) else f" of the families {', '.join(sorted(wanted.ops))}"
    every = f"every norm layer{kinds} that norm_plugin hooks will be ours"
    how = f"{command.mode} ({command.because})"
    if command.engine == "sglang":
        return _of_sglang(command, how, every)
    if environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        several = number(command.words, "--tensor-parallel-size", "-tp") > 1
        return (
            f"no layer will be ours{', but norms that do an all-reduce too' * several}: VLLM_BATCH_INVARIANT=1 is a "
            "promise of vLLM's own norms, so they stay. Unset it to have ours"
        )
    if command.mode == EAGER:
        return f"{how}: {every}"
    if wanted.scope == "all":
        return f"{how}: {every}, in compiled code too (NORM_PLUGIN_SCOPE=all)"
    encoders = "vision and audio encoders, and norms inside opaque ops"
    if _has_encoders(command.model) is False:
        encoders = "norms inside opaque ops, as this model has no vision or audio encoder: so probably none"
    return (
        f"{how}: norm layers that vLLM compiles stay vLLM's, because Inductor fuses them with their neighbours, which "
        f"is as fast. Ours will be what it runs eagerly ({encoders}). --enforce-eager, or NORM_PLUGIN_SCOPE=all in "
        "compiled code, makes all of them ours"
    )


def _of_sglang(command: Served, how: str, every: str) -> str:
    if command.mode == COMPILED:
        return f"{how}: what SGLang compiles stays SGLang's, and the rest will be ours. Without that flag {every}"
    if _value(command.words, "--rl-on-policy-target"):
        return f"{every}, but for the residual norms that --rl-on-policy-target computes as its trainer does"
    if _given(command.words, "--enable-deterministic-inference"):
        return f"{every}; under --enable-deterministic-inference with rows that do not depend on the batch"
    return f"{every}, inside CUDA graphs too; SGLang compiles nothing by default"


def _has_encoders(model: str | None) -> bool | None:
    """None if the model is not a folder here."""
    try:
        config = json.loads((Path(model or "") / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return any(name in config for name in ENCODERS)
