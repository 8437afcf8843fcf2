"""What cannot be tested is exit code 2 with the reason: a full disk, an engine that fails, nothing of ours that ran."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the command line prints with rich")

FAKE = Path(__file__).parent / "fake_engine"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """As token ids, which need no tokenizer."""
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([[1, 2, 3]]))
    return path


def command(prompts: Path) -> list[str]:
    """With an engine that is none, once PYTHONPATH has it."""
    words = ["verify", "--engine", "vllm", "--prompts", str(prompts), "--max-tokens", "400", "--backend", "native"]
    code = "import sys; from norm_plugin import cli; sys.exit(cli.main())"
    return [sys.executable, "-c", code, *words]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """This one's, with the engine and a temporary folder."""
    return {**os.environ, "PYTHONPATH": str(FAKE), "TMPDIR": str(folder), **more}


def verify(
    prompts: Path, folder: Path, limit: Callable[[], None] | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run(
        command(prompts), env=environment(folder, **more), capture_output=True, text=True, timeout=300, preexec_fn=limit
    )


def files_of_at_most(size: int) -> Callable[[], None]:
    """What a quota or a full disk does to a file that grows."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("size", "begins", "says"),
    [
        (0, "[Errno 2] No usable temporary directory found in ['{}'", ""),
        (8, "the temporary folder {} cannot be written (File too large)", "another in TMPDIR"),
        (4096, "vllm did not finish the run 'stock' of ", "File too large"),
    ],
    ids=["nothing", "the prompts", "the answers"],
)
def test_a_temporary_folder_that_is_full(size: int, begins: str, says: str, prompts: Path, tmp_path: Path) -> None:
    # Python would keep what it compiles in files of that size, and every process after this one would read them
    done = verify(prompts, tmp_path, files_of_at_most(size), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 2
    assert done.stdout == ""
    said = done.stderr[done.stderr.index("norm-plugin verify:") :]
    assert said.startswith("norm-plugin verify: " + begins.format(tmp_path))
    assert says in said
    assert "Traceback" not in said
    assert "JSONDecodeError" not in said


def test_an_engine_that_fails_says_why_and_its_log_stays(prompts: Path, tmp_path: Path) -> None:
    done = verify(prompts, tmp_path, FAKE_VLLM="fails")
    assert done.returncode == 2
    said = done.stderr[done.stderr.index("norm-plugin verify:") :]
    assert "  | KeyError: 'sliding_window" + " and more" * 40 + "'\n" in said, "the first exception, whole"
    assert "  | ValueError: the config lacks a field\n" in said
    log = Path(said.rstrip().rpartition("The whole log: ")[2])
    assert log.parent == tmp_path
    assert "Traceback (most recent call last):" in log.read_text()


def test_nothing_of_ours_in_what_ran_is_not_the_same_and_not_another(prompts: Path, tmp_path: Path) -> None:
    done = verify(prompts, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "stock against nothing of ours (native was asked for)" in done.stdout
    assert "nothing was patched" in done.stdout
    assert "there was nothing to test" in done.stdout
    assert "identical" not in done.stdout


def test_sigterm_leaves_nothing_in_the_temporary_folder(prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    wanted = environment(folder, FAKE_VLLM="waits")
    process = subprocess.Popen(command(prompts), env=wanted, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not list(folder.glob("norm-plugin-*/stock.log")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list(folder.iterdir()) == []
