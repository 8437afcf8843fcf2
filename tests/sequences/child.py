"""Runs steps from a seed in a process of its own, and writes their results as JSON: for scripts/gpu_sequences, and for
test_planted.py, whose planted defects spoil the memory of the process."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch

from tests.kernels import interpreter
from tests.sequences import machine
from tests.sequences.guards import banded
from tests.sequences.planted import ABOUT, planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--without-bands", action="store_true", help="allocate to the byte, for a memory checker")
    parser.add_argument("--planted", choices=ABOUT, help="with this defect, and only calls of what it is in")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    begin, failure = time.monotonic(), ""
    defect = planted(options.planted) if options.planted else nullcontext()
    of = machine.about(*ABOUT[options.planted]) if options.planted else machine.Sequences
    with interpreter.repaired(), banded(not options.without_bands), defect:
        try:
            machine.run(options.steps, options.seed, shrink=False, until=begin + options.seconds, of=of)
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
