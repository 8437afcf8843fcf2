"""norm-plugin report: which layer ran what, how often, and why not another."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from norm_plugin.commands import verify
from norm_plugin.commands.errors import WRONG_ARGUMENT, CommandError, save
from norm_plugin.commands.terminal import Console, printable
from norm_plugin.engines import ENGINES, report_reader
from norm_plugin.reporting import page, terminal
from norm_plugin.verify.runs import Plan, Run, execute

DESCRIPTION = (
    "Reads the folder that NORM_PLUGIN_REPORT names, of a server that runs or has ended in whatever way; or, with "
    "--engine, runs a few prompts through a patched engine and reports on that."
)


def add(verbs: Any) -> None:
    options = verbs.add_parser("report", help="say which layer ran what, and why", description=DESCRIPTION)
    options.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="what NORM_PLUGIN_REPORT names")
    options.add_argument("--engine", choices=ENGINES, help="run this engine now")
    options.add_argument("--model", default="tiny:llama", metavar="PATH|tiny:NAME", help="with --engine")
    options.add_argument("--backend", choices=("auto", "triton", "native"), default="auto", help="with --engine")
    options.add_argument("--device", choices=("cpu", "cuda"), help="with --engine; default: cuda if torch has it")
    options.add_argument("--python", default=sys.executable, metavar="PATH", help="the interpreter with the engine")
    options.add_argument("--html", type=Path, metavar="FILE", help="write a page to show to others")
    options.add_argument("--json", type=Path, metavar="FILE", help="write it there as well")
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> None:
    if (options.folder is None) == (options.engine is None):
        raise CommandError("give a FOLDER that a server has written, or --engine to run one.", WRONG_ARGUMENT)
    processes, others = (ran(options), {}) if options.engine else read(options.folder)
    if options.json:
        save(options.json, json.dumps(processes, indent=1) + "\n")
    if options.html:
        save(options.html, page.page(processes, others))
    for process in processes:
        terminal.show(process, console)
    terminal.skipped(others, console)


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The reports in the folder, and by name the files that are none, with the reason."""
    processes, others = report_reader.look(folder) if folder.is_dir() else ([], {})
    if not processes:
        alas = "".join(f"\n{printable(name)} is no report: {printable(why)}" for name, why in others.items())
        raise CommandError(
            f"there is no report in {folder}. A server writes one, once its model is loaded, if it was started with "
            f"NORM_PLUGIN_REPORT={folder} and NORM_PLUGIN=auto, triton or native; `norm-plugin doctor` says whether "
            f"it is hooked.{alas}"
        )
    return processes, others


def ran(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run an engine, and describe the run as a process of a report."""
    device = options.device or verify.find_device()
    verify.check_backend(options.backend, device)
    verify.check_engine(options.engine, options.python)
    (model,) = verify.find_models(options.model, options.engine, device)[:1]
    with tempfile.TemporaryDirectory(prefix="norm-plugin-") as folder:
        arguments = ["--device", device]
        plan = Plan(options.engine, options.python, [model], verify.find_prompts(None)[:4], Path(folder), arguments)
        with verify.watching("patched", plan) as watch:
            (outcome,) = execute(plan, Run("patched", verify.patched_flags(options.backend)), watch)
    engine = {"engine": outcome.engine, "version": outcome.version, "hooks": outcome.hooks, "missing": outcome.missing}
    about = {"command": f"norm-plugin report --engine {options.engine}", "models": [str(model)]}
    return [{**about, "engines": [engine], "flags": outcome.flags, "rows": outcome.rows}]
