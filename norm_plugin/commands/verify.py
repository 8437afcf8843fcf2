"""norm-plugin verify: stock, stock again, patched, and the difference."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from norm_plugin.commands.errors import DIFFERENT, WRONG_ARGUMENT, CommandError, save
from norm_plugin.commands.terminal import Console, Table, escape
from norm_plugin.engines import ENGINES
from norm_plugin.settings import FLAGS
from norm_plugin.verify import by_prompt, page, tiny
from norm_plugin.verify.by_prompt import number
from norm_plugin.verify.comparison import IDENTICAL
from norm_plugin.verify.outcome import Outcome
from norm_plugin.verify.prompts import PROMPTS
from norm_plugin.verify.runs import Plan, Run, execute
from norm_plugin.verify.verdict import Verdict, judged, left_to_inductor, summary

DESCRIPTION = (
    "Runs the engine three times, each in a process of its own: stock; stock again with the requests in another order, "
    "which shows how much its answers change by themselves (the floor); and patched. Compares tokens and logprobs. "
    "The exit code is 0 if patched is identical or inside the floor, 1 if it is not, 3 if an engine did not run. "
    "Other flags (NORM_PLUGIN_OPS, NORM_PLUGIN_SCOPE, ...) are taken from the environment, for the patched run."
)

FLOOR = (
    "what the second stock run changes: the order of the requests (default on a CPU), or the sizes of batches too "
    "(default on a GPU, where they change the order of sums)"
)

#: What the engines call the number of requests that they run together.
TOGETHER = {"vllm": "max_num_seqs", "sglang": "max_running_requests"}
FEW = 3

#: Tiny models are run with tiny caches; what a model of the user's gets instead on a GPU.
LARGE = {"vllm": f"kv_cache_memory_bytes={4 << 30}", "sglang": "mem_fraction_static=0.85"}


def add(verbs: Any) -> None:
    """The verb and its options."""
    options = verbs.add_parser("verify", help="show that a patched engine answers as before", description=DESCRIPTION)
    options.add_argument("--engine", required=True, choices=ENGINES)
    options.add_argument("--model", default="tiny:llama", metavar="PATH|tiny:NAME[,NAME]|tiny:all",
                         help="a model's folder, or tiny ones made here: " + ", ".join(tiny.NAMES))  # fmt: skip
    options.add_argument("--backend", choices=("auto", "triton", "native"), default="auto")
    options.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if torch has it here")
    options.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options.add_argument("--prompts", type=Path, metavar="FILE", help="a JSON list of texts or of lists of token ids")
    options.add_argument("--max-tokens", type=int, default=16, metavar="N", help="tokens an answer, default 16")
    modes = options.add_mutually_exclusive_group()
    modes.add_argument("--eager", dest="mode", action="store_const", const="eager", help="the default")
    modes.add_argument("--compile", dest="mode", action="store_const", const="compiled", help="as the engine compiles")
    options.add_argument("--floor", choices=("order", "batches"), help=FLOOR)
    options.add_argument("--set", nargs="+", default=[], metavar="NAME=JSON", help="other arguments of the engine")
    options.add_argument("--python", default=sys.executable, metavar="PATH", help="the interpreter with the engine")
    options.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures there")
    options.set_defaults(do=run, mode="eager")


def run(options: argparse.Namespace, console: Console) -> int:
    """The verb."""
    for path in (options.json, options.html):
        if path and not os.access(path.parent, os.W_OK):  # now, and not after three runs
            raise CommandError(f"{path} cannot be written: {path.parent} is not a folder, or not yours to write in.")
    check_engine(options.engine, options.python)
    device = options.device or find_device()
    models = find_models(options.model, options.engine, device)
    arguments = ["--dtype", options.dtype, "--device", device, "--mode", options.mode]
    if device == "cuda" and not options.model.startswith("tiny:"):
        options.set = [LARGE[options.engine], *options.set]
    arguments += ["--max-tokens", str(options.max_tokens), *(["--set", *options.set] if options.set else [])]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="norm-plugin-") as folder:
        plan = Plan(options.engine, options.python, models, find_prompts(options.prompts), Path(folder), arguments)
        outcomes = []
        for one in three_runs(options, device):
            with watching(one.name, plan) as watch:
                outcomes.append(execute(plan, one, watch))
    verdicts = [judged(*three) for three in zip(*outcomes, strict=True)]
    about = facts(options, device, outcomes[-1][0], time.monotonic() - begin)
    show(verdicts, about, console)
    if options.json:
        text = json.dumps({**about, "models": [verdict.as_json() for verdict in verdicts]}, indent=1)
        save(options.json, text + "\n")
    if options.html:
        save(options.html, page.page(verdicts, about))
    return 0 if all(verdict.passed for verdict in verdicts) else DIFFERENT


def check_engine(engine: str, python: str) -> None:
    """Say what is missing before anything slow is begun."""
    ask = f"import importlib.util as u; print(*[n for n in ('{engine}', 'norm_plugin') if u.find_spec(n) is None])"
    try:
        asked = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CommandError(f"--python {python} does not run: {error}") from error
    if missing := asked.stdout.split():
        raise CommandError(f"{python} has no {' and no '.join(missing)}; --python names an interpreter that has both.")


def find_models(model: str, engine: str, device: str) -> list[Path]:
    """The folders of the models that are asked for; tiny ones are made."""
    sizes = tiny.sizes_for(device)
    if model == "tiny:all":
        return [tiny.make(name, sizes=sizes) for name in tiny.names(engine)]
    if model.startswith("tiny:"):
        names = model.removeprefix("tiny:").split(",")
        if not set(names) <= set(tiny.NAMES):
            raise CommandError(f"--model {model}: there are {', '.join(tiny.NAMES)}, and tiny:all.", WRONG_ARGUMENT)
        return [tiny.make(name, sizes=sizes) for name in names]
    if not (Path(model) / "config.json").is_file():
        raise CommandError(f"--model {model}: there is no {model}/config.json; give a model's folder, or tiny:NAME.")
    return [Path(model).resolve()]


def find_device() -> str:
    """A GPU, if torch has one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def find_prompts(path: Path | None) -> list[Any]:
    """The user's, or ours."""
    if path is None:
        return list(PROMPTS)
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"--prompts {path} cannot be read as JSON: {error}") from error
    if not prompts or not isinstance(prompts, list) or not all(isinstance(p, (str, list)) for p in prompts):
        raise CommandError(f"--prompts {path} is not a list of texts or of lists of token ids.")
    return prompts


def three_runs(options: argparse.Namespace, device: str) -> Iterator[Run]:
    """Stock, stock again, patched."""
    floor = options.floor or ("order" if device == "cpu" else "batches")
    fewer = [] if floor == "order" else ["--set", *options.set, f"{TOGETHER[options.engine]}={FEW}"]
    yield Run("stock", {"NORM_PLUGIN": "off"})
    yield Run(f"stock, another order{' and smaller batches' * bool(fewer)}", {"NORM_PLUGIN": "off"}, True, fewer)
    yield Run("patched", patched_flags(options.backend))


def patched_flags(backend: str) -> dict[str, str]:
    """The backend, and whatever else the user has set."""
    kept = {flag.name for flag in FLAGS if flag.field not in ("backend", "native_layernorm", "report")}
    return {**{name: value for name, value in os.environ.items() if name in kept}, "NORM_PLUGIN": backend}


@contextmanager
def watching(name: str, plan: Plan) -> Iterator[Callable[[str, float], None]]:
    """What is shown on standard error while an engine runs."""
    console = Console(stderr=True, highlight=False)
    begin = time.monotonic()
    with console.status(f"{name}: starting {plan.engine}") as status:
        yield lambda line, seconds: status.update(f"{name}: {seconds:3.0f} s  [dim]{escape(line[:100])}[/]")
    console.print(f"{name}: {time.monotonic() - begin:.0f} s")


def facts(options: argparse.Namespace, device: str, patched: Outcome, seconds: float) -> dict[str, Any]:
    """What was compared."""
    return {
        "engine": patched.engine,
        "version": patched.version,
        "backend": options.backend,
        "device": device,
        "dtype": patched.dtype,
        "mode": patched.mode,
        "prompts": len(patched.answers),
        "max_tokens": options.max_tokens,
        "floor": options.floor or ("order" if device == "cpu" else "batches"),
        "flags": patched.flags,
        "hooks": patched.hooks,
        "seconds": round(seconds, 1),
    }


# --- what is printed ----------------------------------------------------------------------------------------------


def show(verdicts: list[Verdict], about: dict[str, Any], console: Console) -> None:
    """The table, what stayed the engine's, and one line for all."""
    title = (
        f"{about['engine']} {about['version']}, {about['mode']}, {about['dtype']} on {about['device']}: "
        f"stock against {about['backend']}, {about['prompts']} prompts, {about['max_tokens']} tokens each"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("norms", justify="right")
    table.add_column("runs on")
    table.add_column("numerics")
    for heading in ("same tokens", "max |Δ|", "mean |Δ|", "floor max", "floor mean"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for v in verdicts:
        colour = "green" if v.passed else "bold red"
        table.add_row(
            v.model, f"{len(v.taken)}/{len(v.taken) + len(v.others)}", ", ".join(v.backends), ", ".join(v.numerics),
            f"{len(v.patched.prompts) - v.patched.diverged}/{len(v.patched.prompts)}",
            *(number(x) for x in (v.patched.max, v.patched.mean, v.floor.max, v.floor.mean)),
            f"[{colour}]{v.verdict}[/]",
        )  # fmt: skip
    console.print(table)
    for v in verdicts:
        for line in remarks(v, about):
            console.print(f"[yellow]{v.model}[/]: {escape(line)}", soft_wrap=True)
    if len(verdicts) == 1 and verdicts[0].verdict != IDENTICAL:
        console.print(each_prompt(verdicts[0]))
    what = "the requests in another order" + (", in smaller batches" if about["floor"] == "batches" else "")
    console.print(
        f"{summary(verdicts)}. |Δ|: of logprobs, up to the first other token; its mean: where anything differs. "
        f"Floor: stock against stock with {what}. {about['seconds']:.0f} s.",
        soft_wrap=True,
    )


def remarks(verdict: Verdict, about: dict[str, Any]) -> Iterator[str]:
    """What stayed the engine's, and why."""
    for hook, reason in verdict.missing.items():
        yield f"the hook {hook} is missing: {reason}"
    for reason, layers in verdict.kept.items():
        yield f"kept by the engine in {several(layers)}: {reason}"
    if verdict.silent:
        yield f"never called through a hook: {several(verdict.silent)}"
    if why := left_to_inductor(verdict, about):
        yield why


def several(layers: list[str]) -> str:
    """A few names, and how many more."""
    shown = ", ".join(layers[:3])
    return shown if len(layers) <= 3 else f"{shown} and {len(layers) - 3} more layers"


def each_prompt(verdict: Verdict) -> Table:
    """A row a prompt."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in by_prompt.HEADINGS:
        table.add_column(heading, justify="right")
    for row in by_prompt.rows(verdict):
        table.add_row(*row)
    return table
