"""norm-plugin autoload: registers norm_plugin in the processes of SGLang that load no plugins."""

from __future__ import annotations

import argparse
import json
from typing import Any

from norm_plugin import autoload
from norm_plugin.commands.errors import NOT_RUN, CommandError
from norm_plugin.commands.terminal import Console, escape

DESCRIPTION = (
    "SGLang loads no plugin in Ray actors, in encoder workers and in sglang.bench_one_batch. Switched on, a .pth file "
    "in this Python's site-packages registers norm_plugin there too, in every process where NORM_PLUGIN or "
    "USE_NATIVE_LAYERNORM asks for it; in all others it asks the environment for the two and does nothing. pip does "
    "not know the file: switch it off before you uninstall norm-plugin. One that stays behind does nothing either."
)
ACTIONS = ("on", "off", "status")


def add(verbs: Any) -> None:
    options = verbs.add_parser("autoload", help="SGLang's processes that load no plugin", description=DESCRIPTION)
    options.add_argument("action", choices=ACTIONS, help="switch it on or off for this Python, or ask")
    options.add_argument("--json", action="store_true", help="print JSON")
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> None:
    at = autoload.folder()
    try:
        if options.action == "on":
            autoload.switch_on(at)
        elif options.action == "off":
            autoload.switch_off(at)
    except autoload.AutoloadError as error:
        raise CommandError(f"{error}.", NOT_RUN) from error
    on, line = autoload.is_on(at), autoload.files(at)[0]
    if options.json:
        console.print_json(json.dumps({"on": on, "file": str(line)}))
        return
    state = f"autoload is {'on' if on else 'off'}: {line} {'is' if on else 'is not'} there"
    console.print(escape(state), soft_wrap=True)
    if options.action == "on":
        console.print("Switch it off before you uninstall norm-plugin: norm-plugin autoload off", soft_wrap=True)
