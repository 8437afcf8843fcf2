"""Runs the tests of `vllm_inside` where vLLM is installed."""

import subprocess

from tests.engines import runs


def test_vllms_own_classes():
    tests = [runs.python("vllm"), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engines/vllm_inside"]
    flags = {"TRITON_INTERPRET": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    ran = subprocess.run(tests, cwd=runs.ROOT, env=runs.environment(flags), capture_output=True, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
    assert " skipped" not in ran.stdout
