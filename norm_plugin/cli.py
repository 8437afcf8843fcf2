"""norm-plugin: the command line. A file in `commands` for each verb: `add` declares its options, `run` does it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from norm_plugin.commands import autoload, bench, completion, doctor, patch, report, run, tune, verify
from norm_plugin.commands.errors import EXIT_CODES, NOT_RUN, WRONG_ARGUMENT, CommandError
from norm_plugin.commands.signals import Ended, unwound
from norm_plugin.commands.terminal import Console, printable
from norm_plugin.settings import SettingError
from norm_plugin.verify.runs import EngineFailed
from norm_plugin.version import __version__

VERBS = (verify, report, doctor, run, patch, autoload, bench, tune, completion)

DESCRIPTION = "The norms of vLLM and SGLang, replaced where an environment flag says so: show it, ask it, run it."
EPILOG = """\
examples:
  norm-plugin doctor                                            is all well on this machine?
  norm-plugin verify --engine vllm --model tiny:llama           does a patched engine answer as before?
  norm-plugin run -- vllm serve /models/llama                   serve with the plugin on
  norm-plugin report /tmp/report                                who normalized, and why not another

Each verb has --help, and each but completion --json. Exit codes: 0 well; 1 tested, and it is not; 2 it could not be
tested or done, with the reason on standard error. `run` has those of what it runs.
"""


class Parser(argparse.ArgumentParser):
    """Says one line for a wrong argument, where argparse prints the whole usage, and exit codes in every help."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**{"epilog": EXIT_CODES, **named})

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_ARGUMENT, f"{self.prog}: {message} ({self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="norm-plugin",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"norm-plugin {__version__}")
    verbs = found.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. What cannot be done ends here with one line."""
    options = parser().parse_args(arguments)
    # a pipe has no width, and a table needs one
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        with unwound():
            code: int | None = options.do(options, console)
        return code or 0
    except (CommandError, EngineFailed, SettingError) as error:
        sys.exit(_said(options.verb, str(error), getattr(error, "code", NOT_RUN)))
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        sys.exit(_said(options.verb, printable(what), NOT_RUN))
    except KeyboardInterrupt:
        sys.exit(_said(options.verb, "stopped.", 130))
    except Ended as end:
        sys.exit(_said(options.verb, f"ended by {end.name}.", end.exit_code))


def _said(verb: str, message: str, code: int) -> int:
    print(f"norm-plugin {verb}: {message}", file=sys.stderr)
    return code
