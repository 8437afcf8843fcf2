"""Every flag: its name, its values, its default and one line of help. The table in the README is made from it.

Flags are read from the environment once, at the first use; `override` changes them for a block of code.
"""

from __future__ import annotations

import difflib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

log = logging.getLogger("norm_plugin")

BACKENDS = ("off", "auto", "triton", "native")
FAMILIES = ("rmsnorm", "gemma", "layernorm", "gated", "mixer2", "qknorm")


class SettingError(ValueError):
    """A flag has a wrong value, or two flags contradict each other."""


@dataclass(frozen=True)
class Flag:
    """One environment variable."""

    name: str
    field: str
    values: str
    default: str
    help: str
    parse: Callable[[str, str], object]


@dataclass(frozen=True)
class Settings:
    """What the flags say, parsed."""

    backend: str
    native_layernorm: bool
    ops: frozenset[str]
    scope: str
    strict: bool
    pdl: bool | None
    compile: bool
    report: str | None


def _one_of(name: str, text: str, *, values: tuple[str, ...]) -> str:
    if text not in values:
        raise SettingError(f"{name}={text!r} is not one of its values: {', '.join(values)}. Set one, or unset it.")
    return text


def _switch(name: str, text: str) -> bool:
    return _one_of(name, text, values=("0", "1")) == "1"


def _auto_switch(name: str, text: str) -> bool | None:
    return {"auto": None, "0": False, "1": True}[_one_of(name, text, values=("auto", "0", "1"))]


def _families(name: str, text: str) -> frozenset[str]:
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    for word in wanted:
        if word not in FAMILIES:
            raise SettingError(f"{name}={text!r} names {word!r}, which is not a family: {', '.join(FAMILIES)}.")
    return frozenset(wanted or FAMILIES)


FLAGS: tuple[Flag, ...] = (
    Flag(
        "NORM_PLUGIN", "backend", "`off`, `auto`, `triton`, `native`", "off",
        "off: the engines stay as they are. auto: Triton where there is a GPU, else native; the engine itself runs "
        "what no kernel can do. For direct calls of the functions, off means auto",
        partial(_one_of, values=BACKENDS),
    ),
    Flag(
        "USE_NATIVE_LAYERNORM", "native_layernorm", "`0`, `1`", "0",
        "1 is `NORM_PLUGIN=native`; together with `NORM_PLUGIN=triton` or `off` it is an error",
        _switch,
    ),
    Flag(
        "NORM_PLUGIN_OPS", "ops", "a list of " + ", ".join(f"`{family}`" for family in FAMILIES), "",
        "take only these families of engine layers; empty: all of them",
        _families,
    ),
    Flag(
        "NORM_PLUGIN_SCOPE", "scope", "`eager`, `all`", "eager",
        "vLLM: leave what Inductor compiles alone, or take it too",
        partial(_one_of, values=("eager", "all")),
    ),
    Flag(
        "NORM_PLUGIN_STRICT", "strict", "`0`, `1`", "0",
        "1: a call that cannot be done as asked raises an error with the reason, instead of falling back",
        _switch,
    ),
    Flag(
        "NORM_PLUGIN_PDL", "pdl", "`auto`, `0`, `1`", "auto",
        "programmatic dependent launch of the Triton kernels; auto: where the GPU has it",
        _auto_switch,
    ),
    Flag(
        "NORM_PLUGIN_COMPILE", "compile", "`0`, `1`", "0",
        "1: run the native ops through torch.compile",
        _switch,
    ),
    Flag(
        "NORM_PLUGIN_REPORT", "report", "a folder", "",
        "every engine process writes there what ran each layer, and how often, as JSON; `norm-plugin report` reads it",
        lambda name, text: text or None,
    ),
)  # fmt: skip


def read(environ: Mapping[str, str]) -> Settings:
    """The settings of an environment. A wrong value raises SettingError, which names the flag and its values.

    An empty value counts as unset: compose files and Helm write one for a variable that nobody has set.
    """
    values = {flag.field: flag.parse(flag.name, environ.get(flag.name) or flag.default) for flag in FLAGS}
    if values["native_layernorm"]:
        backend = environ.get("NORM_PLUGIN") or "native"
        if backend in ("triton", "off"):
            raise SettingError(
                f"USE_NATIVE_LAYERNORM=1 asks for the native path and NORM_PLUGIN={backend} for another: unset one."
            )
        values["backend"] = "native"
    return Settings(**values)  # type: ignore[arg-type]


def given(environ: Mapping[str, str]) -> dict[str, str]:
    """The flags that an environment sets."""
    return {flag.name: environ[flag.name] for flag in FLAGS if environ.get(flag.name)}


def misspelt(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that only looks like a flag, with the flag that was probably meant."""
    names = {flag.name: flag.name for flag in FLAGS}
    known = {f"NORM_PLUGIN_{flag.field.upper()}": flag.name for flag in FLAGS} | names  # NORM_PLUGIN_BACKEND
    found = []
    for name in sorted(set(environ) - set(names)):
        if name.startswith(("NORM_PLUGIN", "USE_NATIVE_LAYER")):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            meant = f"Was {known[near[0]]} meant?" if near else f"The flags are {', '.join(names)}."
            found.append(f"{name} is not a flag of norm_plugin, and does nothing. {meant}")
    return found


_current: Settings | None = None
_asked: Settings | None = None  # of the environment, without any override
_overrides: list[dict[str, object]] = []
_watchers: list[Callable[[], None]] = []
_lock = threading.RLock()


def get() -> Settings:
    """The settings of this process."""
    current = _current
    return _merged() if current is None else current


def on_change(forget: Callable[[], None]) -> Callable[[], None]:
    """Calls `forget` whenever the settings change: for whoever keeps what was derived from them. Returns a function
    that ends that."""
    _watchers.append(forget)
    return lambda: _watchers.remove(forget)


def _merged() -> Settings:
    """The settings of the environment, which is read once, under the overrides in force; the latest override wins."""
    global _current, _asked
    with _lock:
        if _asked is None:
            for sentence in misspelt(os.environ):
                log.warning("norm_plugin: %s", sentence)
            _asked = read(os.environ)
        fields = {name: value for fields in _overrides for name, value in fields.items()}
        _current = replace(_asked, **fields)  # type: ignore[arg-type]
        return _current


def _changed() -> Settings:
    """Tells every watcher to forget, and returns the new settings."""
    merged = _merged()
    for forget in _watchers:
        forget()
    return merged


@contextmanager
def override(**fields: object) -> Iterator[Settings]:
    """Other settings for a block of code, as in `override(backend="native", strict=True)`. They hold for the whole
    process. If blocks of several threads overlap, the one entered last decides until it ends."""
    with _lock:
        _overrides.append(fields)
        try:
            now = _changed()
        except TypeError:
            _remove(fields)
            raise
    try:
        yield now
    finally:
        with _lock:
            _remove(fields)
            _changed()


def _remove(fields: dict[str, object]) -> None:
    """Ends this override, and no other with equal fields."""
    _overrides[:] = [other for other in _overrides if other is not fields]


def table() -> str:
    """The flags as a Markdown table."""
    rows = [f"| `{f.name}` | {f.values} | `{f.default or 'unset'}` | {f.help} |" for f in FLAGS]
    return "\n".join(["| flag | values | default | meaning |", "|---|---|---|---|", *rows])
