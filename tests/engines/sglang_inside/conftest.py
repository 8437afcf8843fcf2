"""Tests that run inside SGLang's environment, on its own classes: `test_sglang_inside.py` starts them there."""

import os

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "TRITON_INTERPRET": "1"}

import pytest
import torch

from norm_plugin import settings
from norm_plugin.engines import call_counts
from norm_plugin.engines.installed_hooks import InstalledHooks


@pytest.fixture(autouse=True)
def native():
    """Every test begins with native norms and an empty call_counts."""
    torch.manual_seed(0)
    call_counts.reset()
    with settings.override(backend="native"):
        yield


@pytest.fixture
def hooks():
    made = InstalledHooks("sglang", "as installed")
    yield made
    made.undo()
