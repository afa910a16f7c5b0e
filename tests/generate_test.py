"""Generation: filtering against numpy, the loop against transformers and itself."""

import functools
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.cli.generate import require_template
from jaxtrain.evaluation.generate import (
    encode_prompt,
    filter_logits,
    generate_texts,
    make_generate,
)
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Decoder

VOCABULARY = 64


@functools.cache
def tiny_model() -> tuple[Decoder, dict]:
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
    )
    decoder = Decoder(config, compute_dtype="float32")
    params = decoder.init(jax.random.key(0))
    # Wider logits than a fresh model's, so that greedy choices are no near ties.
    params["lm_head"]["kernel"] *= 20
    return decoder, params


def pad(rows: list[list[int]], side: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), width), 63, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[b, at], mask[b, at] = row, 1
    return tokens, mask


def greedy_without_cache(rows: list[list[int]], count: int) -> np.ndarray:
    """The whole forward pass again for each new token."""
    decoder, params = tiny_model()
    forward = jax.jit(decoder.logits)
    result = []
    for row in rows:
        ids = list(row)
        for _ in range(count):
            tokens, mask = pad([ids], "right", 32)
            positions = np.arange(32, dtype=np.int32)[None]
            logits = forward(params, jnp.asarray(tokens), positions, jnp.asarray(mask))
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        result.append(ids[len(row) :])
    return np.array(result)


PROMPTS = [[1, 5, 9, 20], [7], [3, 3, 40, 11, 12, 13, 60], [50, 2]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [7, 12])
def test_greedy_equals_the_full_forward_pass_however_prompts_are_padded(side, width):
    decoder, params = tiny_model()
    generate = make_generate(decoder, max_new_tokens=6, temperature=0)
    tokens, mask = pad(PROMPTS, side, width)
    found = generate(params, tokens, mask, jax.random.key(0))
    expected = greedy_without_cache(PROMPTS, 6)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 6  # not one token over and over


def test_a_row_ends_at_its_end_token_and_is_padded_after_it():
    decoder, params = tiny_model()
    free = greedy_without_cache(PROMPTS, 6)
    ends = (int(free[0, 2]), int(free[2, 0]))
    generate = make_generate(
        decoder, max_new_tokens=6, temperature=0, eos_ids=ends, pad_id=77
    )
    tokens, mask = pad(PROMPTS, "left", 7)
    found = np.asarray(generate(params, tokens, mask, jax.random.key(0)))
    expected = free.copy()
    for row in expected:
        hits = np.flatnonzero(np.isin(row, ends))
        if hits.size:
            row[hits[0] + 1 :] = 77
    np.testing.assert_array_equal(found, expected)
    assert (found[2, 1:] == 77).all()


class CountingDecoder:
    """Always likes token 5 best; counts how often it runs."""

    def __init__(self) -> None:
        self.calls = 0

    def init_cache(self, batch, max_len):
        return jnp.zeros((batch, max_len), jnp.int32)

    def decode(self, params, tokens, positions, cache, segment_ids):
        jax.debug.callback(self._count)
        return jax.nn.one_hot(jnp.full(len(tokens), 5), 8), cache

    def _count(self):
        self.calls += 1


def test_the_loop_stops_as_soon_as_every_row_has_ended():
    counts = {}
    for ends in ((5,), (6,)):
        decoder = CountingDecoder()
        generate = make_generate(
            decoder, max_new_tokens=20, temperature=0, eos_ids=ends
        )
        prompts = np.ones((2, 3), np.int32)
        texts = generate({}, prompts, prompts, jax.random.key(0))
        jax.block_until_ready(texts)
        jax.effects_barrier()
        counts[ends] = decoder.calls
    assert counts == {(5,): 1, (6,): 20}


def filter_with_numpy(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens stay: sort, cut, walk down until the mass is reached."""
    kept = np.zeros(len(logits), bool)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = order[: top_k or len(logits)]
    weights = np.exp(logits[order].astype(np.float64) - logits.max())
    mass = 0.0
    for index, weight in zip(order, weights / weights.sum(), strict=True):
        if mass >= top_p:
            break
        kept[index] = True
        mass += weight
    return kept


@given(
    st.lists(st.integers(-300, 300), min_size=16, max_size=16, unique=True),
    st.sampled_from([0, 1, 2, 7, 16, 30]),
    st.sampled_from([1e-6, 0.1, 0.3, 0.55, 0.9, 0.999, 1.0]),
)
def test_top_k_and_top_p_keep_what_numpy_keeps(values, top_k, top_p):
    logits = np.array(values, np.float32) / 50
    found = np.asarray(
        filter_logits(jnp.asarray(logits)[None], top_k=top_k, top_p=top_p)
    )
    kept = filter_with_numpy(logits, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(found[0]), kept)
    np.testing.assert_array_equal(found[0][kept], logits[kept])


def test_rows_are_filtered_apart():
    probabilities = np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.03, 0.02]])
    found = filter_logits(jnp.log(probabilities), top_p=0.75)
    np.testing.assert_array_equal(
        np.isfinite(found), [[True, True, False, False], [False, True, False, False]]
    )


class FixedDecoder:
    """The same logits after every token."""

    def __init__(self, logits) -> None:
        self.logits = jnp.asarray(logits)

    def init_cache(self, batch, max_len):
        return ()

    def decode(self, params, tokens, positions, cache, segment_ids):
        return jnp.broadcast_to(self.logits, (len(tokens), len(self.logits))), cache


def test_samples_follow_temperature_and_the_filters():
    probabilities = np.array([0.4, 0.3, 0.2, 0.1])
    decoder = FixedDecoder(np.log(probabilities))
    generate = make_generate(decoder, max_new_tokens=50, temperature=0.5, top_k=3)
    prompts = np.ones((200, 1), np.int32)
    texts = np.asarray(generate({}, prompts, prompts, jax.random.key(3)))
    expected = np.append(probabilities[:3] ** 2, 0)
    expected /= expected.sum()
    found = np.bincount(texts.ravel(), minlength=4) / texts.size
    assert found[3] == 0
    # 10000 draws: a deviation of 0.02 is more than four standard errors.
    np.testing.assert_allclose(found, expected, atol=0.02)
    # Neither steps nor rows repeat each other.
    assert (
        len(np.unique(texts, axis=0)) == 200 and len(np.unique(texts.T, axis=0)) == 50
    )


def test_top_k_of_one_is_greedy_and_equal_keys_give_equal_texts():
    decoder, params = tiny_model()
    tokens, mask = pad(PROMPTS, "left", 7)
    one = make_generate(decoder, max_new_tokens=6, top_k=1)
    np.testing.assert_array_equal(
        one(params, tokens, mask, jax.random.key(1)), greedy_without_cache(PROMPTS, 6)
    )
    sample = make_generate(decoder, max_new_tokens=6, temperature=3.0)
    first, again, other = (
        np.asarray(sample(params, tokens, mask, jax.random.key(seed)))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: use at least 1"),
        ({"temperature": -1.0}, r"temperature=-1\.0: use 0"),
        ({"top_k": -1}, "top_k=-1: use 0"),
        ({"top_p": 0.0}, r"top_p=0\.0: use above 0"),
        ({"top_p": 1.5}, r"top_p=1\.5: use above 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        make_generate(CountingDecoder(), **({"max_new_tokens": 1} | setting))


class NumberTokenizer:
    """Texts are numbers; 0 is the end token."""

    bos_token_id, eos_token_id = 1, 0

    def __call__(self, text, add_special_tokens=True):
        ids = [int(word) for word in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens and ids else ids}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert add_generation_prompt and not tokenize
        return " ".join(m["content"] for m in messages) + " 40"

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(str(i) for i in ids)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"rag": "{{ messages }}"}, r"called default: .*=FILE\|rag, or continue"),
        ("{{ messages }", r"is Jinja \(line 1: unexpected '}'\): .*=FILE, or"),
        (None, r"has no chat template: give one by --data\.chat_template=FILE, or"),
    ],
)
def test_a_chat_needs_a_template_that_can_be_used(template, message):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
        chat_template=template,
    )
    model = types.SimpleNamespace(tokenizer=tokenizer, directory="here")
    with pytest.raises(ValueError, match=message):
        require_template(model)
    for good in ("{{ messages }}", "{{ raise_exception('no') }}"):
        tokenizer.chat_template = good
        require_template(model)


def test_texts_come_in_the_order_of_their_prompts_whatever_the_batches():
    decoder, params = tiny_model()
    prompts = [
        "5 9 20",
        [{"role": "user", "content": "7 8"}],
        "",
        " ".join(str(3 + i % 9) for i in range(19)),
        "50 2",
    ]
    rows = [[1, 5, 9, 20], [7, 8, 40], [1], [1, *(3 + i % 9 for i in range(19))]]
    rows.append([1, 50, 2])
    generate = make_generate(decoder, max_new_tokens=5, temperature=0)
    expected = [
        " ".join(map(str, row)) for row in greedy_without_cache(rows, 5).tolist()
    ]
    for batch_size in (2, 8):
        found = generate_texts(
            generate,
            params,
            NumberTokenizer(),
            prompts,
            key=jax.random.key(0),
            batch_size=batch_size,
        )
        assert found == expected


def test_a_sampled_text_depends_on_its_index_and_not_on_its_batch():
    decoder, params = tiny_model()
    generate = make_generate(decoder, max_new_tokens=5, temperature=2.0)
    prompts = ["5 9 20", "5 9 20", "8", "30 31", "5 9 20"]
    small, large = (
        generate_texts(
            generate,
            params,
            NumberTokenizer(),
            prompts,
            key=jax.random.key(4),
            batch_size=size,
        )
        for size in (2, 8)
    )
    assert small == large
    assert len({small[0], small[1], small[4]}) > 1


def test_texts_end_before_the_end_token():
    decoder, params = tiny_model()
    (free,) = greedy_without_cache([[9, 20]], 5).tolist()
    end = free[2]
    generate = make_generate(
        decoder, max_new_tokens=5, temperature=0, eos_ids=(end,), pad_id=33
    )
    (found,) = generate_texts(
        generate,
        params,
        NumberTokenizer(),
        ["9 20"],
        key=jax.random.key(0),
    )
    assert found == " ".join(map(str, free[: free.index(end)]))


def test_no_prompts_give_no_texts():
    generate = make_generate(CountingDecoder(), max_new_tokens=2)
    assert (
        generate_texts(generate, {}, NumberTokenizer(), [], key=jax.random.key(0)) == []
    )


def test_an_empty_prompt_without_a_first_token_is_refused():
    tokenizer = NumberTokenizer()
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    generate = make_generate(CountingDecoder(), max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate_texts(generate, {}, tokenizer, ["3", ""], key=jax.random.key(0))


def test_a_token_that_the_model_does_not_know_is_refused_by_name():
    """Its embedding is NaN, so that the answer was empty, without a word."""
    tokenizer = NumberTokenizer()
    tokenizer.convert_ids_to_tokens = lambda token: f"<{token}>"
    for prompt in ("3 9", [3, 9]):
        with pytest.raises(ValueError, match=r"prompt 1 holds '<9>', token 9, for whi"):
            encode_prompt(tokenizer, prompt, 1, 9)
        assert encode_prompt(tokenizer, prompt, 1, 10)[-2:] == [3, 9]


def test_a_prompt_that_is_no_unicode_text_is_refused():
    generate = make_generate(CountingDecoder(), max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 1 is no Unicode text"):
        generate_texts(
            generate, {}, NumberTokenizer(), ["3", "\udce9"], key=jax.random.key(0)
        )


@pytest.mark.torch
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_equals_transformers_generate(tmp_path, side):
    torch = pytest.importorskip("torch")
    transformers = importlib.import_module("transformers")
    hf = importlib.import_module("jaxtrain.models.hf")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    peer = transformers.LlamaForCausalLM(config).eval()
    peer.save_pretrained(tmp_path)
    decoder = Decoder(hf.load_config(tmp_path), compute_dtype="float32")
    params = hf.load_params(tmp_path, decoder)

    left_tokens, left_mask = pad(PROMPTS, "left", 8)
    with torch.no_grad():
        expected = peer.generate(
            input_ids=torch.tensor(left_tokens, dtype=torch.long),
            attention_mask=torch.tensor(left_mask, dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=2,
            pad_token_id=0,
        )[:, 8:].numpy()
    generate = make_generate(
        decoder, max_new_tokens=12, temperature=0, eos_ids=(2,), pad_id=0
    )
    tokens, mask = pad(PROMPTS, side, 8)
    found = np.asarray(generate(params, tokens, mask, jax.random.key(0)))
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert len(np.unique(expected)) > 6
