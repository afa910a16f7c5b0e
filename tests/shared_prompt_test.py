"""Pairs that share a prompt's copy: the same tokens, log-probs and losses."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.config import ConfigError, default_config, resolve
from jaxtrain.data.batches import pack
from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore
from jaxtrain.data.batches.shared_prompt import pair_lengths
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Decoder
from jaxtrain.objectives import make_objective
from jaxtrain.run import fitting
from jaxtrain.types import Batch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import train_pairs

STATS = DataStats()
SIDES = ("chosen", "rejected")

pair_sizes = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)).filter(
    lambda sizes: min(sizes[0] + sizes[1], sizes[0] + sizes[2]) > 0
)


def datasets_of(sizes, *, packing, seed=0, vocabulary=50):
    """The same pairs of (prompt, chosen, rejected) tokens: apart, and sharing."""
    random = np.random.default_rng(seed)
    stores = {}
    prompts = [random.integers(1, vocabulary, prompt) for prompt, *_ in sizes]
    for side, name in enumerate(SIDES, start=1):
        ids = [
            np.concatenate([prompt, random.integers(1, vocabulary, size[side])])
            for prompt, size in zip(prompts, sizes, strict=True)
        ]
        trained = [
            np.arange(len(tokens)) >= len(prompt)
            for tokens, prompt in zip(ids, prompts, strict=True)
        ]
        lengths = np.array([len(tokens) for tokens in ids])
        stores[name] = TokenStore(
            np.concatenate(ids).astype(np.int32),
            np.concatenate(trained),
            np.cumsum(lengths) - lengths,
            lengths,
            np.arange(len(sizes)),
            np.arange(len(sizes) + 1),
        )
    apart = PreparedDataset("preference", stores, 10, 0, STATS)
    if packing:
        offsets, documents = pack.pack_best_fit(pair_lengths(stores), 32)
        stores = {
            name: dataclasses.replace(
                store, row_documents=documents, row_offsets=offsets
            )
            for name, store in stores.items()
        }
    sharing = PreparedDataset("preference", stores, 32, 0, STATS, shares_prompts=True)
    return apart, sharing


def predictions(batch, row, segment=None):
    """What a side predicts: (context, target, weight) of each trained position."""
    found = []
    segments = batch.segment_ids[row]
    prompt_ids = batch.prompt_ids
    for t in np.flatnonzero(batch.loss_mask[row]):
        if segment is not None and segments[t] != segment:
            continue
        reads = segments == segments[t]
        if prompt_ids is not None:
            reads |= segments == prompt_ids[row][t]
        reads &= np.arange(len(segments)) <= t
        order = np.argsort(batch.positions[row][reads])
        assert list(batch.positions[row][reads][order]) == list(range(reads.sum()))
        context = tuple(batch.tokens[row][reads][order].tolist())
        found.append((context, int(batch.targets[row][t])))
    return found


@given(st.lists(pair_sizes, min_size=1, max_size=5), st.booleans())
def test_every_prediction_reads_the_context_that_it_reads_alone(sizes, packing):
    apart, sharing = datasets_of(sizes, packing=packing)
    alone = apart.batch(np.arange(len(apart)))
    rows = np.arange(len(sharing))
    shared = sharing.batch(rows).shared
    np.testing.assert_array_equal(
        sharing.row_lengths(), (shared.segment_ids > 0).sum(-1)
    )
    store = sharing.stores["chosen"]
    for row in rows:
        documents = store.row_documents[
            store.row_offsets[row] : store.row_offsets[row + 1]
        ]
        for pair, document in enumerate(documents, start=1):
            for side, segment in (("chosen", 3 * pair - 1), ("rejected", 3 * pair)):
                assert predictions(shared, row, segment) == predictions(
                    getattr(alone, side), document
                )


@pytest.fixture(scope="module")
def decoder():
    config = ModelConfig.from_hf(
        {
            "model_type": "qwen2",
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
    )
    return Decoder(config, compute_dtype="float32", packed=True)


@pytest.mark.parametrize("packing", [False, True])
def test_the_model_gives_each_side_the_log_probs_that_it_has_alone(decoder, packing):
    sizes = [(4, 3, 5), (1, 2, 2), (0, 3, 2), (5, 0, 4), (5, 5, 1)]
    apart, sharing = datasets_of(sizes, packing=packing)
    params = decoder.init(jax.random.key(0))
    alone = apart.batch(np.arange(len(apart)))
    batch = sharing.batch(np.arange(len(sharing)))
    score = jax.jit(decoder.token_log_probs)
    together = score(params, jax.tree.map(jnp.asarray, batch.shared)).logps
    for side in SIDES:
        rows: Batch = getattr(batch, side)
        apart_rows: Batch = getattr(alone, side)
        expected = score(params, apart_rows).logps * apart_rows.loss_mask
        found = together * rows.loss_mask
        # Each side of the pair is a batch of its own, too.
        by_itself = score(params, rows).logps * rows.loss_mask
        np.testing.assert_allclose(by_itself, found, atol=2e-6)
        # float32 attention over other blocks: a few units in the last place.
        np.testing.assert_allclose(
            np.sort(found[rows.loss_mask > 0]),
            np.sort(expected[apart_rows.loss_mask > 0]),
            atol=5e-6,
        )


def test_under_a_window_shorter_than_a_pair_prompts_are_not_shared(decoder):
    config = dataclasses.replace(
        decoder.config, sliding_window=8, layer_types=("sliding_attention",) * 2
    )
    windowed = dataclasses.replace(decoder, config=config)
    assert "window of 8" in windowed.why_no_shared_prompts(32)
    assert windowed.why_no_shared_prompts(8) is None
    assert decoder.why_no_shared_prompts(4096) is None
    store = TokenStore(
        *(np.ones(12, np.int32), np.arange(12) > 4, np.array([0])),
        *(np.array([12]), np.array([0]), np.array([0, 1])),
    )
    sides = {"chosen": store, "rejected": store}
    data = PreparedDataset("preference", sides, 64, 0, DataStats(), shares_prompts=True)
    assert fitting.fit(data, decoder) is data
    apart = fitting.fit(data, windowed)  # 12 + 12 - 4 tokens
    assert not apart.shares_prompts and apart.row_length == 64


def test_only_pairs_may_share_prompts():
    config = default_config()
    config.training.training_type = "sft"
    config.data.share_prompts = True
    with pytest.raises(ConfigError, match=r"data\.share_prompts = True.*single texts"):
        resolve(config, device_count=1)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("preference", {}),
        ("preference", {"ld_alpha": 0.5}),
        ("preference", {"loss_type": "ipo", "reference_free": True}),
        ("preference", {"precompute_ref_log_probs": True}),
        ("orpo", {}),
        ("simpo", {}),
    ],
)
def test_losses_and_metrics_are_those_of_pairs_in_two_rows(decoder, objective, options):
    apart, sharing = datasets_of([(4, 3, 5), (1, 2, 2), (5, 5, 1)], packing=False)
    policy, reference = (decoder.init(jax.random.key(seed)) for seed in (0, 1))
    score = jax.jit(decoder.token_log_probs)
    rows = np.arange(3)
    logps = (-np.ones(3, np.float32),) * 2
    apart, sharing = (data.with_reference_logps(*logps) for data in (apart, sharing))
    found, expected = (
        make_objective(objective, **options)(
            lambda rows: score(policy, rows), lambda rows: score(reference, rows), batch
        )
        for batch in (sharing.batch(rows), apart.batch(rows))
    )
    assert found[1].keys() == expected[1].keys()
    for name, value in {"loss": expected[0], **expected[1]}.items():
        got = {"loss": found[0], **found[1]}[name]
        # float32 attention over rows of another length.
        assert float(got.total) == pytest.approx(float(value.total), abs=2e-5), name
        assert float(got.weight) == float(value.weight), name


@pytest.mark.slow
def test_a_packed_run_that_shares_prompts_trains_as_one_that_does_not(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "prompt": f"In the beginning, {n}",
            "chosen": " the earth" * (1 + n % 3),
            "rejected": " void" * (1 + n % 2),
        }
        for n in range(8)
    ]
    apart, sharing = (
        train_pairs(rows, tmp_path / str(on), packing=on, share_prompts=on)
        for on in (False, True)
    )
    assert sharing["num_tokens"] == apart["num_tokens"]
    for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
        # The same sums over rows of another length; float32, and Adam's first step
        # divides small gradients by themselves.
        assert sharing[name] == pytest.approx(apart[name], rel=1e-3, abs=2e-4), name
