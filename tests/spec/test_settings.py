"""Every flag: its values, its default, a misspelt value, and the flags that contradict each other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from norm_plugin import settings
from norm_plugin.settings import FAMILIES, FLAGS, SettingError

#: Every value of every flag, and what it means.
VALUES: dict[str, dict[str, object]] = {
    "NORM_PLUGIN": {"off": "off", "auto": "auto", "triton": "triton", "native": "native"},
    "USE_NATIVE_LAYERNORM": {"0": False, "1": True},
    "NORM_PLUGIN_OPS": {
        "": frozenset(FAMILIES),
        "rmsnorm": {"rmsnorm"},
        "gemma, qknorm,": {"gemma", "qknorm"},
        ",".join(FAMILIES): set(FAMILIES),
    },
    "NORM_PLUGIN_SCOPE": {"eager": "eager", "all": "all"},
    "NORM_PLUGIN_STRICT": {"0": False, "1": True},
    "NORM_PLUGIN_PDL": {"auto": None, "0": False, "1": True},
    "NORM_PLUGIN_COMPILE": {"0": False, "1": True},
    "NORM_PLUGIN_REPORT": {"": None, "/a/path.json": "/a/path.json"},
}

#: The message for a misspelt value names all right ones.
MISSPELT = [
    ("NORM_PLUGIN", "on", "off, auto, triton, native"),
    ("NORM_PLUGIN", "Native", "off, auto, triton, native"),
    ("USE_NATIVE_LAYERNORM", "true", "0, 1"),
    ("NORM_PLUGIN_OPS", "rmsnorm,rmsnrom", ", ".join(FAMILIES)),
    ("NORM_PLUGIN_SCOPE", "everything", "eager, all"),
    ("NORM_PLUGIN_STRICT", "yes", "0, 1"),
    ("NORM_PLUGIN_PDL", "on", "auto, 0, 1"),
    ("NORM_PLUGIN_COMPILE", "2", "0, 1"),
]


def field_of(name: str) -> str:
    (field,) = [flag.field for flag in FLAGS if flag.name == name]
    return field


def test_every_flag_is_tested() -> None:
    assert set(VALUES) == {flag.name for flag in FLAGS}
    assert {name for name, _, _ in MISSPELT} == {flag.name for flag in FLAGS} - {"NORM_PLUGIN_REPORT"}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, values in VALUES.items() for text in values])
def test_values(name: str, text: str) -> None:
    assert getattr(settings.read({name: text}), field_of(name)) == VALUES[name][text]


def test_defaults_are_those_of_an_empty_environment() -> None:
    empty = settings.read({})
    for flag in FLAGS:
        assert getattr(empty, flag.field) == VALUES[flag.name][flag.default]
    assert empty == settings.read({"PATH": "/bin", "NORM_PLUGIN_UNKNOWN": "1"})


@pytest.mark.parametrize(("name", "text", "right"), MISSPELT)
def test_a_misspelt_value_is_an_error_that_lists_the_right_ones(name: str, text: str, right: str) -> None:
    with pytest.raises(SettingError) as raised:
        settings.read({name: text})
    assert str(raised.value).startswith(f"{name}={text!r}")
    assert right in str(raised.value)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_an_empty_value_is_no_value(flag: settings.Flag) -> None:
    assert settings.read({flag.name: ""}) == settings.read({})
    assert settings.given({flag.name: ""}) == {}
    assert settings.read({"USE_NATIVE_LAYERNORM": "1", "NORM_PLUGIN": ""}).backend == "native"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NORM_PLUGINS", "Was NORM_PLUGIN meant?"),
        ("NORM_PLUGIN_BACKEND", "Was NORM_PLUGIN meant?"),
        ("NORM_PLUGIN_SCOP", "Was NORM_PLUGIN_SCOPE meant?"),
        ("NORM_PLUGIN_OP", "Was NORM_PLUGIN_OPS meant?"),
        ("NORM_PLUGIN_REPORTS", "Was NORM_PLUGIN_REPORT meant?"),
        ("USE_NATIVE_LAYER_NORM", "Was USE_NATIVE_LAYERNORM meant?"),
        ("NORM_PLUGIN_SERVICE_HOST", "The flags are NORM_PLUGIN, USE_NATIVE_LAYERNORM, "),
    ],
)
def test_a_misspelt_name_is_told_the_right_one(name: str, meant: str) -> None:
    (said,) = settings.misspelt({name: "1", "PATH": "/bin", **dict.fromkeys(VALUES, "")})
    assert said.startswith(f"{name} is not a flag of norm_plugin, and does nothing. {meant}")


@pytest.mark.parametrize("other", ["triton", "off"])
def test_two_flags_that_contradict_each_other(other: str) -> None:
    with pytest.raises(SettingError, match=f"USE_NATIVE_LAYERNORM=1 .* NORM_PLUGIN={other} .*unset one"):
        settings.read({"USE_NATIVE_LAYERNORM": "1", "NORM_PLUGIN": other})


@pytest.mark.parametrize("environ", [{}, {"NORM_PLUGIN": "native"}, {"NORM_PLUGIN": "auto"}])
def test_use_native_layernorm_is_native(environ: dict[str, str]) -> None:
    assert settings.read({"USE_NATIVE_LAYERNORM": "1"} | environ).backend == "native"
    assert settings.read({"USE_NATIVE_LAYERNORM": "0"} | environ).backend == environ.get("NORM_PLUGIN", "off")


def test_override_is_undone_and_watched() -> None:
    seen: list[str] = []
    before = settings.get()

    def watch() -> None:
        seen.append(settings.get().backend)

    end = settings.on_change(watch)
    try:
        with settings.override(backend="triton", strict=True) as inside:
            assert inside == settings.get()
            assert (inside.backend, inside.strict) == ("triton", True)
            with pytest.raises(KeyError), settings.override(backend="auto"):
                raise KeyError
            assert settings.get() == inside
        assert settings.get() == before
        assert seen == ["triton", "auto", "triton", before.backend]
    finally:
        end()


def test_override_of_an_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="bakend"), settings.override(bakend="native"):
        pass


def test_the_table_names_every_flag() -> None:
    lines = settings.table().splitlines()
    assert len(lines) == len(FLAGS) + 2
    for flag, line in zip(FLAGS, lines[2:], strict=True):
        assert f"`{flag.name}`" in line
        assert flag.help in line


def in_a_process(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in VALUES and name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environ, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_environment_reaches_a_call() -> None:
    """It is read at the first use, not at import: a wrong value must not break an import in an engine's worker."""
    code = (
        "import torch, norm_plugin\n"
        "from norm_plugin import dispatch\n"
        "print('imported')\n"
        "norm_plugin.rmsnorm(torch.ones(2, 8), None)\n"
        "print(dispatch.routes()[0].reason)"
    )
    native = in_a_process(code, NORM_PLUGIN="native")
    assert native.stdout.split("\n")[1] == "the native backend was asked for", native.stderr
    assert "NORM_PLUGIN" not in native.stderr
    other = in_a_process(code, NORM_PLUGIN_BACKEND="native")
    assert "NORM_PLUGIN_BACKEND is not a flag of norm_plugin, and does nothing. Was NORM_PLUGIN meant?" in other.stderr
    wrong = in_a_process(code, NORM_PLUGIN="nativ")
    assert wrong.returncode != 0
    assert wrong.stdout == "imported\n"
    assert "SettingError: NORM_PLUGIN='nativ' is not one of its values: off, auto, triton, native." in wrong.stderr
