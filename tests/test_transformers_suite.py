"""transformers' own tests of a model pass on ours; see transformers_suite/run.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from .transformers_suite import run

SCRIPT = Path(run.__file__)


@pytest.mark.network
@pytest.mark.slow
def test_the_suite_of_transformers_passes() -> None:
    pytest.importorskip("parameterized")
    if transformers.__version__ != run.VERSION:
        pytest.skip(f"the suite is that of transformers {run.VERSION}, installed is {transformers.__version__}")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.parametrize(
    ("outcome", "excused", "row", "good"),
    [
        ("passed", False, None, True),
        ("skipped", False, "skipped", True),
        ("failed", False, "failed", False),
        ("failed", True, "exception", True),
        ("passed", True, "exception no longer needed", False),
    ],
)
def test_an_exception_counts_only_where_the_test_fails(outcome, excused, row, good) -> None:
    rows, ok = run.judge({"test_a": (outcome, "why")}, {"test_a": "reason"} if excused else {})
    assert [line[0] for line in rows] == ([row] if row else [])
    assert ok is good


def test_a_run_without_tests_is_not_good() -> None:
    assert run.judge({}, {}) == ([], False)
