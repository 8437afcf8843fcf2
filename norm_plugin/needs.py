"""The PyTorch that norm_plugin needs. pip does not know it, because pip would replace an engine's torch, and CUDA."""

from __future__ import annotations

import re

#: The oldest release that the tests and the engines ran with.
OLDEST_TORCH = (2, 11)


def check_torch() -> None:
    """Raises ImportError if torch is missing or too old."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":  # torch is there, but lacks a module of its own
            raise
        raise ImportError(
            f"norm_plugin needs PyTorch {oldest} or newer, and there is none here. Install norm_plugin into the "
            "environment of your vLLM or SGLang, which has one; without an engine: pip install 'norm-plugin[torch]'."
        ) from None
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release and (int(release[1]), int(release[2])) < OLDEST_TORCH:
        raise ImportError(
            f"norm_plugin needs PyTorch {oldest} or newer, and here is {torch.__version__}, in {torch.__path__[0]}. "
            "An engine wants exactly its own torch: use vLLM 0.26, SGLang 0.5.17 or newer, or take norm_plugin out "
            f"(pip uninstall norm-plugin). Without an engine: pip install --upgrade 'torch>={oldest}'."
        )
