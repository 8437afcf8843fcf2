"""Shell completion, in the shells: each offers what the command line takes."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the command line prints with rich")

from norm_plugin import cli

ROOT = Path(__file__).resolve().parents[2]
Typed = tuple[str, ...]

#: The words typed so far, the last one unfinished, and some words that must be offered.
KNOWN: dict[Typed, set[str]] = {
    ("",): {"verify", "patch", "completion"},
    ("--ver",): {"--version"},
    ("verify", "--html", "a_fi"): {"a_file"},
    ("report", "a_fi"): {"a_file"},
    ("patch", ""): {"list", "check", "apply", "revert"},
    ("patch", "revert", "--engine", "s"): {"sglang"},
    ("autoload", "o"): {"on", "off"},
    ("completion", ""): {"bash", "zsh", "fish"},
    ("bench", "--json", "patch", "--qui"): {"--quick"},
}

#: The program of each shell: it loads the script, asks it for each list of words, and prints a line for each.
BASH = """
cd "$1" && source ./bash
while read -r line; do
    IFS='|' read -ra COMP_WORDS <<<"norm-plugin|$line|."
    unset 'COMP_WORDS[-1]' && COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _norm_plugin; echo "${COMPREPLY[@]}"
done <asked
"""
# zsh completes only in its line editor, so these functions stand in for it
ZSH = """
cd $1
compdef() { }
compadd() { shift; answer+=(${(M)@:#$words[CURRENT]*}) }
_files() { answer+=($words[CURRENT]*(N)) }
_message() { }
_normal() { answer+=("normal:$words[*]:$CURRENT") }
_describe() { for one in ${(P)2}; do compadd -- ${one%%:*}; done }
source ./zsh
while read -r line; do
    words=(norm-plugin "${(@s:|:)line}") CURRENT=$#words answer=()
    _norm_plugin
    print -r -- $answer
done <asked
"""
FISH = """
set -a fish_function_path (dirname (status fish-path))/../share/fish/functions # where it is unpacked, and not installed
cd $argv[1]; source ./fish
while read line
    set -l words norm-plugin (string split '|' -- $line)
    echo (complete -C (string join -- ' ' $words) | string replace -r '\\t.*' '')
end <asked
"""
PROGRAMS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of zsh and fish."""
    found = subprocess.run([ROOT / "scripts" / "shells"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"zsh and fish cannot be had here: {found.stderr.strip()}")
    return Path(found.stdout.split()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of each shell, printed by the command, and one file that can be completed."""
    place = tmp_path_factory.mktemp("completion")
    (place / "a_file").touch()
    for shell in PROGRAMS:
        with (place / shell).open("w") as script, contextlib.redirect_stdout(script):
            assert cli.main(["completion", shell]) == 0
    return place


def ask(shell: str, folder: Path, programs: Path, *lists: Typed) -> list[set[str]]:
    """What the shell offers for each list of words."""
    (folder / "asked").write_text("".join("|".join(words) + "\n" for words in lists))
    program = shutil.which("bash") if shell == "bash" else str(programs / shell)
    assert program is not None
    start = {"bash": ["--norc", "-c"], "zsh": ["-f", "-c"], "fish": ["--no-config", "-c"]}[shell]
    name = ["-"] if shell != "fish" else []  # the name of the program, $0
    command = [program, *start, PROGRAMS[shell], *name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "", done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def every_parser(parser: argparse.ArgumentParser, words: Typed = ()) -> Iterator[tuple[Typed, argparse.ArgumentParser]]:
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                yield from every_parser(one, (*words, name))


@pytest.mark.parametrize("shell", PROGRAMS)
def test_it_offers_what_is_known(shell: str, folder: Path, programs: Path) -> None:
    for (typed, wanted), offered in zip(KNOWN.items(), ask(shell, folder, programs, *KNOWN), strict=True):
        assert wanted <= offered, f"{shell}: {typed}"
        assert all(word.startswith(typed[-1]) for word in offered), f"{shell}: {typed} has {offered}"


@pytest.mark.parametrize("shell", PROGRAMS)
def test_it_offers_every_option_and_no_other(shell: str, folder: Path, programs: Path) -> None:
    parsers = dict(every_parser(cli.parser()))
    assert len(parsers) > 10
    answers = ask(shell, folder, programs, *((*words, "--") for words in parsers))
    for (words, parser), offered in zip(parsers.items(), answers, strict=True):
        long = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
        assert offered == long, f"{shell}: {' '.join(words)}"


@pytest.mark.parametrize("shell", PROGRAMS)
def test_it_offers_the_values_of_every_option(shell: str, folder: Path, programs: Path) -> None:
    lists = {
        (*words, action.option_strings[-1], ""): set(map(str, action.choices))
        for words, parser in every_parser(cli.parser())
        for action in parser._actions
        if action.option_strings and action.choices
    }
    assert len(lists) > 5
    for (typed, wanted), offered in zip(lists.items(), ask(shell, folder, programs, *lists), strict=True):
        assert offered == wanted, f"{shell}: {typed}"


@pytest.mark.parametrize("shell", PROGRAMS)
def test_behind_the_dashes_is_another_command(shell: str, folder: Path, programs: Path) -> None:
    first, later = ask(shell, folder, programs, ("run", "--", "bas"), ("run", "--", "bash", "a_fi"))
    if shell == "zsh":  # zsh completes it with all that it knows of that command
        assert first == {"normal:bas:1"}
        assert later == {"normal:bash", "a_fi:2"}
    else:
        assert "bash" in first
        assert later == {"a_file"}


def test_a_new_option_is_offered_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The options are written only once, in the parser."""
    parser = cli.parser

    def with_one_more() -> argparse.ArgumentParser:
        found = parser()
        dict(every_parser(found))["doctor",].add_argument("--one-more", choices=("left", "right"))
        return found

    monkeypatch.setattr(cli, "parser", with_one_more)
    for shell in PROGRAMS:
        assert cli.main(["completion", shell]) == 0
        said = capsys.readouterr().out
        assert "one-more" in said
        assert "right" in said
