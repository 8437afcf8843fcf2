"""norm-plugin verify: runs the engine stock, stock again and patched, and compares their answers."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from norm_plugin import settings
from norm_plugin.commands.doctor import typed
from norm_plugin.commands.errors import DIFFERENT, NOT_RUN, WRONG_ARGUMENT, CommandError, save
from norm_plugin.commands.terminal import Console, escape
from norm_plugin.engines import ENGINES
from norm_plugin.settings import FLAGS
from norm_plugin.tiny_models import checkpoint
from norm_plugin.verify import health, page
from norm_plugin.verify.models import find_models as find_models  # report asks here too
from norm_plugin.verify.models import names
from norm_plugin.verify.outcome import Outcome
from norm_plugin.verify.prompts import PROMPTS
from norm_plugin.verify.runs import Plan, Run, execute, workplace
from norm_plugin.verify.served import COMPILED, EAGER, Served, number, plan, served
from norm_plugin.verify.terminal import show
from norm_plugin.verify.verdict import Verdict, judged

DESCRIPTION = (
    "Runs the engine three times, each in a process of its own: stock; stock again with the requests in another order, "
    "which shows how much its answers change by themselves (the floor); and patched. Compares tokens and logprobs. "
    "With a command after --, in the mode of that server: norm-plugin verify -- vllm serve /models/llama "
    "(as vLLM compiles it; eager with --enforce-eager). How large the server is (context, batches, memory) does not "
    "matter for a few short requests, and is left out. "
    "Other flags (NORM_PLUGIN_OPS, NORM_PLUGIN_SCOPE, ...) are taken from the environment, for the patched run."
)
EXIT_CODES = (
    "exit codes: 0 patched is identical or inside the floor; 1 it is not; 2 it could not be tested: an engine did not "
    "run, or nothing of ours ran in the mode that was asked for"
)

NOT_THE_SERVER = (
    "this was eager, as with --enforce-eager. `norm-plugin verify -- vllm serve MODEL` tests the mode of your server."
)

FLOOR = (
    "what the second stock run changes: the order of the requests (default on a CPU), or the sizes of batches too "
    "(default on a GPU, where they change the order of sums)"
)

#: The engines' names for the number of requests in a batch.
TOGETHER = {"vllm": "max_num_seqs", "sglang": "max_running_requests"}
FEW = 3

#: The memory for a user's model on a GPU; tiny models run with a tiny cache.
LARGE = {"vllm": f"kv_cache_memory_bytes={4 << 30}", "sglang": "mem_fraction_static=0.85"}


def add(verbs: Any) -> None:
    options = verbs.add_parser(
        "verify", help="show that a patched engine answers as before", description=DESCRIPTION, epilog=EXIT_CODES
    )
    options.add_argument("--engine", choices=ENGINES, help="where no command is given")
    options.add_argument("--model", nargs="+", metavar="MODEL",
                         help="models' folders, names that the Hugging Face cache has, or tiny ones made here: "
                              f"tiny:all, tiny:NAME[,NAME] of {', '.join(checkpoint.NAMES)}; "
                              "default tiny:llama")  # fmt: skip
    options.add_argument("--backend", choices=("auto", "triton", "native"), default="auto")
    options.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if torch has it here")
    options.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                         help="default: bfloat16; of a command, its own")  # fmt: skip
    options.add_argument("--prompts", type=Path, metavar="FILE", help="a JSON list of texts or of lists of token ids")
    options.add_argument("--max-tokens", type=positive, default=16, metavar="N", help="tokens an answer, default 16")
    options.add_argument(
        "--tp", type=positive, metavar="N", help="tensor parallelism, default 1; of a command, its own"
    )
    modes = options.add_mutually_exclusive_group()
    modes.add_argument("--eager", dest="mode", action="store_const", const=EAGER,
                       help="as --enforce-eager; the default without a command")  # fmt: skip
    modes.add_argument("--compile", dest="mode", action="store_const", const=COMPILED, help="as the engine compiles")
    options.add_argument("--floor", choices=("order", "batches"), help=FLOOR)
    options.add_argument("--set", nargs="+", default=[], metavar="NAME=JSON", help="other arguments of the engine")
    options.add_argument("--python", default=sys.executable, metavar="PATH", help="the interpreter with the engine")
    options.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures there")
    options.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what you would serve with")
    options.set_defaults(do=run)


def positive(text: str) -> int:
    """A number of tokens, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def run(options: argparse.Namespace, console: Console) -> int:
    for path in (options.json, options.html):
        if path and not os.access(path.parent, os.W_OK):  # now, and not after three runs
            raise CommandError(f"{path} cannot be written: {path.parent} is not a folder, or not yours to write in.")
    device = options.device or find_device()
    command = what_is_served(options)
    check_backend(options.backend, device, options.dtype)
    settings.read({**os.environ, **patched_flags(options.backend), "USE_NATIVE_LAYERNORM": ""})
    check_engine(options.engine, options.python)
    folders = [find_models(model, options.engine, device) for model in options.model]
    arguments = ["--dtype", options.dtype, "--device", device, "--mode", options.mode]
    arguments += ["--served", json.dumps(command.words)] if command else ["--tp", str(options.tp)]
    if device == "cuda" and not all(model.startswith("tiny:") for model in options.model):
        options.set = [LARGE[options.engine], *options.set]
    arguments += ["--max-tokens", str(options.max_tokens), *(["--set", *options.set] if options.set else [])]
    begin = time.monotonic()
    with workplace() as folder:
        models = [model for several in folders for model in several]
        common = Plan(options.engine, options.python, models, find_prompts(options.prompts), folder, arguments)
        outcomes = []
        for one in three_runs(options, device):
            with watching(one.name, common) as watch:
                outcomes.append(execute(common, one, watch))
    verdicts = [judged(*three) for three in zip(*outcomes, strict=True)]
    for verdict, name in zip(verdicts, names(options.model, folders), strict=True):
        verdict.model = name
    about = facts(options, device, outcomes[-1][0], time.monotonic() - begin)
    show(verdicts, about, console)
    if options.json:
        text = json.dumps({**about, "models": [verdict.as_json() for verdict in verdicts]}, indent=1)
        save(options.json, text + "\n")
    if options.html:
        save(options.html, page.page(verdicts, about))
    if command is None and (options.engine, options.mode) == ("vllm", EAGER):
        print("norm-plugin verify: " + NOT_THE_SERVER, file=sys.stderr)
    return exit_code(verdicts)


def exit_code(verdicts: list[Verdict]) -> int:
    """The exit code. A model that differs counts more than one that could not be tested."""
    if any(verdict.differs for verdict in verdicts):
        return DIFFERENT
    return 0 if all(verdict.passed for verdict in verdicts) else NOT_RUN


def what_is_served(options: argparse.Namespace) -> Served | None:
    """The command that serves, whose engine, model and mode go into the options; None if there is none."""
    words = typed(options)
    if not words:
        if options.engine is None:
            raise CommandError("give --engine, or the command that you serve with after --.", WRONG_ARGUMENT)
        options.model, options.mode = options.model or ["tiny:llama"], options.mode or EAGER
        options.dtype, options.tp = options.dtype or "bfloat16", options.tp or 1
        return None
    command = served(words, os.environ)
    if command is None:
        raise CommandError(f"{shlex.join(words)} starts no engine that is known: {', '.join(ENGINES)}.", WRONG_ARGUMENT)
    for name in ("engine", "model", "mode", "tp"):
        if getattr(options, name) is not None:
            raise CommandError(f"the command says what the {name} is; leave that option out.", WRONG_ARGUMENT)
    if command.model is None:
        raise CommandError(f"{shlex.join(words)} names no model. Put it first, or after --model.", WRONG_ARGUMENT)
    options.engine, options.model, options.mode = command.engine, [command.model], command.mode
    options.dtype = options.dtype or "auto"
    options.tp = number(command.words, "--tensor-parallel-size", "-tp", "--tp-size", "--tp")
    wanted = settings.read(patched_flags(options.backend))
    print(f"norm-plugin verify: {plan(command, wanted, os.environ)}.", file=sys.stderr)
    return command


def check_backend(backend: str, device: str, dtype: str = "") -> None:
    """Refuse a backend that would not run here. `dtype`: of a model whose answers are to be compared."""
    if reason := health.why_not(backend, device, dtype):
        raise CommandError(f"--backend {backend} cannot run: {reason}")


def check_engine(engine: str, python: str) -> None:
    """Refuse an interpreter without the engine or norm_plugin, before anything slow begins."""
    ask = f"import importlib.util as u; print(*[n for n in ('{engine}', 'norm_plugin') if u.find_spec(n) is None])"
    try:
        asked = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CommandError(f"--python {python} does not run: {error}") from error
    if missing := asked.stdout.split():
        raise CommandError(f"{python} has no {' and no '.join(missing)}; --python names an interpreter that has both.")


def find_device() -> str:
    """The device to run on: a GPU, if torch has one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def find_prompts(path: Path | None) -> list[Any]:
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
    """The runs: stock, stock again, patched."""
    floor = options.floor or ("order" if device == "cpu" else "batches")
    fewer = [] if floor == "order" else ["--set", *options.set, f"{TOGETHER[options.engine]}={FEW}"]
    yield Run("stock", {"NORM_PLUGIN": "off"})
    yield Run(f"stock, another order{' and smaller batches' * bool(fewer)}", {"NORM_PLUGIN": "off"}, True, fewer)
    yield Run("patched", patched_flags(options.backend))


def patched_flags(backend: str) -> dict[str, str]:
    """The flags of the patched run: the backend, and all others that the user has set."""
    kept = {flag.name for flag in FLAGS if flag.field not in ("backend", "native_layernorm", "report")}
    return {**{name: value for name, value in os.environ.items() if name in kept}, "NORM_PLUGIN": backend}


@contextmanager
def watching(name: str, plan: Plan) -> Iterator[Callable[[str, float], None]]:
    """Show the progress of an engine on standard error."""
    console = Console(stderr=True, highlight=False)
    begin = time.monotonic()
    with console.status(f"{name}: starting {plan.engine}") as status:
        yield lambda line, seconds: status.update(f"{name}: {seconds:3.0f} s  [dim]{escape(line[:100])}[/]")
    console.print(f"{name}: {time.monotonic() - begin:.0f} s")


def versions_of(python: str) -> dict[str, str]:
    """The versions in the interpreter that ran the engine."""
    ask = "import json; from norm_plugin.verify.health import versions; print(json.dumps(versions()))"
    try:
        said = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True, timeout=120).stdout
        found: dict[str, str] = json.loads(said.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"versions": f"unknown ({error})"}
    return found


def facts(options: argparse.Namespace, device: str, patched: Outcome, seconds: float) -> dict[str, Any]:
    """What was compared, and with what."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["norm-plugin", *sys.argv[1:]]),
        "versions": versions_of(options.python),
        "engine": patched.engine,
        "version": patched.version,
        "backend": options.backend,
        "device": device,
        "dtype": patched.dtype,
        "mode": patched.mode,
        "tp": options.tp,
        "prompts": len(patched.answers),
        "max_tokens": options.max_tokens,
        "floor": options.floor or ("order" if device == "cpu" else "batches"),
        "flags": patched.flags,
        "hooks": patched.hooks,
        "seconds": round(seconds, 1),
    }
