"""norm-plugin autoload: registers norm_plugin where SGLang loads no plugin: Ray actors, encoder workers, one_batch.

Python runs the one line of a .pth at every start. The line asks for two environment variables. Only if one of them asks
for norm_plugin does it import the module beside it, which waits for SGLang. pip knows nothing of the two files.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import sysconfig
from pathlib import Path
from typing import Any

from norm_plugin.commands.errors import CommandError
from norm_plugin.commands.terminal import Console, escape

DESCRIPTION = (
    "SGLang loads no plugin in Ray actors, in encoder workers and in sglang.bench_one_batch. Switched on, a .pth file "
    "in this Python's site-packages registers norm_plugin there too, in every process where NORM_PLUGIN or "
    "USE_NATIVE_LAYERNORM asks for it; in all others it asks the environment for the two and does nothing. pip does "
    "not know the file: switch it off before you uninstall norm-plugin. One that stays behind does nothing either."
)
MODULE = "norm_plugin_autoload"
LINE = (
    'import os; ((os.environ.get("NORM_PLUGIN") or "off") != "off" '
    'or (os.environ.get("USE_NATIVE_LAYERNORM") or "0") != "0") '
    f'and __import__("importlib.util").util.find_spec("{MODULE}") and __import__("{MODULE}")\n'
)


def add(verbs: Any) -> None:
    options = verbs.add_parser("autoload", help="SGLang's processes that load no plugin", description=DESCRIPTION)
    options.add_argument("action", choices=("on", "off", "status"), help="switch it on or off for this Python, or ask")
    options.add_argument("--json", action="store_true", help="print JSON")
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> None:
    folder = Path(sysconfig.get_path("purelib"))  # where this Python looks for .pth files
    line, module = folder / f"{MODULE}.pth", folder / f"{MODULE}.py"
    try:
        if options.action == "on":
            source = importlib.resources.files("norm_plugin.engines").joinpath("autoloaded.py")
            module.write_text(source.read_text())
            line.write_text(LINE)  # last, so that it never lacks its module
        elif options.action == "off":
            compiled = (folder / "__pycache__").glob(f"{MODULE}.*.pyc")
            for path in (line, module, *compiled):  # the .pth first
                path.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"{folder} cannot be written ({error.strerror}): run this as its owner.") from error
    on = line.exists() and module.exists()
    if options.json:
        console.print_json(json.dumps({"on": on, "file": str(line)}))
        return
    state = f"autoload is {'on' if on else 'off'}: {line} {'is' if on else 'is not'} there"
    console.print(escape(state), soft_wrap=True)
    if options.action == "on":
        console.print("Switch it off before you uninstall norm-plugin: norm-plugin autoload off", soft_wrap=True)
