"""The reason of an engine's failure, out of the logs of many processes."""

from pathlib import Path

import pytest

from norm_plugin.verify import failure

SGLANG = """\
[2026-11-21 10:00:00] server_args=ServerArgs(model_path='/m')
[2026-11-21 10:00:09] Scheduler hit an exception: Traceback (most recent call last):
  File "/s/scheduler.py", line 10, in run_scheduler_process
    scheduler = Scheduler()
  File "/s/config.py", line 4, in __getattribute__
    return super().__getattribute__(key)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^
AttributeError: 'LlamaConfig' object has no attribute 'rope_theta'

[2026-11-21 10:00:10] Rank 0 scheduler died, exit code -9: killed by the OS OOM killer
Traceback (most recent call last):
  File "/s/engine.py", line 1, in launch
    raise RuntimeError()
RuntimeError: Rank 0 scheduler died
"""

VLLM = """\
(EngineCore pid=12) INFO 11-21 10:00:00 [core.py:1] Initializing
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2]   File "/v/registry.py", line 7, in inspect
(APIServer pid=11) INFO 11-21 10:00:01 [x.py:2] waiting
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2]     import torchvision
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2] ModuleNotFoundError: No module named 'torchvision'
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2] 
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2] The above exception was the direct cause of the following exception:
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2] 
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2]   File "/v/core.py", line 9, in run
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2]     model()
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2] ValueError: 2 errors
(EngineCore pid=12) ERROR 11-21 10:00:01 [core.py:2]   config has no x
(APIServer pid=11) RuntimeError: Engine core initialization failed. See root cause above.
"""  # noqa: E501, W291


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            SGLANG,
            "AttributeError: 'LlamaConfig' object has no attribute 'rope_theta'\n"
            "    at /s/config.py:4 in __getattribute__",
        ),
        (
            VLLM,
            "ModuleNotFoundError: No module named 'torchvision'\n    at /v/registry.py:7 in inspect\n"
            "The above exception was the direct cause of the following exception:\n"
            "ValueError: 2 errors\n  config has no x\n    at /v/core.py:9 in run",
        ),
        (
            "usage: vllm\n\nerror: unrecognized arguments: --prot\n",
            "usage: vllm\nerror: unrecognized arguments: --prot",
        ),
        ("", "(nothing)"),
        ("x" * 5000, "x" * 5000),
    ],
    ids=["sglang", "vllm", "no exception", "nothing", "a long line"],
)
def test_the_first_exception_and_what_it_caused(log: str, said: str) -> None:
    assert failure.reason(log) == said


def test_a_log_that_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure.tempfile, "gettempdir", lambda: "/dev/null")
    (tmp_path / "stock.log").write_text("x")
    assert failure.kept(tmp_path / "stock.log", "vllm").startswith("The whole log could not be kept: /dev/null: ")
