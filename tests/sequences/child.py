"""One process of scripts/gpu_sequences: some steps from a seed, and what became of them, as JSON."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path

import torch

from tests.sequences import machine
from tests.sequences.guards import banded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--without-bands", action="store_true", help="allocate to the byte, for a memory checker")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    begin, failure = time.monotonic(), ""
    with banded(not options.without_bands):
        try:
            machine.run(options.steps, options.seed, shrink=False, until=begin + options.seconds)
        except BaseException as error:
            failure = "".join(traceback.format_exception(error))
    result = {
        "seed": options.seed,
        "steps": machine.DONE.steps,
        "seconds": round(time.monotonic() - begin, 1),
        "failure": failure,
    }
    options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
