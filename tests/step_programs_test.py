"""The steps of nine kinds of run are, operation by operation, those on record."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

SCRIPT = pathlib.Path(__file__).with_name("step_programs.py")
RECORD = SCRIPT.with_suffix(".json")


@pytest.mark.slow
def test_step_programs_are_those_on_record() -> None:
    """A change that means to alter them runs the script with --write, and says so."""
    if jax.__version__ not in json.loads(RECORD.read_text()):
        pytest.skip(f"{RECORD.name} has no record of jax {jax.__version__}")
    # In a process of its own: it sets jax's flags, and these tests' may differ.
    quick = [] if os.environ.get("JAXTRAIN_TEST_ALL") else ["--quick"]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *quick],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
