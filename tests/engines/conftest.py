"""Tests with the real engines, each in an environment of its own."""

import importlib.util

#: `test_sglang_inside.py` runs these in SGLang's environment.
collect_ignore = [] if importlib.util.find_spec("sglang") else ["sglang_inside"]
