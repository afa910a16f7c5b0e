"""Sick steps: groups of gradients, spikes, and what a run does about them."""

import itertools
import json
import logging
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import loop
from jaxtrain.data.batches.shared_prompt import share_prompts
from jaxtrain.optimizers import optim
from jaxtrain.record import diagnostics
from jaxtrain.record.diagnostics import named_arrays
from jaxtrain.run import bad_steps
from jaxtrain.run.feed import Feed
from jaxtrain.trainer import TrainingOrchestrator
from jaxtrain.types import Batch, PairBatch, WeightedSum

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from equations import equations
from runs import tiny_config


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("embed_tokens/embedding", "embed"),
        ("lm_head/kernel", "head"),
        ("norm/scale", "norm"),
        ("layers/post_attention_layernorm/scale", "norm"),
        ("layers/self_attn/q_norm/scale", "norm"),
        ("layers/self_attn/q_proj/kernel", "attention"),
        ("layers/self_attn/q_proj/lora_a", "lora"),
        ("layers/mlp/gate_proj/kernel", "mlp"),
        ("layers/block_sparse_moe/experts/w1/kernel", "mlp"),
        ("score/kernel", "other"),
    ],
)
def test_a_parameter_belongs_to_the_group_its_path_says(path, group):
    assert diagnostics.parameter_group(tuple(path.split("/"))) == group


@pytest.mark.parametrize("unrolled", [False, True])
def test_sums_of_squares_equal_numpy_and_unrolled_read_each_layer_alone(unrolled):
    rng = np.random.default_rng(0)
    shapes = {"mlp": (5, 6, 7), "experts": (3, 2, 4, 6), "norm": (5, 6)}
    layers = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    grads = {"embed": rng.normal(size=(9, 6)), "layers": layers}

    def sums(grads):
        return diagnostics.sum_squares_by_group(
            grads, lambda path: path[-1], unrolled=unrolled
        )

    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), grads)
    for name, leaf in {**layers, "embed": grads["embed"]}.items():
        # Up to 210 squares in float32: their roundings add up to less than 1e-5.
        np.testing.assert_allclose(sums(narrow)[name], (leaf**2).sum(), rtol=1e-5)
    reduced = {
        equation.invars[0].aval.shape
        for equation in equations(jax.make_jaxpr(sums)(narrow))
        if equation.primitive.name == "reduce_sum"
    }
    of_one = {shape[1:] if len(shape) > 2 else shape for shape in shapes.values()}
    expected = of_one if unrolled else set(shapes.values())
    assert reduced == expected | {(9, 6)}


def test_a_spike_lies_above_the_mean_of_a_full_window():
    window = diagnostics.init_loss_window(4)
    spikes = []
    # Mean 2 and standard deviation 1 once full: the limit at threshold 3 is 5.
    for loss in (1.0, 3.0, 1.0, 3.0, 4.9, 99.0):
        is_spike, window = diagnostics.detect_spike(window, jnp.float32(loss), 3.0)
        spikes.append(bool(is_spike))
    assert spikes == [False, False, False, False, False, True]
    # It enters cut to its limit, mean + 3 * std of (3, 1, 3, 4.9).
    before = np.array([3.0, 1.0, 3.0, 4.9])
    np.testing.assert_allclose(window[-1], before.mean() + 3 * before.std(), rtol=1e-6)
    _, same = diagnostics.detect_spike(window, jnp.float32(np.nan), 3.0)
    np.testing.assert_array_equal(same, window)


def test_a_level_that_rises_for_good_is_soon_normal():
    window = jnp.asarray([1.0, 1.1, 0.9, 1.0, 1.05])
    spikes = []
    for _ in range(8):
        is_spike, window = diagnostics.detect_spike(window, jnp.float32(3.0), 4.0)
        spikes.append(bool(is_spike))
    assert spikes[0] and not any(spikes[-3:])


def test_a_pair_batch_is_saved_flat(tmp_path):
    chosen, rejected = (
        Batch(*np.full((5, 1, 2, 2), pad_id, np.int32)) for pad_id in (3, 4)
    )
    pairs = PairBatch(chosen, rejected, ref_chosen_logps=np.ones(2))
    path = diagnostics.save_batch(tmp_path / "new", 7, pairs)
    assert path.name == "step_7.npz"
    saved = np.load(path)
    fields = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    names = {f"{side}/{name}" for side in ("chosen", "rejected") for name in fields}
    assert set(saved) == {*names, "ref_chosen_logps"}
    np.testing.assert_array_equal(saved["chosen/tokens"], chosen.tokens)
    np.testing.assert_array_equal(saved["rejected/tokens"], rejected.tokens)


def test_rows_that_share_prompts_are_saved_once(tmp_path):
    rows = Batch(*np.zeros((6, 1, 2, 4), np.int32))
    pairs = share_prompts(rows, pair_ids=np.ones((1, 2, 1), np.int32))
    saved = np.load(diagnostics.save_batch(tmp_path, 1, pairs))
    fields = {name for name, value in vars(rows).items() if value is not None}
    assert set(saved) == {"pair_ids", *(f"shared/{name}" for name in fields)}


# --- whole runs --------------------------------------------------------------------


class Sabotaged(TrainingOrchestrator):
    """Its loss is multiplied by `factor` in the steps whose batch is asked for.

    The batch tells itself by its first token, so nothing outside the step is read.
    """

    factor = 1.0
    first_token = -1

    def make_objective(self):
        objective = super().make_objective()

        def sabotaged(policy, reference, batch):
            loss, metrics = objective(policy, reference, batch)
            hit = (batch.tokens[:, 0] == self.first_token).any() | (
                self.first_token == -2
            )
            total = loss.total * jnp.where(hit, self.factor, 1.0)
            return WeightedSum(total, loss.weight), metrics

        return sabotaged


def sabotaged_run(workdir, factor, step, **training):
    """A run of 8 steps of which one is sabotaged; its first rows and its records."""
    config = tiny_config(
        "from_scratch",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        save_steps=0,
        save_final_model=False,
        **training,
    )
    trainer = Sabotaged(config, workdir=workdir)
    trainer.prepare()
    data = trainer.prepare_rows(trainer.load_training_data())
    feed = Feed(trainer.run, trainer.model.plan)
    batches = list(itertools.islice(feed.train_batches(data), 8))
    firsts = [int(b.tokens[0, 0, 0]) for b in batches]
    if step is None:
        trainer.first_token = -2
    else:
        assert firsts.count(firsts[step - 1]) == 1, "choose a step of its own token"
        trainer.first_token = firsts[step - 1]
    trainer.factor = factor
    return trainer, data, batches


def read_records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_nan_stops_the_run_names_the_step_and_saves_its_rows(tmp_path):
    trainer, data, batches = sabotaged_run(tmp_path, np.nan, 4)
    with pytest.raises(FloatingPointError, match=r"step 4: the gradient is not finite"):
        trainer.train(data)
    saved = np.load(tmp_path / "bad_batches" / "step_4.npz")
    for name, array in named_arrays(batches[3]).items():
        np.testing.assert_array_equal(saved[name], array)


def test_a_nan_is_skipped_and_leaves_no_trace_in_the_weights(tmp_path, caplog):
    trainer, data, _ = sabotaged_run(
        tmp_path, np.nan, 4, on_nonfinite="skip", log_grad_norm_by_group=True
    )
    with caplog.at_level(logging.WARNING):
        results = trainer.train(data)
    assert "step 4 skipped: the gradient is not finite" in caplog.text
    assert results["global_step"] == 8 and np.isfinite(results["final_loss"])
    found = read_records(tmp_path)
    assert [r["step"] for r in found if "loss" not in r] == [4]
    assert found[3]["skipped_steps"] == 1
    assert (tmp_path / "bad_batches" / "step_4.npz").is_file()
    for record in found[:3] + found[4:]:
        groups = [v for k, v in record.items() if k.startswith("grad_norm/")]
        assert len(groups) == 4  # embed (tied), attention, mlp, norm
        norm = np.sqrt(sum(value**2 for value in groups))
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_spike_is_skipped_or_stops_the_run(tmp_path):
    spike = {"spike_threshold": 6.0, "spike_window": 3}
    trainer, data, _ = sabotaged_run(tmp_path / "a", 50.0, 6, **spike)
    with pytest.raises(FloatingPointError, match=r"step 6: the loss .*spike_threshold"):
        trainer.train(data)
    assert (tmp_path / "a" / "bad_batches" / "step_6.npz").is_file()
    trainer, data, _ = sabotaged_run(tmp_path / "b", 50.0, 6, on_spike="skip", **spike)
    trainer.train(data)
    found = read_records(tmp_path / "b")
    assert [r["step"] for r in found if "loss" not in r] == [6]
    # The step after it starts from the weights before it.
    assert found[6]["loss"] < 1.2 * found[4]["loss"]


def test_a_run_that_only_skips_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_steps, "_MOST_SKIPS_IN_A_ROW", 3)
    trainer, data, _ = sabotaged_run(tmp_path, np.nan, None, on_nonfinite="skip")
    with pytest.raises(FloatingPointError, match=r"step 3: .* 3 steps in a row"):
        trainer.train(data)


def test_skipping_keeps_every_weight_bit_for_bit(tmp_path, monkeypatch):
    trainer, data, _ = sabotaged_run(
        tmp_path, np.nan, None, on_nonfinite="skip", max_steps=2
    )
    before = jax.tree.map(np.array, trainer.model.params)
    kept = {}

    original = loop.Loop.run_to_end

    def run_to_end(self):
        results = original(self)
        kept["trainable"] = self.state.trainable
        return results

    monkeypatch.setattr(loop.Loop, "run_to_end", run_to_end)
    trainer.train(data)
    jax.tree.map(np.testing.assert_array_equal, before, kept["trainable"])


def test_fp16_names_each_skipped_step_with_both_scales(tmp_path, monkeypatch, caplog):
    # So small that no step overflows of itself.
    scale = optim.LossScale(jnp.float32(8), jnp.int32(0))
    monkeypatch.setattr(optim, "init_loss_scale", lambda: scale)
    trainer, data, _ = sabotaged_run(tmp_path, np.inf, 4, fp16=True, logging_steps=2)
    with caplog.at_level(logging.WARNING):
        results = trainer.train(data)
    lines = [m for m in caplog.messages if "skipped" in m]
    assert lines == [
        "step 4 skipped: the gradient overflowed float16; loss scale 8 -> 4"
    ]
    found = {record["step"]: record for record in read_records(tmp_path)}
    told = [(found[n]["loss_scale"], found[n].get("skipped_steps")) for n in found]
    assert told == [(8, None), (8, 1), (4, None), (4, None)]
    # Step 3 alone makes the record, for the loss of step 4 is infinite too.
    assert np.isfinite([found[4][name] for name in ("loss", "grad_norm")]).all()
    assert results["skipped_steps"] == 1
    assert not (tmp_path / "bad_batches").exists()


def test_a_loss_is_logged_though_its_gradient_overflowed(tmp_path, monkeypatch):
    scales = iter([2.0**60, 2.0**3])
    trainer, data, _ = sabotaged_run(
        tmp_path / "a", 1.0, None, fp16=True, max_steps=2, logging_steps=2
    )
    monkeypatch.setattr(
        optim,
        "init_loss_scale",
        lambda: optim.LossScale(jnp.float32(next(scales)), jnp.int32(0)),
    )
    trainer.train(data)
    (skipped,) = read_records(tmp_path / "a")
    assert skipped["skipped_steps"] == 2 and "grad_norm" not in skipped
    trainer, data, _ = sabotaged_run(
        tmp_path / "b", 1.0, None, fp16=True, max_steps=1, logging_steps=1
    )
    trainer.train(data)
    (trained,) = read_records(tmp_path / "b")
    assert "skipped_steps" not in trained and trained["grad_norm"] > 0
    # The weights are those of the start in both, and rows of one kind are as hard.
    assert skipped["loss"] == pytest.approx(trained["loss"], rel=0.05)


def test_fp16_ends_where_no_scale_helps(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bad_steps, "_MOST_SKIPS_IN_A_ROW", 3)
    trainer, data, _ = sabotaged_run(
        tmp_path, np.nan, None, fp16=True, logging_steps=5, max_steps=22
    )
    # 2**16 is halved to 1 in 16 steps; the next 3 are those that count.
    with pytest.raises(FloatingPointError, match=r"step 19: .* 3 steps in .*bf16"):
        trainer.train(data)
    scales = [m.split("loss scale ")[1] for m in caplog.messages if "skipped" in m]
    assert scales == [
        f"{2.0 ** (17 - k):g} -> {2.0 ** (16 - k):g}" for k in range(1, 20)
    ]
    assert [r.get("skipped_steps") for r in read_records(tmp_path)] == [5, 5, 5]
    assert (tmp_path / "bad_batches" / "step_19.npz").is_file()
