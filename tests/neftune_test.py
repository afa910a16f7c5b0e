"""NEFTune: the strength of the noise, where it acts, and that a resumed run repeats it.

The reference is transformers' own forward hook (`neftune_noise_alpha`).
"""

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import ConfigError, resolve
from jaxtrain.models.noise import add_embedding_noise

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import records, tiny_config, train, weights

ROWS, TOKENS, WIDTH, ALPHA = 64, 48, 32, 5.0


def our_noise(lengths: list[int], seed: int = 0) -> np.ndarray:
    """The noise alone, of rows with these many tokens."""
    x = jnp.zeros((len(lengths), TOKENS, WIDTH))
    ids = jnp.arange(TOKENS)[None] < jnp.array(lengths)[:, None]
    key = jax.random.key(seed)
    return np.asarray(add_embedding_noise(x, ids.astype(jnp.int32), key, ALPHA))


def test_the_noise_is_uniform_as_transformers_hook_draws_it() -> None:
    torch = pytest.importorskip("torch")
    integrations = pytest.importorskip("transformers.integrations.neftune")
    module = torch.nn.Embedding(8, WIDTH)
    module.neftune_noise_alpha = ALPHA
    module.train()
    zeros = torch.zeros(ROWS, TOKENS, WIDTH)
    theirs = integrations.neftune_post_forward_hook(module, None, zeros).numpy()
    ours = our_noise([TOKENS] * ROWS)
    bound = ALPHA / np.sqrt(TOKENS * WIDTH)
    for noise in (ours, theirs):
        assert np.abs(noise).max() == pytest.approx(bound, rel=1e-3)
    # The same distribution: equal quantiles to what so many draws leave open.
    at = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(
        np.quantile(ours, at), np.quantile(theirs, at), atol=0.02 * bound
    )


def test_a_row_is_as_long_as_its_own_tokens() -> None:
    noise = our_noise([TOKENS, TOKENS // 4])
    largest = np.abs(noise).max((1, 2))
    assert largest[1] / largest[0] == pytest.approx(2.0, rel=1e-2)
    assert not np.array_equal(noise, our_noise([TOKENS, TOKENS // 4], seed=1))


def config_of(training_type: str = "sft", **training: Any) -> Any:
    config = tiny_config(training_type, **{"max_steps": 4, "save_steps": 2, **training})
    return config


def test_it_acts_on_training_alone_and_a_resumed_run_draws_the_same(
    tmp_path: pathlib.Path,
) -> None:
    keys = {"neftune_noise_alpha": ALPHA, "eval_steps": 4, "eval_on_start": True}
    keys["lr_scheduler_type"] = "constant"
    train(config_of(**keys), tmp_path / "once")
    plain = config_of(**keys | {"neftune_noise_alpha": None})
    plain.data.packing = False
    train(plain, tmp_path / "plain")
    noisy, calm = records(tmp_path / "once"), records(tmp_path / "plain")
    assert noisy[0]["eval_loss"] == calm[0]["eval_loss"]  # before any step
    assert noisy[1]["loss"] != calm[1]["loss"]
    train(config_of(**keys | {"max_steps": 2}), tmp_path / "parts")
    train(config_of(**keys), tmp_path / "parts")
    once, parts = weights(tmp_path / "once"), weights(tmp_path / "parts")
    assert all(np.array_equal(once[name], parts[name]) for name in once)


@pytest.mark.parametrize(
    ("training_type", "packing", "match"),
    [
        ("sft", True, "noise goes by the length of one"),
        ("lora", "batch", "noise goes by the length of one"),
        ("dpo", None, "noise on the policy alone"),
    ],
)
def test_where_it_would_be_another_noise_it_is_refused(
    training_type: str, packing: Any, match: str
) -> None:
    config = tiny_config(training_type, neftune_noise_alpha=ALPHA)
    config.data.packing = packing
    with pytest.raises(ConfigError, match=rf"neftune_noise_alpha = 5\.0: .*{match}"):
        resolve(config)
    if training_type != "dpo":
        config.data.packing = None
        assert resolve(config).data.packing is False
