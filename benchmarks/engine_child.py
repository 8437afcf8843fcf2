"""An engine that takes orders: `python -m benchmarks.engine_child vllm|sglang` and the arguments of verify's child.

Orders are lines of JSON on standard input. Each is answered by a line of JSON on standard output, after a first one
that says that the engine has started; whatever the engine prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import Any, TextIO

from norm_plugin.verify.outcome import Answer


def obey(child: Any, out: TextIO, engine: Any, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """Do what each line orders, until standard input ends. No answer is left to return: each was printed."""
    print("null", file=out, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        do = order.pop("do")
        begin = time.perf_counter()
        result: Any
        if do == "answers":
            result = [asdict(answer) for answer in child.ask(engine, **order)]
        elif do == "seconds":
            child.generate(engine, **order)
            result = time.perf_counter() - begin
        else:
            result = engine.collective_rpc(do)
        print(json.dumps(result), file=out, flush=True)
    return []


def main() -> None:
    child = importlib.import_module(f"norm_plugin.verify.{sys.argv.pop(1)}_child")
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    child.main(partial(obey, child, out))


if __name__ == "__main__":
    main()
