"""Runs in a bucket that are killed at single requests end as without kills."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import jaxtrain

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from buckets import skip_unless_installed

TREE = str(pathlib.Path(jaxtrain.__file__).parent.parent)
SCRIPT = pathlib.Path(__file__).parent / "faults" / "bucket_kills.py"


@pytest.mark.parametrize(
    "scheme, processes, seed",
    [
        ("gs", 1, 4),
        ("s3", 1, 4),
        ("gs", 2, 4),
    ],
)
def test_a_run_killed_at_requests_ends_as_without_kills(
    scheme, processes, seed, tmp_path
):
    skip_unless_installed("gs")
    skip_unless_installed("s3")
    ended = subprocess.run(
        [
            *(sys.executable, SCRIPT, f"--scheme={scheme}", f"--seed={seed}"),
            *("--count=2", f"--processes={processes}", f"--folder={tmp_path}"),
        ],
        env={**os.environ, "PYTHONPATH": TREE},
        capture_output=True,
        text=True,
        timeout=600,
    )
    rounds = [
        json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")
    ]
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sum(len(played["kills"]) for played in rounds) >= 2
    assert all(played["lost"] is None for played in rounds)
