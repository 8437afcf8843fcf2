"""norm-plugin run: set the flags, look whether all is well, and become the engine."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import Any

from rich.console import Console

from norm_plugin.commands import doctor
from norm_plugin.commands.errors import DIFFERENT, WRONG_ARGUMENT, CommandError

DESCRIPTION = (
    "Sets NORM_PLUGIN, checks this machine as `norm-plugin doctor` does, and becomes the command: signals reach it, "
    "and its exit code is that of this one. Example: norm-plugin run -- vllm serve /models/llama"
)
NOT_FOUND = 127


def add(verbs: Any) -> None:
    """The verb and its options."""
    options = verbs.add_parser("run", help="serve with the plugin on", description=DESCRIPTION)
    options.add_argument("--backend", choices=("auto", "triton", "native"), help="default: NORM_PLUGIN, or auto")
    options.add_argument("--report", metavar="FOLDER", help="sets NORM_PLUGIN_REPORT")
    options.add_argument("--no-probe", action="store_true", help="start without the numeric probe of every op")
    options.add_argument("--json", metavar="FILE", help="write there what doctor found")
    options.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="as you would type it")
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """The verb. Where all is well this process becomes the command."""
    command = doctor.typed(options)
    if not command:
        raise CommandError("there is no command to run: norm-plugin run -- vllm serve /models/llama", WRONG_ARGUMENT)
    if shutil.which(command[0]) is None:
        raise CommandError(f"{command[0]} is not a program that can be found on the PATH.", NOT_FOUND)
    if options.backend:
        os.environ["NORM_PLUGIN"] = options.backend
    elif os.environ.get("NORM_PLUGIN", "off") == "off" and os.environ.get("USE_NATIVE_LAYERNORM", "0") != "1":
        os.environ["NORM_PLUGIN"] = "auto"
    if options.report:
        os.environ["NORM_PLUGIN_REPORT"] = os.path.abspath(options.report)
    errors = Console(stderr=True, highlight=False)
    found = doctor.examine(command, probe=not options.no_probe)
    if options.json:
        doctor.write(found, options.json)
    if found.well:
        errors.print(f"norm-plugin run: {doctor.line(found)}; starting {command[0]}", soft_wrap=True)
        sys.stdout.flush()
        os.execvp(command[0], command)
    doctor.show(found, errors)
    errors.print(f"norm-plugin run: {command[0]} was not started, because of what is marked above.", soft_wrap=True)
    return DIFFERENT
