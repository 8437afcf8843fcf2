"""Writes the completion of norm-plugin for each shell. All three read the typed words in the same way.

The words before the cursor that name a verb, or an action of one, say which command is typed. A word after an option
that takes a value is its value. After -- comes the command of another program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from norm_plugin.commands.completion import Argument, Command

MADE = "# Made by `norm-plugin completion {shell}` from the options that norm-plugin takes."

BASH = """\
_norm_plugin() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} at= word i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        if [ "$word" = -- ]; then
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "$current"))
            ((i < COMP_CWORD - 1)) || COMPREPLY+=($(compgen -c -- "$current"))
            return
        fi
        case "${{at:+$at }}$word" in
            {commands}) at=${{at:+$at }}$word ;;
        esac
    done
    case "$at $before" in
{values}
    esac
    case $at in
{words}
    esac
}}
complete -F _norm_plugin norm-plugin
"""

ZSH = """\
_norm_plugin() {{
    local at= word before=$words[CURRENT-1] i
    local -a found
    for ((i = 2; i < CURRENT; i++)); do
        word=$words[i]
        if [[ $word == -- ]]; then
            shift $i words
            ((CURRENT -= i))
            _normal
            return
        fi
        case "${{at:+$at }}$word" in
            ({commands}) at="${{at:+$at }}$word" ;;
        esac
    done
    case "$at $before" in
{values}
    esac
    case $at in
{words}
    esac
    _describe norm-plugin found
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _norm_plugin "$@"; else compdef _norm_plugin norm-plugin; fi
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
function __norm_plugin_behind_dashes
    contains -- -- (commandline -opc)
end
complete -c norm-plugin -e
complete -c norm-plugin -f
complete -c norm-plugin -n __norm_plugin_behind_dashes -F
complete -c norm-plugin -n 'test (commandline -opc)[-1] = --' -a '(__fish_complete_command)'
{rules}
"""


def quoted(text: str) -> str:
    """The text quoted as one word, as all three shells do it."""
    return "'" + text.replace("'", "'\\''") + "'"


def typed(commands: list[Command]) -> list[str]:
    """How each verb and action is typed, quoted."""
    return [quoted(" ".join(command.words)) for command in commands if command.words]


def bash(root: Command) -> str:
    """The completion for bash, which shows no descriptions."""
    values, words = [], []
    for command in root.every():
        at = " ".join(command.words)
        for option in (option for option in command.options if option.takes_value):
            case = "|".join(quoted(f"{at} {name}") for name in option.names)
            values.append(f"        {case}) {_bash_value(option)}; return ;;")
        names = [name for option in command.options for name in option.names]
        names += [below.words[-1] for below in command.below]
        names += [value for one in command.positional for value in one.values]
        reply = f'COMPREPLY=($(compgen -W {quoted(" ".join(names))} -- "$current"))'
        if any(one.is_path for one in command.positional):
            reply += '; compopt -o filenames 2>/dev/null; COMPREPLY+=($(compgen -f -- "$current"))'
        words.append(f"        {quoted(at)}) {reply} ;;")
    commands = "|".join(typed(list(root.every())))
    return f"{MADE.format(shell='bash')}\n" + BASH.format(
        commands=commands, values="\n".join(values), words="\n".join(words)
    )


def _bash_value(option: Argument) -> str:
    if option.values:
        return f'COMPREPLY=($(compgen -W {quoted(" ".join(option.values))} -- "$current"))'
    return 'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$current"))' if option.is_path else ":"


def zsh(root: Command) -> str:
    """The completion for zsh: a name and its description are one word with a colon between them."""
    values, words = [], []
    for command in root.every():
        at = " ".join(command.words)
        for option in (option for option in command.options if option.takes_value):
            case = "|".join(quoted(f"{at} {name}") for name in option.names)
            values.append(f"        ({case}) {_zsh_value(option)}; return ;;")
        named = [(name, option.about) for option in command.options for name in option.names]
        named += [(below.words[-1], below.about) for below in command.below]
        named += [(value, "") for one in command.positional for value in one.values]
        found = " ".join(quoted(f"{name.replace(':', chr(92) + ':')}:{about}") for name, about in named)
        files = "_files; " if any(one.is_path for one in command.positional) else ""
        words.append(f"        ({quoted(at)}) {files}found=({found}) ;;")
    commands = "|".join(typed(list(root.every())))
    text = ZSH.format(commands=commands, values="\n".join(values), words="\n".join(words))
    return f"#compdef norm-plugin\n{MADE.format(shell='zsh')}\n{text}"


def _zsh_value(option: Argument) -> str:
    if option.values:
        return "compadd -- " + " ".join(map(quoted, option.values))
    return "_files" if option.is_path else "_message value"


def fish(root: Command) -> str:
    """The completion for fish: a rule for each word."""
    rules = []
    for command in root.every():
        rule = f"complete -c norm-plugin -n {quoted(' '.join(['__norm_plugin_at', *command.words]))}"
        for option in command.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            value = ""
            if option.takes_value:
                value = (
                    f" -x -a {quoted(' '.join(option.values))}" if option.values else " -r -F" * option.is_path or " -x"
                )
            rules.append(f"{rule} {names}{value} -d {quoted(option.about)}")
        rules += [f"{rule} -a {below.words[-1]} -d {quoted(below.about)}" for below in command.below]
        rules += [f"{rule} -a {quoted(' '.join(one.values))}" for one in command.positional if one.values]
        if any(one.is_path for one in command.positional):
            rules.append(f"{rule} -F")
    commands = " ".join(typed(list(root.every())))
    return f"{MADE.format(shell='fish')}\n" + FISH.format(commands=commands, rules="\n".join(rules))


SHELLS: dict[str, Callable[[Command], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
