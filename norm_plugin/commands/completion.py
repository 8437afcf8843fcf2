"""norm-plugin completion: prints what a shell needs to complete our verbs, options and values.

The words before the cursor that name a verb, or an action of one, say which command is typed. A word after an option
that takes a value is its value. After -- comes the command of another program.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from typing import Any

from norm_plugin.commands.terminal import Console

DESCRIPTION = """\
Prints the completion of norm-plugin for a shell. Put it where the shell looks:

  norm-plugin completion bash >~/.local/share/bash-completion/completions/norm-plugin
  norm-plugin completion zsh >~/.zfunc/_norm-plugin        with fpath+=~/.zfunc before compinit in ~/.zshrc
  norm-plugin completion fish >~/.config/fish/completions/norm-plugin.fish
"""

#: Words of a metavar whose value is a file or a folder.
PATHS = {"FILE", "PATH", "FOLDER", "DIR"}

#: How bash and zsh offer words, files, a value that cannot be known, and the command behind -- as word $1.
BASH = """\
_norm_plugin_words() { COMPREPLY=($(compgen -W "${*%%:*}" -- "$current")); } # without the descriptions
_norm_plugin_files() { compopt -o filenames 2>/dev/null; COMPREPLY+=($(compgen -f -- "$current")); }
_norm_plugin_value() { :; }
_norm_plugin_command() {
    _norm_plugin_files
    (($1 < COMP_CWORD)) || COMPREPLY+=($(compgen -c -- "$current"))
}
_norm_plugin() {
    local current=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=()
    _norm_plugin_at "${COMP_WORDS[@]:1:COMP_CWORD-1}"
}
complete -F _norm_plugin norm-plugin
"""
ZSH = """\
_norm_plugin_words() { local -a found; found=("$@"); _describe norm-plugin found }
_norm_plugin_files() { _files }
_norm_plugin_value() { _message value }
_norm_plugin_command() { shift $1 words; ((CURRENT -= $1)); _normal }
_norm_plugin() { _norm_plugin_at "${(@)words[2,CURRENT-1]}" }
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _norm_plugin "$@"; else compdef _norm_plugin norm-plugin; fi
"""
#: What both then do with the words before the cursor.
CASES = """\
_norm_plugin_at() {{
    local at= before= word i=1
    for word; do
        i=$((i + 1))
        if [ "$word" = -- ]; then
            _norm_plugin_command $i
            return
        fi
        case "${{at:+$at }}$word" in
            ({commands}) at="${{at:+$at }}$word" ;;
        esac
        before=$word
    done
    case "$at $before" in
{values}
    esac
    case $at in
{words}
    esac
}}
"""

FISH = """\
function __norm_plugin_at
    set -l at
    for word in (commandline -opc)[2..-1]
        test "$word" = --; and return 1
        contains -- (string join -- ' ' $at $word) {commands}; and set at $at $word
    end
    test "$at" = "$argv"
end
complete -c norm-plugin -e
complete -c norm-plugin -f
complete -c norm-plugin -n 'contains -- -- (commandline -opc)' -F
complete -c norm-plugin -n 'test (commandline -opc)[-1] = --' -a '(__fish_complete_command)'
{rules}
"""


def add(verbs: Any) -> None:
    options = verbs.add_parser(
        "completion",
        help="complete norm-plugin in a shell",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that is to complete")
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> None:
    from norm_plugin import cli  # which imports this module for its list of verbs

    made = f"# Made by `norm-plugin completion {options.shell}` from the options that norm-plugin takes.\n"
    commands = dict(_commands(cli.parser()))
    if options.shell == "fish":
        print(made + _fish(commands), end="")
    elif options.shell == "zsh":
        print(f"#compdef norm-plugin\n{made}{_cases(commands)}{ZSH}", end="")
    else:
        print(made + _cases(commands) + BASH, end="")


# --- what the parser takes, read from the parser itself so that nothing can differ ---------------------------------

Commands = dict[str, argparse.ArgumentParser]


def _commands(parser: argparse.ArgumentParser, at: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every verb and action by what is typed for it; "" is norm-plugin itself."""
    yield at, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from _commands(below, f"{at} {name}".strip())


def _words(action: argparse.Action) -> list[tuple[str, str]]:
    """What can be typed for an argument, with its description: the names of an option, else the values."""
    if isinstance(action, argparse._SubParsersAction):
        return [(choice.dest, choice.help or "") for choice in action._choices_actions]
    about = (action.help or "").replace("%%", "%")
    return [(name, about) for name in action.option_strings] or [(value, "") for value in _values(action)]


def _values(action: argparse.Action) -> list[str]:
    return [str(value) for value in action.choices or ()]


def _is_path(action: argparse.Action) -> bool:
    return isinstance(action.metavar, str) and bool(PATHS & set(re.split(r"\W+", action.metavar)))


def _positional_path(parser: argparse.ArgumentParser) -> bool:
    return any(_is_path(action) for action in parser._actions if not action.option_strings)


# --- what the shells read -----------------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """The text quoted as one word, as all three shells do it."""
    return "'" + text.replace("'", "'\\''") + "'"


def _joined(texts: Iterable[str], between: str) -> str:
    return between.join(quoted(text) for text in texts if text)


def _cases(commands: Commands) -> str:
    """For bash and zsh: a case for each option with a value, and one for each command; words stand as word:about."""
    values, words = [], []
    for at, parser in commands.items():
        for option in parser._actions:
            if option.option_strings and option.nargs != 0:
                case = _joined((f"{at} {name}" for name in option.option_strings), "|")
                offer = "files" if _is_path(option) else "value"
                if option.choices:
                    offer = f"words {_joined(_values(option), ' ')}"
                values.append(f"        ({case}) _norm_plugin_{offer}; return ;;")
        said = _joined((f"{word}:{about}" for action in parser._actions for word, about in _words(action)), " ")
        files = "; _norm_plugin_files" * _positional_path(parser)
        words.append(f"        ({quoted(at)}) _norm_plugin_words {said}{files} ;;")
    return CASES.format(commands=_joined(commands, "|"), values="\n".join(values), words="\n".join(words))


def _fish(commands: Commands) -> str:
    """For fish: a rule for each word."""
    rules = []
    for at, parser in commands.items():
        rule = f"complete -c norm-plugin -n {quoted(f'__norm_plugin_at {at}'.strip())}"
        for action in parser._actions:
            if not action.option_strings:
                rules += [f"{rule} -a {word} -d {quoted(about)}" for word, about in _words(action)]
                continue
            value = " -r -F" if _is_path(action) else " -x" * (action.nargs != 0)
            if action.choices:
                value = f" -x -a {quoted(' '.join(_values(action)))}"
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in action.option_strings)
            rules.append(f"{rule} {names}{value} -d {quoted(_words(action)[0][1])}")
        rules += [f"{rule} -F"] * _positional_path(parser)
    return FISH.format(commands=_joined(commands, " "), rules="\n".join(rules))
