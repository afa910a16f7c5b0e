"""Rows of one document need no segments in attention."""

import dataclasses

import jax
import numpy as np

from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.types import Batch

LENGTHS = (11, 16, 1)
T = 16


def test_one_document_a_row_scores_the_same_without_segments():
    """Right padding lies behind every real token, so causality keeps it out."""
    config = ModelConfig.from_hf(
        {
            "model_type": "mistral",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": 5,
        }
    )
    decoder = Decoder(config, compute_dtype="float32")
    params = decoder.init(jax.random.key(0))
    real = (np.arange(T)[None] < np.asarray(LENGTHS)[:, None]).astype(np.int32)
    tokens = np.random.default_rng(0).integers(0, 64, real.shape, np.int32)
    batch = Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        segment_ids=real,
        positions=np.arange(T, dtype=np.int32)[None] * real,
        loss_mask=real.astype(np.float32),
    )

    def loss(decoder, params):
        return (decoder.token_log_probs(params, batch).logps * batch.loss_mask).sum()

    grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    with_segments = grad(decoder, params)
    without = grad(dataclasses.replace(decoder, packed=False), params)
    for a, b in zip(
        jax.tree.leaves(with_segments), jax.tree.leaves(without), strict=True
    ):
        # Other float32 sums in another order.
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
