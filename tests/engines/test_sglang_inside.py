"""Runs the tests of `sglang_inside` where SGLang is installed."""

import subprocess

from tests.engines import sglang_runs


def test_sglangs_own_classes_and_kernels():
    tests = [sglang_runs.python(), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engines/sglang_inside"]
    ran = subprocess.run(tests, cwd=sglang_runs.ROOT, env=sglang_runs.environment({}), capture_output=True, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
    assert " skipped" not in ran.stdout
