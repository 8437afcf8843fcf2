"""norm-plugin patch: source patches for an engine that somebody builds or vendors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from norm_plugin.commands.errors import CommandError
from norm_plugin.commands.terminal import Console, Table, Text, escape, printable
from norm_plugin.patching import PatchError, catalog, work
from norm_plugin.patching.site import DISTRIBUTIONS, Site, find

DESCRIPTION = (
    "Source patches for vLLM and SGLang where no plugin loads. A patch is applied to the exact file that it was made "
    "for, known by its hash; all of those named are applied or none, and revert gives the very bytes back."
)
ACTIONS = {
    "list": "the patches of the engine's version, and which are applied",
    "check": "what apply would do, with nothing written",
    "apply": "apply all of the named patches, or none",
    "revert": "take the named patches back, or all that are applied",
}


def add(verbs: Any) -> None:
    options = verbs.add_parser("patch", help="source patches for engines that you build", description=DESCRIPTION)
    actions = options.add_subparsers(dest="action", required=True, metavar="list|check|apply|revert")
    for action, about in ACTIONS.items():
        one = actions.add_parser(action, help=about, description=about[0].upper() + about[1:] + ".")
        every = "every patch that is applied" if action == "revert" else "every patch but the unconditional ones"
        if action != "list":
            one.add_argument("names", nargs="*", metavar="PATCH", help=f"as `list` has it; without one: {every}")
        one.add_argument("--engine", required=True, choices=DISTRIBUTIONS, help="whose source it is")
        one.add_argument("--site", type=_folder, metavar="DIR", help="the folder the engine's package lies in")
        one.add_argument("--json", action="store_true", help="print JSON")
        one.set_defaults(do=run, names=[])


def _folder(text: str) -> Path:
    if not text:  # a variable that is not set; Path("") is the folder that one happens to be in
        raise argparse.ArgumentTypeError("it is empty; give a folder, or leave --site out")
    return Path(text)


def run(options: argparse.Namespace, console: Console) -> None:
    try:
        site = find(options.engine, options.site)
        {"list": listed, "check": checked, "apply": applied, "revert": reverted}[options.action](options, site, console)
    except PatchError as reason:
        if options.json:
            print(json.dumps({"engine": options.engine, "refused": str(reason)}))
        raise CommandError(f"{printable(str(reason))}.") from reason


def listed(options: argparse.Namespace, site: Site, console: Console) -> None:
    """Print every patch of this version, with its state."""
    states = work.states(site)
    if options.json:
        rows = [
            {"name": s.patch.name, "state": s.state, "reason": s.reason, "summary": s.patch.summary} for s in states
        ]
        print(json.dumps({**_where(site), "patches": rows}, indent=1))
        return
    table = Table(title=escape(_place(site)), title_justify="left")
    for heading in ("patch", "state", "what it does"):
        table.add_column(heading, no_wrap=heading != "what it does")
    for one in states:
        reason = escape(printable(one.reason))
        table.add_row(one.patch.name, one.state, f"{one.patch.summary}\n{reason}".strip())
    console.print(table)


def checked(options: argparse.Namespace, site: Site, console: Console) -> None:
    names = _names(options, site)
    files = work.check(site, names).files
    _told(options, site, console, "would be applied", names, [path for path, c in files.items() if c.before != c.after])


def applied(options: argparse.Namespace, site: Site, console: Console) -> None:
    """Apply the patches. Everything is checked before the first file is written."""
    names = _names(options, site)
    new = work.apply(site, names)
    _told(options, site, console, "applied", new, [])
    if len(new) < len(names) and not options.json:
        console.print(Text(f"already in: {', '.join(name for name in names if name not in new)}"), soft_wrap=True)


def reverted(options: argparse.Namespace, site: Site, console: Console) -> None:
    _told(options, site, console, "reverted", work.revert(site, options.names or None), [])


def _names(options: argparse.Namespace, site: Site) -> list[str]:
    known = catalog.of(site.engine, site.version)
    return options.names or [patch.name for patch in known if patch.unasked]


def _where(site: Site) -> dict[str, str]:
    return {"engine": site.engine, "version": site.version, "site": str(site.folder)}


def _told(options: argparse.Namespace, site: Site, console: Console, what: str, names: Any, files: list[str]) -> None:
    links = work.links(site, names)
    if options.json:
        more = {name: found for name, found in (("files", files), ("links", links)) if found}
        print(json.dumps({**_where(site), what.replace(" ", "_"): list(names), **more}))
        return
    told = f"{what}: {', '.join(names) or 'nothing'} ({_place(site)})"
    behind = (f"  {path} is a link: what is changed is {real}" for path, real in links.items())
    lines = [told, *(f"  {path}" for path in files), *behind]
    console.print(Text("\n".join(map(printable, lines))), soft_wrap=True)


def _place(site: Site) -> str:
    return printable(f"{site.engine} {site.version} in {site.folder}")
