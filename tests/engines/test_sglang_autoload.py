"""SGLang where it loads no plugin: the .pth that `norm-plugin autoload` writes, in a real site-packages."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.engines import sglang_runs
from tests.engines.sglang_runs import NATIVE, environment

#: A process that imports SGLang's layers by itself, as Ray actors and sglang.bench_one_batch do.
IMPORTS = "import sglang.srt.layers.layernorm as norms; print(norms.RMSNorm.forward_native.__module__)"
ELSEWHERE = "import sys; print(sorted({'norm_plugin', 'norm_plugin_autoload', 'torch'} & set(sys.modules)))"


def run(code, flags):
    env = environment({"SGLANG_USE_CPU_ENGINE": "1", **flags})
    return subprocess.run([sglang_runs.python(), "-c", code], env=env, capture_output=True, text=True)


@pytest.fixture
def switched_on():
    def autoload(action):
        command = [Path(sglang_runs.python()).with_name("norm-plugin"), "autoload", action]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "300"})
        return done.stdout

    assert "autoload is on" in autoload("on")
    yield
    assert "autoload is off" in autoload("off")


def test_sglang_is_taken_without_a_plugin_being_loaded(switched_on):
    assert run(IMPORTS, NATIVE).stdout.split() == ["norm_plugin.engines.sglang_norms"]
    assert run(IMPORTS, {"USE_NATIVE_LAYERNORM": "1"}).stdout.split() == ["norm_plugin.engines.sglang_norms"]


def test_without_a_flag_nothing_happens(switched_on):
    assert run(IMPORTS, {}).stdout.split() == ["sglang.srt.layers.layernorm"]
    assert run(IMPORTS, {"NORM_PLUGIN": "off"}).stdout.split() == ["sglang.srt.layers.layernorm"]


def test_other_processes_import_nothing(switched_on):
    assert run(ELSEWHERE, {}).stdout.strip() == "[]"
    assert run(ELSEWHERE, NATIVE).stdout.strip() == "['norm_plugin_autoload']"


def test_a_misspelt_flag_ends_the_process(switched_on):
    done = run(IMPORTS, {"NORM_PLUGIN": "nativ"})
    assert done.returncode == 1
    assert "NORM_PLUGIN='nativ' is not one of its values: off, auto, triton, native" in done.stderr


def test_it_is_not_on_by_itself():
    assert run(IMPORTS, NATIVE).stdout.split() == ["sglang.srt.layers.layernorm"]
