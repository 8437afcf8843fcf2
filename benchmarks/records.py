"""The file that a measurement leaves: when, on what machine with which versions, and a list of results."""

from __future__ import annotations

import argparse
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from norm_plugin.bench import results

Rows = list[dict[str, Any]]


def default(name: str) -> Path:
    """In the folder that OUT names, else in this one."""
    return Path(os.environ.get("OUT", ".")) / f"{name}.json"


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """With --json, the file that is written."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, default=default(name), metavar="FILE", help="default: %(default)s")
    return found


def read(path: Path) -> Rows:
    """The results of a file; none where there is no file."""
    rows: Rows = json.loads(path.read_text())["results"] if path.exists() else []
    return rows


def write(path: Path, found: Rows, /, **more: Any) -> None:
    """`more` stands beside the results."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    results.save(path, {"date": date, "about": results.machine(), **more, "results": found})
