"""norm-plugin completion: prints what a shell needs to complete our verbs, options and values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from norm_plugin.commands import shells
from norm_plugin.commands.terminal import Console

DESCRIPTION = """\
Prints the completion of norm-plugin for a shell. Put it where the shell looks:

  norm-plugin completion bash >~/.local/share/bash-completion/completions/norm-plugin
  norm-plugin completion zsh >~/.zfunc/_norm-plugin        with fpath+=~/.zfunc before compinit in ~/.zshrc
  norm-plugin completion fish >~/.config/fish/completions/norm-plugin.fish
"""

#: Words of a metavar whose value is a file or a folder.
PATHS = {"FILE", "PATH", "FOLDER", "DIR"}


@dataclass(frozen=True)
class Argument:
    """An option or a positional argument, with its possible `values` if they are listed."""

    names: tuple[str, ...]
    about: str
    takes_value: bool
    values: tuple[str, ...]
    is_path: bool


@dataclass(frozen=True)
class Command:
    """A verb, or an action of one. `words` is how it is typed: () is norm-plugin itself."""

    words: tuple[str, ...]
    about: str
    options: tuple[Argument, ...]
    positional: tuple[Argument, ...]
    below: tuple[Command, ...]

    def every(self) -> Iterator[Command]:
        """This command and all below it."""
        yield self
        for command in self.below:
            yield from command.every()


def add(verbs: Any) -> None:
    """Add the verb and its options."""
    options = verbs.add_parser(
        "completion",
        help="complete norm-plugin in a shell",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("shell", choices=tuple(shells.SHELLS), help="the shell that is to complete")
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the verb."""
    from norm_plugin import cli  # which imports this module for its list of verbs

    print(shells.SHELLS[options.shell](tree(cli.parser())), end="")


def tree(parser: argparse.ArgumentParser, words: tuple[str, ...] = (), about: str = "") -> Command:
    """The commands and arguments of a parser, read from the parser itself so that nothing can differ."""
    options, positional, below = [], [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            said = {choice.dest: choice.help or "" for choice in action._choices_actions}
            below = [tree(one, (*words, name), said[name]) for name, one in action.choices.items()]
        elif action.option_strings:
            options.append(_argument(action))
        elif action.nargs != argparse.REMAINDER:  # the command of another program
            positional.append(_argument(action))
    return Command(words, about, tuple(options), tuple(positional), tuple(below))


def _argument(action: argparse.Action) -> Argument:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    return Argument(
        names=tuple(action.option_strings),
        about=(action.help or "").replace("%%", "%"),
        takes_value=action.nargs != 0,
        values=tuple(map(str, action.choices or ())),
        is_path=bool(PATHS & set(re.split(r"\W+", metavar))),
    )
