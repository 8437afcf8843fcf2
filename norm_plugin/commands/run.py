"""norm-plugin run: set the flags, check that they can work, say which layers will be ours, and become the engine."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import Any

from norm_plugin import settings
from norm_plugin.commands import doctor
from norm_plugin.commands.errors import NOT_RUN, WRONG_ARGUMENT, CommandError
from norm_plugin.commands.terminal import Console, escape
from norm_plugin.engines import report_file
from norm_plugin.verify.health import before_start
from norm_plugin.verify.served import plan, served

DESCRIPTION = (
    "Sets NORM_PLUGIN, says in one line which layers will be ours in the mode of the command, and becomes the command: "
    "signals reach it, and its exit code is that of this one. Before, in seconds, it checks the flags, that the engine "
    "loads the plugin, that the report can be written, and one op against its oracle on the backend that is asked for; "
    "`norm-plugin doctor` checks everything. Example: norm-plugin run -- vllm serve /models/llama"
)
EXIT_CODES = "exit codes: 2 the command was not started, with the reason; else those of the command"


def add(verbs: Any) -> None:
    options = verbs.add_parser("run", help="serve with the plugin on", description=DESCRIPTION, epilog=EXIT_CODES)
    options.add_argument("--backend", choices=("auto", "triton", "native"), help="default: NORM_PLUGIN, or auto")
    options.add_argument("--report", metavar="FOLDER", help="sets NORM_PLUGIN_REPORT")
    options.add_argument("--no-probe", action="store_true", help="start without computing one op")
    options.add_argument("--json", metavar="FILE", help="write there what was found")
    options.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="as you would type it")
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Run the verb. If nothing is wrong, this process becomes the command."""
    command = doctor.typed(options)
    if not command:
        raise CommandError("there is no command to run: norm-plugin run -- vllm serve /models/llama", WRONG_ARGUMENT)
    if shutil.which(command[0]) is None:
        raise CommandError(f"{command[0]} is not a program that can be found on the PATH.")
    if folder := options.report or os.environ.get("NORM_PLUGIN_REPORT"):
        if why := report_file.unwritable(folder):  # now, and not once the engine has loaded its model
            raise CommandError(why)
        os.environ["NORM_PLUGIN_REPORT"] = os.path.abspath(folder)
    if options.backend:
        os.environ["NORM_PLUGIN"] = options.backend
    elif (os.environ.get("NORM_PLUGIN") or "off") == "off" and os.environ.get("USE_NATIVE_LAYERNORM") != "1":
        os.environ["NORM_PLUGIN"] = "auto"
    errors = Console(stderr=True, highlight=False)
    command_of = served(command, os.environ)
    found = before_start(command_of.engine if command_of else None, probe=not options.no_probe)
    if options.json:
        doctor.write(found, options.json)
    if found.well:
        ours = "this starts no engine that norm_plugin knows; the flags are set for whatever it starts"
        if command_of:
            ours = plan(command_of, settings.read(os.environ), os.environ)
        for sentence in (*found.misspelt, f"{ours}."):
            errors.print(f"norm-plugin run: {escape(sentence)}", soft_wrap=True)
        sys.stdout.flush()
        os.execvp(command[0], command)
    doctor.show(found, errors)
    errors.print(f"norm-plugin run: {command[0]} was not started, because of what is marked above.", soft_wrap=True)
    return NOT_RUN
