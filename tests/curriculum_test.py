"""Curricula in whole runs: how often the step compiles, what it is given, resume."""

import pathlib
import sys
from unittest import mock

import numpy as np
import pytest

from jaxtrain import build
from jaxtrain.trainer import TrainingOrchestrator

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config

BUCKETS = 3


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))


class Watched(TrainingOrchestrator):
    """Keeps the jitted step, and the batches that it is given."""

    def train(self, *rows):
        self.batches = []

        def watched_steps(*arguments):
            self.step, evaluate = make_steps(*arguments)

            def watched(state, batch):
                self.batches.append(batch)
                return self.step(state, batch)

            return watched, evaluate

        make_steps = build.make_steps
        with mock.patch.object(build, "make_steps", watched_steps):
            return super().train(*rows)


def config_of(training_type, **curriculum):
    config = tiny_config(training_type, max_steps=12, save_steps=0)
    config.data.max_length = 128
    config.training.save_final_model = False
    given = {"enabled": True, "start_length": 24, "steps": 6, "num_buckets": BUCKETS}
    for name, value in (given | curriculum).items():
        setattr(config.training.curriculum, name, value)
    return config


def run(config, workdir, rows=None):
    trainer = Watched(config, workdir=workdir)
    trainer.prepare()
    trainer.train(rows)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("training_type", ["from_scratch", "dpo"])
def test_the_step_compiles_at_most_once_a_bucket(training_type, tmp_path):
    config = config_of(training_type)
    config.data.packing = training_type == "from_scratch"  # a pair a row
    trainer = run(config, tmp_path)
    widths = [
        getattr(batch, "chosen", batch).tokens.shape[-1] for batch in trainer.batches
    ]
    assert len(widths) == 12 and widths == sorted(widths)
    assert 1 < len(set(widths)) <= BUCKETS
    assert trainer.step._cache_size() == len(set(widths))


def test_without_a_curriculum_there_is_one_length(tmp_path):
    trainer = run(config_of("sft", enabled=False), tmp_path)
    assert trainer.step._cache_size() == 1


@pytest.mark.slow
def test_the_models_own_loss_puts_easy_rows_first(tmp_path):
    """Half the rows are what the embedded model knows, half are noise to it."""
    known = "In the beginning God created the heaven and the earth"
    noise = "zq xj 8# vv qq kz 0& wx jj ~q xz"
    rows = [
        {"prompt": f"{n} ", "completion": known if n % 2 else noise} for n in range(24)
    ]
    config = config_of(
        "sft", strategy="difficulty_based", start_length=64, end_length=128
    )
    config.training.max_steps = 9
    trainer = run(config, tmp_path, rows)
    assert trainer.step._cache_size() == 1  # one length: rows differ in difficulty only
    lengths = {
        np.count_nonzero(t) for t in trainer.batches[0].segment_ids.reshape(4, -1)
    }
    later = {
        np.count_nonzero(t)
        for batch in trainer.batches[6:]
        for t in np.asarray(batch.segment_ids).reshape(4, -1)
    }
    assert lengths < later  # at first only the known text, whose length differs
    (kept,) = tmp_path.glob("difficulty-*.npy")
    difficulty = np.load(kept)
    assert difficulty[1::2].max() < difficulty[0::2].min()


@pytest.mark.slow
def test_a_resumed_run_takes_its_difficulties_from_the_work_directory(tmp_path, caplog):
    config = config_of("dpo", strategy="difficulty_based", start_length=32)
    config.training.save_steps = 5
    config.training.max_steps = 5
    run(config, tmp_path)
    (kept,) = tmp_path.glob("difficulty-*.npy")
    written = kept.stat().st_mtime_ns
    config.training.max_steps = 7
    resumed = run(config, tmp_path)
    assert len(resumed.batches) == 2
    assert kept.stat().st_mtime_ns == written
    # One bit of it flips: told, kept aside, and measured anew.
    sound = kept.read_bytes()
    kept.write_bytes(sound[:-12] + bytes([sound[-12] ^ 1]) + sound[-11:])
    config.training.max_steps = 9
    run(config, tmp_path)
    assert kept.read_bytes() == sound
    assert kept.with_name(f"{kept.name}.damaged").exists()
    assert "do not match their checksum: they are measured again" in caplog.text


def test_difficulty_of_pairs_is_what_the_model_prefers_wrongly():
    import jax.numpy as jnp

    from jaxtrain.passes.difficulty import row_difficulty
    from jaxtrain.types import Batch, PairBatch, TokenLogProbs

    def side(tokens, mask):
        tokens = jnp.asarray(tokens)
        ones = jnp.ones_like(tokens)
        return Batch(tokens, tokens, ones, ones, jnp.asarray(mask, jnp.float32))

    def score(params, batch):
        logps = -batch.tokens.astype(jnp.float32)
        return TokenLogProbs(logps, logps, logps, logps)

    batch = PairBatch(
        side([[9, 1, 3], [9, 4, 4]], [[0, 1, 1], [0, 1, 0]]),
        side([[9, 5, 5], [9, 1, 2]], [[0, 1, 1], [0, 1, 1]]),
    )
    # Means of 2 - 5 and of 4 - 1.5; the masked 9s count nowhere.
    assert row_difficulty(score, {}, batch).tolist() == [-3.0, 2.5]


def test_a_random_model_cannot_tell_difficulty(tmp_path):
    config = config_of("from_scratch", strategy="difficulty_based")
    with pytest.raises(ValueError, match="knows nothing finds all rows alike"):
        TrainingOrchestrator(config, workdir=tmp_path).prepare()


def test_a_column_without_difficulty_based_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"curriculum\.column = 'level'"):
        TrainingOrchestrator(config_of("sft", column="level")).prepare()
