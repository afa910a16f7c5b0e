"""The feed as the configuration and the model want it."""

from types import SimpleNamespace
from typing import Any

import pytest
from runs import tiny_config

from jaxtrain.config.run import resolve
from jaxtrain.run.fitting import make_feed

pytestmark = pytest.mark.fast


def feed_of(training_type: str, *, context: int = 1, **training: Any) -> Any:
    """The feed of a run whose attention skips blocks."""
    config = tiny_config(training_type, **training)
    model: Any = SimpleNamespace(
        decoder=SimpleNamespace(skips_blocks=lambda length: True),
        plan=SimpleNamespace(mesh=SimpleNamespace(shape={"context": context})),
    )
    return make_feed(resolve(config, device_count=1), model)


@pytest.mark.parametrize("objective", ["auto", "next_token"])
def test_the_head_scores_what_is_trained_whether_or_not_the_loss_is_named(objective):
    assert feed_of("sft", objective=objective).selects


def test_pairs_are_scored_where_they_are_trained_by_default():
    assert feed_of("dpo").selects


def test_a_loss_that_reads_prompts_or_may_do_so_has_all_scored():
    assert not feed_of("dpo", objective="orpo").selects
    assert not feed_of("sft", use_auxiliary_loss=True).selects


def test_rows_that_devices_share_are_scored_whole():
    assert not feed_of("sft", context=2).selects
