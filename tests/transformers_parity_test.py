"""SFT's loss and gradients against live transformers, through our own train step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.models.hf import load_config, load_params
from jaxtrain.models.hf_names import leaves_of
from jaxtrain.models.transformer import Decoder
from jaxtrain.objectives import make_objective
from jaxtrain.step import make_train_step
from jaxtrain.tree import flatten
from jaxtrain.types import Batch, TrainState

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LENGTHS = (13, 24, 7, 18)  # of the rows; prompts are the first third
T = 24


# Layers that are not alike: a pattern that repeats, and a rest.
OWN_SIZES = {
    "lfm2": {
        "num_hidden_layers": 5,
        "layer_types": ["conv", "full_attention"] * 2 + ["conv"],
        "conv_bias": True,
        "pad_token_id": None,  # transformers trains no embedding of that
    },
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "pad_token_id": None,
    },
    "gemma4_text": {
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "head_dim": 16,
        "global_head_dim": 24,
        "sliding_window": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "pad_token_id": None,
    },
}


# Qwen3.5's gradients are compared in models/delta_net_test.py too.
ASKED = ("qwen3_5_text",)
CASES = [
    pytest.param(name, marks=[pytest.mark.on_request] * (name in ASKED))
    for name in ("llama", "qwen2", *OWN_SIZES)
]


@pytest.fixture(scope="module", params=CASES)
def models(request, tmp_path_factory):
    torch.manual_seed(0)
    sizes = SIZES | OWN_SIZES.get(request.param, {})
    config = transformers.AutoConfig.for_model(request.param, **sizes)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in theirs.parameters():  # at 0.02 all logits are near 0
            parameter.normal_(0, 0.2)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    ours = Decoder(load_config(directory), compute_dtype="float32")
    return theirs, ours, load_params(directory, ours)


def rows():
    """Four right-padded rows; labels are -100 on prompts and padding."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((len(LENGTHS), T), np.int64)
    labels = np.full((len(LENGTHS), T), -100, np.int64)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = rng.integers(0, 128, length)
        labels[row, length // 3 : length] = tokens[row, length // 3 : length]
    return tokens, labels


def to_batch(tokens, labels, accumulation):
    """Our arrays [A, B, T] from Hugging Face's: targets are the next position's."""
    real = np.arange(T)[None] < np.asarray(LENGTHS)[:, None]

    def shift(x, fill):
        return np.concatenate([x[:, 1:], np.full_like(x[:, :1], fill)], axis=1)

    counted = shift(labels, -100) != -100
    fields = {
        "tokens": tokens.astype(np.int32),
        "targets": shift(tokens, 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape) * real,
        "loss_mask": counted.astype(np.float32),
    }
    return Batch(**{k: v.reshape(accumulation, -1, T) for k, v in fields.items()})


JOINED = {"scan_layers": False, "joins_products": True}


@pytest.mark.parametrize(
    ("accumulation", "options"), [(1, {}), (2, {"remat": "full"}), (1, JOINED)]
)
def test_sft_loss_and_gradients_equal_transformers(models, accumulation, options):
    theirs, ours, params = models
    if ours.config.model_type in OWN_SIZES and accumulation == 1:
        pytest.skip("the other case shows it, and these take long to compile")
    tokens, labels = rows()
    theirs.zero_grad()
    attention_mask = (np.arange(T)[None] < np.asarray(LENGTHS)[:, None]).astype(int)
    loss = theirs(
        torch.tensor(tokens),
        attention_mask=torch.tensor(attention_mask),
        labels=torch.tensor(labels),
    ).loss
    loss.backward()

    # One step of plain gradient descent at rate 1: the difference is the gradient.
    decoder = Decoder(ours.config, compute_dtype="float32", **options)
    optimizer = optax.sgd(1.0)
    train_step = jax.jit(
        make_train_step(
            make_objective("next_token"),
            decoder.token_log_probs,
            optimizer,
            lambda _: 1.0,
        )
    )
    state = TrainState(
        step=jnp.int32(0),
        trainable=params,
        frozen={},
        opt_state=optimizer.init(params),
        rng=jax.random.key(0),
    )
    new_state, metrics = train_step(state, to_batch(tokens, labels, accumulation))

    np.testing.assert_allclose(metrics["loss"].mean(), loss.item(), rtol=2e-6)
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1e9).item()
    np.testing.assert_allclose(metrics["grad_norm"].mean(), norm, rtol=1e-5)
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    before, after = flatten(params), flatten(new_state.trainable)
    checked = set()
    for leaf in leaves_of(ours.config):
        gradient = np.asarray(before[leaf.path] - after[leaf.path])
        if leaf.path[-1] == "buffer":  # what never trains
            assert not gradient.any()
            continue
        for place in leaf.places:
            part = gradient[place]
            part = part.T if leaf.transposed else part
            name = leaf.tensor_name(place)
            # The subtraction rounds to weights' float32 spacing: 1.2e-7 near 1.
            np.testing.assert_allclose(
                part, expected[name], rtol=1e-4, atol=3e-6, err_msg=name
            )
            checked.add(name)
    assert checked == set(expected)
