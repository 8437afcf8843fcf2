"""The report's file: nothing that is done to it hurts the process, and nobody reads there what is not theirs."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_plugin.engines import command_line, report_file, report_reader

#: Layers that are called in turn, as a model calls them.
MODEL = (
    "import os, signal, sys, torch\nfrom norm_plugin.engines import call_counts\n"
    "weights = [torch.ones(8) for _ in range(5)]\n"
    "def forward(times):\n"
    "    for _ in range(times):\n"
    "        for w in weights:\n"
    "            call_counts.count('rmsnorm', w, w)\n"
)


def ran(program: str, folder: Path, *arguments: str, code: int = 0, **flags: str) -> str:
    environ = {**os.environ, "NORM_PLUGIN_REPORT": str(folder), "OMP_NUM_THREADS": "1", **flags}
    command = [sys.executable, "-c", MODEL + program, *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    return done.stderr


def calls(folder: Path) -> list[int]:
    (process,) = report_reader.read(folder)
    return [row["calls"] for row in process["rows"]]


def test_every_forward_is_there_when_the_process_is_killed(tmp_path: Path) -> None:
    ran("forward(1237)\nos.kill(os.getpid(), signal.SIGKILL)\n", tmp_path, code=-signal.SIGKILL)
    assert calls(tmp_path) == [1237] * 5


@pytest.mark.parametrize("shorter", [3, 4])
def test_so_it_is_where_forwards_are_of_several_kinds(shorter: int, tmp_path: Path) -> None:
    program = f"some, all = weights[:{shorter}], weights\nfor i in range(300):\n    weights = some if i % 3 else all\n"
    program += "    forward(1)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    ran(program, tmp_path, code=-signal.SIGKILL)
    assert calls(tmp_path) == [300] * shorter + [100] * (5 - shorter)


DAMAGE: dict[str, str] = {
    "truncated": "[os.truncate(path, 0) for path in files]",
    "cut": "[os.truncate(path, 100) for path in files]",
    "deleted": "[os.unlink(path) for path in files]",
    "replaced": "[(os.unlink(path), open(path, 'w').write('{}')) for path in files]",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_written_anew(damage: str, tmp_path: Path) -> None:
    """Every file of the folder, hidden ones too; by the time that the number of calls has doubled all is well again."""
    program = (
        f"forward(100)\nfolder = os.environ['NORM_PLUGIN_REPORT']\n"
        f"files = [os.path.join(folder, name) for name in os.listdir(folder)]\nassert files\n{DAMAGE[damage]}\n"
        "forward(200)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran(program, tmp_path, code=-signal.SIGKILL)
    assert calls(tmp_path) == [300] * 5


@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_folder_that_goes_away_is_said_once(strict: str, tmp_path: Path) -> None:
    program = "import shutil\nforward(100)\nshutil.rmtree(os.environ['NORM_PLUGIN_REPORT'])\nforward(500)\n"
    program += "assert [row.calls for row in call_counts.rows()] == [600] * 5\n"
    said = ran(program, tmp_path / "report", NORM_PLUGIN_STRICT=strict)
    assert said.count("the report cannot be written") == 1


def test_a_folder_that_cannot_be_written_is_known_before_there_is_a_report(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert report_file.unwritable(None) == report_file.unwritable(str(tmp_path / "new" / "folder")) == ""
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        assert str(folder) in report_file.unwritable(str(folder))
        said = ran("from norm_plugin.engines import report_file\nreport_file.warn_if_unwritable()\n", folder)
        assert said.count("the report cannot be written") == 1
    ran("from norm_plugin.engines import report_file\nreport_file.warn_if_unwritable()\n", folder, code=1,
        NORM_PLUGIN_STRICT="1")  # fmt: skip


def test_a_full_disk_does_not_end_the_process(tmp_path: Path) -> None:
    program = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\nforward(100)\n"
    assert ran(program, tmp_path).count("the report cannot be written") == 1
    assert list(tmp_path.iterdir()) == []


def test_only_its_owner_reads_it_and_no_planted_link_is_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)
    program = (
        "os.umask(0)\n"
        "import tempfile\nmake = tempfile.mkstemp\n"
        "def raced(*a, **k):\n"  # somebody puts a link where the temporary file was
        "    handle, name = make(*a, **k)\n"
        "    os.unlink(name); os.symlink(sys.argv[1], name)\n    return handle, name\n"
        "forward(1)\nif sys.argv[2] == 'raced':\n    tempfile.mkstemp = raced\n"
        "weights.append(torch.ones(9))\nforward(4)\n"
    )
    ran(program, tmp_path / "report", str(victim), "alone")
    (file,) = (tmp_path / "report").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "report").stat().st_mode) == 0o700
    ran(program, tmp_path / "raced", str(victim), "raced")
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600


def test_a_fork_while_a_thread_writes_does_not_hang_the_child(tmp_path: Path) -> None:
    """A thread names layers and opens new rows all the time, which takes the lock; forks come whenever they come."""
    program = (
        "import threading\nstop, model = threading.Event(), torch.nn.LayerNorm(8)\n"
        "def why(layer):\n"
        "    w = torch.ones(3); call_counts.count('rmsnorm', w, w)\n"
        "    return ''\n"
        "def endless():\n"
        "    while not stop.is_set():\n"
        "        call_counts.name_layers(model, why)\n"
        "call_counts.name_layers(model, why)\n"
        "thread = threading.Thread(target=endless); thread.start()\n"
        "for _ in range(20):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        signal.alarm(20)\n"  # a child that hangs is killed by it
        "        forward(3)\n        os._exit(0)\n"
        "    _, status = os.waitpid(child, 0)\n"
        "    if status:\n        print('a child ended with', status, file=sys.stderr); break\n"
        "stop.set(); thread.join(); sys.exit(bool(status))\n"
    )
    ran(program, tmp_path)
    ran(program, tmp_path, NORM_PLUGIN_REPORT="")
    children = [p for p in report_reader.read(tmp_path) if [row["calls"] for row in p["rows"]] == [3] * 5 + [0]]
    assert len(children) == 20


# --- what other files may be there --------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def changed(name: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_text(""), "it is empty"),
    "another program's": (lambda path: path.write_text('{"rows": []}'), "another program's"),
    "a list": (lambda path: path.write_text("[1, 2]"), "another program's"),
    "a number": (lambda path: path.write_text("1" * 10000), "no JSON"),
    "no JSON": (lambda path: path.write_bytes(b"\xff\x00"), "no JSON"),
    "too deep": (lambda path: path.write_text("[" * 200000), "no JSON"),
    "huge": (lambda path: os.truncate(path, 1 << 40), "bytes"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "cannot be read"),
    "endless": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "not a file"),
    "truncated": (truncated, "truncated"),
    "of another version": (changed("report", "norm_plugin report 9"), "another version"),
    "with numbers of nothing": (changed("numbers", "f" * 80), "damaged"),
    "with too few numbers": (changed("numbers", ""), "damaged"),
    "with rows that are none": (changed("rows", [{"layer": ["x"]}] * 5), "damaged"),
    "with a graph of other rows": (changed("graphs", [{"calls": {"77": 1}}]), "damaged"),
    "with engines that are none": (changed("engines", {"engine": 1}), "damaged"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report."""
    folder = tmp_path_factory.mktemp("written")
    ran("forward(3)\n", folder)
    (file,) = folder.iterdir()
    return file


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_report_is_named_and_the_others_are_shown(kind: str, written: Path, tmp_path: Path) -> None:
    shutil.copy(written, tmp_path / "good.json")
    shutil.copy(written, tmp_path / "bad.json")
    spoil, says = FOREIGN[kind]
    spoil(tmp_path / "bad.json")
    processes, others = report_reader.look(tmp_path)
    assert [sum(row["calls"] for row in process["rows"]) for process in processes] == [15]
    assert list(others) == ["bad.json"]
    assert says in others["bad.json"]


# --- secrets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("vllm serve m --api-key K1 K2 K3 --port 1", "vllm serve m --api-key *** *** *** --port 1"),
        ("vllm serve m --api-key=K1 --port 1", "vllm serve m --api-key=*** --port 1"),
        ("serve --api_key K1 --hf-token K2", "serve --api_key *** --hf-token ***"),
        ("serve --api-k K1 --hf-tok=K2", "serve --api-k *** --hf-tok=***"),
        ("serve --admin-api-key K1 --ssl-keyfile-password K2", "serve --admin-api-key *** --ssl-keyfile-password ***"),
        ("serve --client-secret K1 --AUTH-TOKEN=K2", "serve --client-secret *** --AUTH-TOKEN=***"),
        ("env HF_TOKEN=K1 AWS_SECRET_ACCESS_KEY=K2 vllm", "env HF_TOKEN=*** AWS_SECRET_ACCESS_KEY=*** vllm"),
        ("serve --otlp http://me:K1@host:1/p", "serve --otlp http://***@host:1/p"),
        ("serve --store=redis://:K1@host", "serve --store=redis://***@host"),
        ("serve --url http://h/?a=1&token=K1&b=2", "serve --url http://h/?a=1&token=***&b=2"),
        ("serve --header Authorization:Bearer K1", None),
        ('serve --config {"api_key":"K1","n":2}', 'serve --config {"api_key":***,"n":2}'),
        ("serve hf_K1K1K1K1K1K1K1 sk-K1K1K1K1K1K1", "serve hf_*** sk-***"),
        ("serve --tokenizer t --max-tokens 5 --eos-token-id 7", "serve --tokenizer t --max-tokens 5 --eos-token-id 7"),
        ("serve --max-num-batched-tokens 8 --skip-tokenizer-init", None),
    ],
)
def test_what_a_command_line_shows(words: str, shown: str | None) -> None:
    found = command_line.redacted(words.split())
    assert "K1" not in found
    assert "K2" not in found
    assert shown is None or found == shown
    if "tokens" in words:
        assert found == (shown or words)


def test_no_secret_is_in_the_file(tmp_path: Path) -> None:
    secrets = ["K" + letter * 12 for letter in "abcdef"]
    a, b, c, d, e, f = secrets
    words = ["--api-key", a, b, f"--hf-token={c}", f"PASSWORD={d}", f"http://u:{e}@h/", "--headers",
             f'{{"Authorization": "Bearer {f}"}}', "--model", "/models/llama"]  # fmt: skip
    ran("forward(3)\n", tmp_path, *words)
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    assert "/models/llama" in text
    assert not [secret for secret in secrets if secret in text]
