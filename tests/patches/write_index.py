"""Writes patches/index.json anew: the diffs that lie in patches/, and the hashes of the released files they are for.

    python -m tests.patches.write_index      fetches the files from the package index, by pip's own choice of a wheel

To add a release: put its diffs into patches/ENGINE/RELEASE/, made with `diff -U0` against the released files and with
a head as the others have it, name the release below, and run this.
"""

from __future__ import annotations

import json
from pathlib import Path

from norm_plugin.patching.catalog import sha256
from norm_plugin.patching.diff import parse
from tests.patches.released import fetch

ROOT = Path(__file__).resolve().parents[2]

#: A release, the versions whose files are the same, and what pip calls it.
RELEASES = {
    "vllm": {
        "0.26.0": (["0.26.0"], "vllm==0.26.0"),
        "0.32.0": (["0.32.0"], "vllm==0.32.0"),
        "0.33.0": (["0.33.0"], "vllm==0.33.0"),
    },
    "sglang": {
        "0.5.15": (["0.5.15", "0.5.15.post1"], "sglang==0.5.15"),
        "0.5.17": (["0.5.17"], "sglang==0.5.17"),
        "0.5.23": (["0.5.23"], "sglang==0.5.23"),
    },
}
#: The line of a head that keeps a patch out of `apply` without a name.
ONLY_WHEN_NAMED = "Applied only when it is named"


def release(engine: str, name: str, versions: list[str], requirement: str) -> dict[str, object]:
    """The entry of one release."""
    diffs = {path.stem: parse(path.read_bytes()) for path in sorted((ROOT / "patches" / engine / name).glob("*.diff"))}
    paths = list(dict.fromkeys(path for diff in diffs.values() for path in diff.files))
    texts = fetch(requirement, paths)
    patches = []
    for stem, diff in diffs.items():
        title, summary = diff.head.splitlines()[0].split(": ", 1)
        if title != stem:
            raise SystemExit(f"the head of patches/{engine}/{name}/{stem}.diff begins with {title!r}, not its own name")
        unasked = ONLY_WHEN_NAMED not in " ".join(diff.head.split())
        patches.append({"name": stem, "summary": summary, "unasked": unasked, "files": list(diff.files)})
    files = {path: sha256(texts[path]) for path in paths}
    return {
        "engine": engine, "release": name, "versions": versions, "requirement": requirement,
        "files": files, "patches": patches,
    }  # fmt: skip


def main() -> None:
    entries = [release(engine, name, *of) for engine, found in RELEASES.items() for name, of in found.items()]
    (ROOT / "patches" / "index.json").write_text(json.dumps(entries, indent=1) + "\n")
    print(f"{sum(len(entry['patches']) for entry in entries)} patches of {len(entries)} releases")


if __name__ == "__main__":
    main()
