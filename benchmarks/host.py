"""What a call of each public function costs the host, here and in another checkout, beside the libraries there are.

  python -m benchmarks.host --before /path/to/another/checkout

Each checkout has processes of its own, which take turns; of each call the least of the medians counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import records

HERE = Path(__file__).resolve().parents[1]
ASK = """import json, sys; from norm_plugin.bench.host import host_costs
costs, left_out = host_costs()
print(*left_out, sep="\\n", file=sys.stderr)
print(json.dumps(costs))"""


def asked(checkout: Path) -> dict[str, dict[str, float]]:
    """Call -> who -> microseconds, in a new process."""
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, "-c", ASK], cwd=checkout, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if ran.returncode != 0:
        sys.exit(ran.stderr[-3000:])
    if checkout == HERE:
        print(*sorted({line[:200] for line in ran.stderr.splitlines() if line.startswith("LeftOut")}), sep="\n")
    found: list[dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    return {one["call"]: {who: time["median"] for who, time in one["times"].items()} for one in found}


def main() -> None:
    parser = records.parser(__doc__, "host")
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    least: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for which, checkout in (("before", options.before), ("now", HERE)):
            for call, times in asked(checkout).items():
                for who, time in times.items():
                    who = f"{who}, {which}" if who == "norm_plugin" else who
                    least.setdefault(call, {})[who] = min(time, least.get(call, {}).get(who, time))
    records.write(options.json, [{"call": call, "microseconds": times} for call, times in least.items()])
    for call, times in least.items():
        print(f"{call:24}", "  ".join(f"{who} {time:.2f}" for who, time in times.items()))


if __name__ == "__main__":
    main()
