"""The cache of reference log-probs: right sums, resumed, repaired where damaged."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain import assets, sharding
from jaxtrain.config import resolve
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.rows.tokenize import load_tokenizer
from jaxtrain.passes import reference
from jaxtrain.run.feed import Feed
from jaxtrain.types import TokenLogProbs

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config

ROWS, BATCH = 10, 4


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(assets.asset_path(assets.TOKENIZER)))


def make_data(tokenizer, *, last="sky"):
    rows = [
        {"prompt": f"What is {n}?", "chosen": " The sea" * (n + 1), "rejected": " No"}
        for n in range(ROWS - 1)
    ]
    rows.append({"prompt": "Where?", "chosen": f" In the {last}", "rejected": " Here"})
    return prepare(
        rows, tokenizer, PrepareOptions(objective="preference", max_length=64)
    )


def score(params, batch):
    """log p of a target is its id times the only weight: sums can be done by hand."""
    logps = params["w"] * batch.targets
    zeros = jnp.zeros_like(logps)
    return TokenLogProbs(logps, zeros, zeros, zeros)


def make_scorer(directory, *, weight=-0.5, tokenizer_hash="t", placed=None):
    """A scorer on one device, which counts the batches that it places."""

    class Counting(Feed):
        def place(self, batch, leading_axes=0):
            if placed is not None:
                placed.append(batch)
            return super().place(batch, leading_axes)

    run = resolve(tiny_config("dpo", per_device_eval_batch_size=BATCH), device_count=1)
    return reference.ReferenceScorer(
        score,
        {"w": jnp.float32(weight)},
        Counting(
            run,
            sharding.ShardingPlan(
                sharding.make_mesh(run.mesh.sizes, jax.devices()[:1])
            ),
        ),
        directory,
        {"tokenizer": tokenizer_hash},
    )


def sums_by_hand(data, weight=-0.5):
    batch = data.batch(np.arange(ROWS))
    return [
        weight * (getattr(batch, side).targets * getattr(batch, side).loss_mask).sum(-1)
        for side in ("chosen", "rejected")
    ]


def attached(data):
    batch = data.batch(np.array([*range(ROWS), -1]))
    assert batch.ref_chosen_logps[-1] == batch.ref_rejected_logps[-1] == 0
    return [batch.ref_chosen_logps[:-1], batch.ref_rejected_logps[:-1]]


def test_the_sums_are_of_the_completions_and_a_second_run_computes_none(
    tokenizer, tmp_path
):
    data, placed = make_data(tokenizer), []
    first = make_scorer(tmp_path, placed=placed).attach(data, "train")
    np.testing.assert_array_equal(attached(first), sums_by_hand(data))
    assert len(placed) == 3  # 4 + 4 + 2 rows
    again = make_scorer(tmp_path, placed=placed).attach(data, "train")
    assert len(placed) == 3
    np.testing.assert_array_equal(attached(again), attached(first))


@pytest.mark.parametrize("kept_bytes", [0, 3, 4 * 8, 5 * 8 + 1, 9 * 8])
def test_a_run_that_stopped_goes_on_at_the_last_whole_batch(
    kept_bytes, tokenizer, tmp_path
):
    data = make_data(tokenizer)
    make_scorer(tmp_path).attach(data, "train")
    file = tmp_path / "train" / "logps.float32"
    whole, placed = file.read_bytes(), []
    file.write_bytes(whole[:kept_bytes])
    resumed = make_scorer(tmp_path, placed=placed).attach(data, "train")
    assert file.read_bytes() == whole
    assert len(placed) == 3 - kept_bytes // 8 // BATCH
    np.testing.assert_array_equal(attached(resumed), sums_by_hand(data))


def test_train_and_eval_data_have_caches_of_their_own(tokenizer, tmp_path):
    train, held_out = make_data(tokenizer), make_data(tokenizer, last="river")
    scorer = make_scorer(tmp_path)
    scorer.attach(train, "train")
    attached_eval = attached(scorer.attach(held_out, "eval"))
    np.testing.assert_array_equal(attached_eval, sums_by_hand(held_out))


@pytest.mark.parametrize("changed", ["weights", "tokenizer", "data"])
def test_a_stale_cache_is_set_aside_and_computed_anew(
    changed, tokenizer, tmp_path, caplog
):
    make_scorer(tmp_path).attach(make_data(tokenizer), "train")
    old = (tmp_path / "train" / "logps.float32").read_bytes()
    data = make_data(tokenizer, last="sea" if changed == "data" else "sky")
    weight = -0.75 if changed == "weights" else -0.5
    scorer = make_scorer(
        tmp_path,
        weight=weight,
        tokenizer_hash="u" if changed == "tokenizer" else "t",
    )
    np.testing.assert_array_equal(
        attached(scorer.attach(data, "train")), sums_by_hand(data, weight)
    )
    assert (
        f"{tmp_path}/train are stale (they were computed for other {changed})"
        in caplog.text
    )
    assert (tmp_path / "train.stale" / "logps.float32").read_bytes() == old


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda at: flip_a_bit(at / "logps.float32"), "rows 4 to 7 do not match"),
        (lambda at: flip_a_bit(at / "checksums.jsonl"), "checksum"),
        (lambda at: (at / "identity.json").write_text("{"), "identity.json: "),
        (lambda at: (at / "identity.json").write_bytes(b"\xff"), "identity.json: "),
        (lambda at: (at / "identity.json").unlink(), "identity.json: "),
        (lambda at: (at / "checksums.jsonl").write_text("[4]\n"), "checksums.jsonl: "),
        (lambda at: (at / "checksums.jsonl").unlink(), "have no checksums"),
    ],
)
def test_a_damaged_cache_is_named_set_aside_and_computed_anew(
    damage, named, tokenizer, tmp_path, caplog
):
    data, placed = make_data(tokenizer), []
    make_scorer(tmp_path).attach(data, "train")
    damage(tmp_path / "train")
    repaired = make_scorer(tmp_path, placed=placed).attach(data, "train")
    np.testing.assert_array_equal(attached(repaired), sums_by_hand(data))
    assert named in caplog.text and str(tmp_path / "train") in caplog.text
    aside = {path.name for path in tmp_path.iterdir()} - {"train"}
    assert aside in ({"train.damaged"}, {"train.stale"})
    caplog.clear()
    make_scorer(tmp_path, placed=placed).attach(data, "train")
    assert len(placed) == 3 and "aside" not in caplog.text  # sound from now on


def test_a_batch_without_its_checksum_is_computed_again(tokenizer, tmp_path, caplog):
    data, placed = make_data(tokenizer), []
    make_scorer(tmp_path).attach(data, "train")
    lines = tmp_path / "train" / "checksums.jsonl"
    lines.write_bytes(lines.read_bytes()[:-3])  # killed in the last one
    resumed = make_scorer(tmp_path, placed=placed).attach(data, "train")
    assert len(placed) == 1 and "set aside" not in caplog.text
    np.testing.assert_array_equal(attached(resumed), sums_by_hand(data))


# --- fingerprints ------------------------------------------------------------------


def make_weights(dtype=jnp.float32):
    draw = np.random.default_rng(0).standard_normal((16, 8))
    return {"a": jnp.asarray(draw, dtype), "b": jnp.zeros(3, dtype)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fingerprint_tells_one_bit_one_place_one_name_and_one_type(dtype):
    weights = make_weights(dtype)
    same = reference.fingerprint(make_weights(dtype))
    assert reference.fingerprint(weights) == same
    a = weights["a"]
    nudged = a.at[3, 2].set(jnp.nextafter(a[3, 2], jnp.asarray(9, dtype)))
    others = [
        {**weights, "a": nudged},
        {**weights, "a": a.at[jnp.array([0, 1])].set(a[jnp.array([1, 0])])},
        {**weights, "a": a.T},
        {**weights, "b": -weights["b"]},  # zeros of the other sign
        {"a": a, "c": weights["b"]},
        make_weights(jnp.float16),
    ]
    found = {reference.fingerprint(tree) for tree in others}
    assert len(found) == len(others) and same not in found


@pytest.mark.parametrize("spec", [("x",), (None, "x"), ()])
def test_a_fingerprint_is_the_same_in_any_layout(spec):
    weights = make_weights()
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharded = weights | {
        "a": jax.device_put(weights["a"], NamedSharding(mesh, PartitionSpec(*spec)))
    }
    assert reference.fingerprint(sharded) == reference.fingerprint(weights)


def test_a_tokenizers_fingerprint_covers_its_chat_template(tokenizer):
    before = reference.tokenizer_fingerprint(tokenizer)
    template = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages }}"
    assert reference.tokenizer_fingerprint(tokenizer) != before
    tokenizer.chat_template = template
    assert reference.tokenizer_fingerprint(tokenizer) == before
