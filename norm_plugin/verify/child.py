"""What the child processes of `norm-plugin verify` share: their arguments, the prompts, and one outcome a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from norm_plugin.verify.outcome import Answer, Outcome, write

#: How many of the best tokens at each position are compared.
TOP = 5

Run = Callable[[Path, list[list[int]], argparse.Namespace], Outcome]

#: Asks an engine that has started, given the prompts and the number of tokens of an answer.
Use = Callable[[Any, list[list[int]], int], list[Answer]]


def parser(prog: str, description: str | None, engine: str) -> argparse.ArgumentParser:
    """The arguments that all children take."""
    found = argparse.ArgumentParser(prog=prog, description=description)
    found.add_argument("--models", type=Path, nargs="+", required=True, metavar="DIR")
    found.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSON: token ids or text of each")
    found.add_argument("--out", type=Path, required=True, metavar="FILE")
    found.add_argument("--dtype", default="bfloat16")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    found.add_argument("--max-tokens", type=int, default=16, metavar="N")
    found.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallelism")
    found.add_argument("--served", type=json.loads, metavar="JSON", help=f"the words of a command that starts {engine}")
    found.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help=f"other arguments of {engine}")
    return found


def others(options: argparse.Namespace) -> dict[str, Any]:
    """The engine's arguments that --set gives."""
    return {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in options.set)}


def from_command(words: Sequence[str], parser: argparse.ArgumentParser, known: Container[str]) -> dict[str, Any]:
    """The engine's arguments that a serving command sets to something else than their default."""
    parser.usage = argparse.SUPPRESS  # some hundred options before the one that is wrong
    options = vars(parser.parse_args(list(words)))
    return {name: value for name, value in options.items() if name in known and value != parser.get_default(name)}


def tokens(prompts: list[Any], model: Path) -> list[list[int]]:
    if all(isinstance(prompt, list) for prompt in prompts):
        return prompts
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [prompt if isinstance(prompt, list) else tokenizer.encode(prompt) for prompt in prompts]


def run_all(run: Run, options: argparse.Namespace) -> None:
    """Run one model after another, and write each outcome at once."""
    prompts = json.loads(options.prompts.read_text())
    outcomes: list[Outcome] = []
    for model in options.models:
        outcomes.append(run(model, tokens(prompts, model), options))
        write(outcomes, options.out)
        print(f"{model.name}: {outcomes[-1].seconds:.1f} s", file=sys.stderr, flush=True)
