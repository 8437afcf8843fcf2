#!/usr/bin/env python
"""Writes what README.md takes from the code and from results: `python scripts/readme.py`."""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from norm_plugin import numerics, settings
from norm_plugin.bench.tables import table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "scripts" / "results"

#: How the engines write their names.
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}


def load(name: str) -> dict[str, Any]:
    """A file of scripts/results."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def verified() -> str:
    """A run of verify that was kept: its command and what it printed."""
    kept = (RESULTS / "verify-vllm.txt").read_text(encoding="utf-8")
    return f"```text\n{kept.rstrip()}\n```"


def tested() -> str:
    """A row for each engine that was run, from the records of the runs."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        if not re.fullmatch(r"(vllm|sglang)-[a-z0-9]+-[0-9-]+|tested-(vllm|sglang)-[a-z0-9]+", path.stem):
            continue
        record = load(path.stem)
        engine = path.stem.removeprefix("tested-").split("-")[0]
        what, where = "models, roundings, speed", record.get("gpu")
        if "models" in record:
            verdicts = list(record["models"].values())
            what, where = f"{verdicts.count('identical')} of {len(verdicts)} tiny models identical", "a CPU"
        versions = [record.get("version") or record[engine], record["torch"], record["triton"], record["python"]]
        link = f"[{what}](scripts/results/{path.name})"
        rows.append([ENGINES[engine], *versions, str(where), link])
    rows.sort(key=lambda row: (row[0] != "vLLM", row[1]))
    return table(["engine", "version", "torch", "Triton", "Python", "on", "what was run"], rows)


def between(ratios: Iterable[float]) -> str:
    """The least and the largest."""
    every = sorted(ratios)
    least, largest = f"{every[0]:.2f}", f"{every[-1]:.2f}"
    return least if least == largest else f"{least} to {largest}"


def gain() -> str:
    """Times as fast as stock, in the modes that were measured; what is slower, too."""
    vllm, sglang = load("vllm-h100-2026-11-21"), load("sglang-h100-2026-11-21")
    speeds = [r for r in vllm["results"] if r["part"] == "speed" and "superseded" not in r]

    def decoding(mode: str, *families: str) -> str:
        chosen = [r for r in speeds if r["mode"] == mode and r["family"] in (families or {r["family"]})]
        return between(batch["ratio"] for r in chosen for batch in r["batches"].values())

    def medians(part: str, what: str, *sizes: str) -> list[float]:
        stock, ours = (sglang[part]["measured"][side][what] for side in ("stock", "patched"))
        ratios = {n: statistics.median(ours[n]) / statistics.median(stock[n]) for n in (sizes or stock)}
        return [1 / ratio if what == "prefill" else ratio for ratio in ratios.values()]

    (encoder,) = (r for r in vllm["results"] if r["part"] == "encoder" and r.get("calls"))
    of_vllm, of_sglang = f"vLLM {vllm['vllm']}", f"SGLang {sglang['sglang']}"
    deterministic = sglang["speed_deterministic"]
    rows = [
        [f"{of_vllm} `--enforce-eager`", "decoding, Gemma 3 (8 layers)", decoding("eager", "gemma3")],
        ["", "decoding, Nemotron-H (52 layers)", decoding("eager", "nemotron_h")],
        ["", "decoding, Mamba2 with groups (8 layers)", decoding("eager", "mamba2_groups")],
        [of_vllm, "the norms of a vision encoder", between(p["ratio"] for p in encoder["patches"].values())],
        [of_vllm, "decoding, 5 models; compiled layers stay vLLM's", decoding("compiled")],
        [f"{of_sglang} `--enable-deterministic-inference`", f"decoding, {deterministic['model']}",
         between(medians("speed_deterministic", "decode"))],
        [of_sglang, "decoding, batches of 8 to 64",
         between(medians("speed_two_processes", "decode", "8", "16", "32", "64"))],
        [of_sglang, "time to the first token, CUDA graphs of the prefill switched off",
         between([*medians("speed", "prefill"), *medians("speed_two_processes", "prefill")])],
    ]  # fmt: skip
    return table(["engine and mode", "what", "times as fast as stock"], rows)


TABLES = {
    "gain": gain,
    "tested": tested,
    "flags": settings.table,
    "numerics": numerics.table,
    "verify": verified,
}


def rewritten(text: str) -> str:
    """`text` with every table between its two marks made anew."""
    for name, made in TABLES.items():
        marks = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text, found = marks.subn(lambda m, made=made: m[1] + made() + "\n" + m[2], text)
        if found != 1:
            raise ValueError(f"README.md has the marks of the table {name!r} {found} times; it must have them once.")
    return text


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
