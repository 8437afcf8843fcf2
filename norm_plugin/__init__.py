"""Normalization layers for vLLM and SGLang: the public functions."""

from norm_plugin.needs import check_torch
from norm_plugin.version import __version__ as __version__

check_torch()  # before the rest, which would fail on a torch that is too old with an error of its own

from norm_plugin.functions import *  # noqa: E402, F403
from norm_plugin.functions import __all__ as __all__  # noqa: E402
