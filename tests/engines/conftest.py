"""Tests with the real engines, each in an environment of its own."""

import importlib.util

#: `test_sglang_inside.py` and `test_vllm_inside.py` run these in the environments of the engines.
collect_ignore = [f"{engine}_inside" for engine in ("sglang", "vllm") if importlib.util.find_spec(engine) is None]
