"""Whole runs whose rows are split over devices: the numbers of one device."""

import json
import pathlib
import sys

import numpy as np
import pytest
import safetensors.numpy

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config, train

ROWS = 4  # of a micro-batch, over all devices
CASES = {
    "from_scratch": {"context": 4, "tensor": 2},
    "sft": {"data": 2, "context": 4},
    "lora": {"fsdp": 2, "context": 2, "tensor": 2},
    "lora_whole": {"context": 4, "tensor": 2},  # weights are, on each that shares rows
    "dpo": {"fsdp": 4, "context": 2},
}


def run(training_type, mesh, workdir):
    """Two steps of plain gradient descent: the log and the weights."""
    config = tiny_config(
        training_type.removesuffix("_whole"),
        num_gpus=8 if mesh else 1,
        per_device_train_batch_size=ROWS // (mesh.get("data", 1) * mesh.get("fsdp", 1)),
        gradient_accumulation_steps=1,
        # Adam divides a gradient by its size: rounding would decide the signs.
        optimizer="sgd",
        learning_rate=1.0,
        max_steps=2,
        save_steps=0,
    )
    for axis, size in mesh.items():
        config.mesh[axis] = size
    config.data.packing = True
    train(config, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    folder = "adapter" if training_type.startswith("lora") else "model"
    (weights,) = (workdir / folder).glob("*.safetensors")
    return [json.loads(line) for line in lines], safetensors.numpy.load_file(weights)


@pytest.mark.parametrize(
    "training_type",
    ["sft", *(pytest.param(t, marks=pytest.mark.slow) for t in CASES if t != "sft")],
)
def test_losses_gradients_and_weights_are_those_of_one_device(training_type, tmp_path):
    one, one_weights = run(training_type, {}, tmp_path / "one")
    many, many_weights = run(training_type, CASES[training_type], tmp_path / "many")
    for ours, theirs in zip(many, one, strict=True):
        assert ours["num_tokens"] == theirs["num_tokens"]
        for name in ("loss", "grad_norm", "mean_token_accuracy"):
            # Sums of float32 in another order.
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert many_weights.keys() == one_weights.keys()
    for name, weight in one_weights.items():
        np.testing.assert_allclose(many_weights[name], weight, rtol=1e-5, atol=1e-7)
