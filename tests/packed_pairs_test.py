"""A data set of pairs packed ahead of training; objectives: batch_packing_test.py."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import train_pairs


@pytest.mark.slow
def test_a_packed_run_trains_on_every_pair(tmp_path, monkeypatch):
    """Steps over all pairs: in fewer rows, the losses are those of pairs alone."""
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": f"{n}?", "chosen": " The earth" * (1 + n % 3), "rejected": " void"}
        for n in range(8)
    ]
    alone, packed = (
        train_pairs(rows, tmp_path / str(packing), packing=packing)
        for packing in (False, True)
    )
    assert packed["num_tokens"] == alone["num_tokens"]
    for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
        # The same sums, taken in other rows: float32 rounding.
        assert packed[name] == pytest.approx(alone[name], rel=1e-3, abs=2e-4), name
