"""Tests that run inside vLLM's environment, on its own classes: `test_vllm_inside.py` starts them there."""

import os

os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

import pytest
import torch
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel

from norm_plugin import settings
from norm_plugin.engines import call_counts, vllm
from norm_plugin.engines.installed_hooks import installed


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """As with --enforce-eager; the priorities of the IR are set as a worker sets them."""
    found = VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))
    found.kernel_config.ir_op_priority.set_default()
    with set_current_vllm_config(found):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('one')}/rank", 0, "gloo")
        initialize_model_parallel(1, 1)
    return found


@pytest.fixture(autouse=True)
def clean(config):
    """Every test begins with a stock vLLM and an empty call_counts, and leaves one."""
    torch.manual_seed(0)
    call_counts.reset()
    with set_current_vllm_config(config), torch.inference_mode():
        yield
    vllm.undo()


@pytest.fixture
def native():
    """Native norms, hooked in."""
    with settings.override(backend="native"):
        vllm.register()
        yield installed["vllm"]
        vllm.undo()
