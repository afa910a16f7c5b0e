"""Checkpoints that an older version wrote restore bit by bit: `tests/checkpoints`."""

import json
import pathlib
import shutil
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from checkpoint_runs import FOLDER, SAVED_STEP, TYPES, make_config
from make_checkpoints import describe, restored_state

LARGEST_FOLDER = 300_000  # bytes, all files together


@pytest.mark.parametrize("training_type", TYPES)
def test_an_old_checkpoint_restores_bit_by_bit(tmp_path, training_type):
    workdir = tmp_path / "run"
    shutil.copytree(FOLDER / training_type, workdir)
    stored = json.loads((FOLDER / "digests.json").read_text())[training_type]
    found = describe(restored_state(make_config(training_type), workdir))
    assert found["record"] == stored["record"]
    assert found["record"]["step"] == SAVED_STEP
    for part in ("state", "next_batch"):
        assert found[part].keys() == stored[part].keys()
        wrong = [
            name for name in found[part] if found[part][name] != stored[part][name]
        ]
        assert not wrong, f"{part}: dtype, shape or bytes differ in {wrong}"


def test_the_stored_checkpoints_cover_the_state_and_stay_small():
    stored = json.loads((FOLDER / "digests.json").read_text())
    states = [stored[training_type]["state"] for training_type in TYPES]
    parts = {name.split(".")[0] for state in states for name in state}
    assert parts == {
        "step", "trainable", "frozen", "opt_state", "rng", "loss_scale", "loss_window",
    }  # fmt: skip
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST_FOLDER
