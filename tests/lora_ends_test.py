"""Adapters of the embedding and of the head against PEFT, live."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxtrain import model_manager
from jaxtrain.config import resolve
from jaxtrain.lora import (
    LoraConfig,
    init_adapters,
    load_adapter,
    make_shape,
    merge_into_base,
    resolve_targets,
    save_adapter,
    trainable_and_frozen,
)
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layers import LoraShape
from jaxtrain.models.transformer import Decoder
from jaxtrain.tree import overlay
from jaxtrain.types import Batch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from lora_test import (
    RANK,
    TOKENS,
    VOCAB,
    WIDTH,
    assert_close,
    make_peft_model,
    make_torch_model,
    make_tree,
    our_logits,
    torch_logits,
    tree_of,
)
from runs import tiny_config

BOTH = ["embed_tokens", "lm_head", "q_proj"]
# name: (family, tied, PEFT's options)
CASES = {
    "untied": (
        "llama",
        False,
        {
            "target_modules": BOTH,
            "use_rslora": True,
            "rank_pattern": {"embed_tokens": 6},
            "alpha_pattern": {"lm_head": 3},
        },
    ),
    "tied, DoRA": ("qwen2", True, {"target_modules": BOTH, "use_dora": True}),
    "one for both": (
        "qwen2",
        True,
        {"target_modules": BOTH, "ensure_weight_tying": True},
    ),
    "embedding alone, tied and scaled": (
        "gemma2",
        True,
        {"target_modules": ["embed_tokens"], "use_dora": True},
    ),
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_adapters_of_the_ends_cross_between_peft_and_us(case, tmp_path):
    peft = pytest.importorskip("peft")
    family, tied, options = CASES[case]
    base = make_torch_model(family, tied=tied)
    config, tree = base.config, tree_of(base)
    base_logits = torch_logits(base)
    theirs = make_peft_model(base, **options)
    expected = torch_logits(theirs)
    assert np.abs(expected - base_logits).max() > 0.05  # the adapter does something
    theirs.save_pretrained(tmp_path / "theirs")

    trainable, lora = load_adapter(tmp_path / "theirs", tree)
    params = overlay(tree, trainable)
    assert_close(our_logits(config, params, lora), expected)

    # Merged: PEFT's merge of tied weights would change the other end too.
    merged = merge_into_base(tree, trainable, lora)
    stays_tied = tied and options.get("ensure_weight_tying", False)
    assert ("lm_head" in merged) == (not stays_tied)
    config.tie_word_embeddings = stays_tied
    assert_close(our_logits(config, merged), expected)

    save_adapter(tmp_path / "ours", trainable, lora, None, tied_embeddings=tied)
    fresh = make_torch_model(family, tied=tied)
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    assert_close(torch_logits(reloaded), expected)
    again, lora_again = load_adapter(tmp_path / "ours", tree)
    assert lora_again == lora
    jax.tree.map(np.testing.assert_array_equal, again, trainable)
    # PEFT's file has copies of the base's matrices beside the adapters.
    files = [
        safetensors.numpy.load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("theirs", "ours")
    ]
    names = [{k for k in file if "base_layer.weight" not in k} for file in files]
    assert names[0] == names[1]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ["tied, DoRA", "one for both"])
def test_gradients_of_the_ends_are_those_of_peft(case, tmp_path):
    """The loss head's own backward pass, in slices, against autograd's.

    PEFT keeps an adapter for both ends as two parameters on one memory, each with a
    gradient (and an optimizer state) of its own. Ours is one parameter: their sum.
    """
    torch = pytest.importorskip("torch")
    family, tied, options = CASES[case]
    model = make_torch_model(family, tied=tied)
    config, tree = ModelConfig.from_hf(model.config.to_dict()), tree_of(model)
    theirs = make_peft_model(model, **options)
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    theirs(tokens, labels=tokens).loss.backward()
    theirs.save_pretrained(tmp_path)
    trainable, _ = load_adapter(tmp_path, tree)

    names = set(options) & {"use_dora", "use_rslora", "ensure_weight_tying"}
    lora = LoraConfig(
        r=RANK,
        alpha=8,
        target_modules=tuple(options["target_modules"]),
        rank_pattern=options.get("rank_pattern", {}),
        alpha_pattern=options.get("alpha_pattern", {}),
        **{name: True for name in names},
    )
    shape = make_shape(lora, tree)
    decoder = Decoder(config, compute_dtype="float32", lora=shape, loss_chunk=4)
    ones = np.ones_like(TOKENS)[:, :-1]
    batch = Batch(
        tokens=TOKENS[:, :-1],
        targets=TOKENS[:, 1:],
        segment_ids=ones,
        positions=np.broadcast_to(np.arange(ones.shape[1]), ones.shape),
        loss_mask=ones.astype(np.float32),
    )

    @jax.jit
    @jax.grad
    def gradient(trainable):
        params = overlay(tree, trainable)
        return -decoder.token_log_probs(params, batch).logps.mean()

    expected = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad and "layers." not in name:
            module, leaf = name.replace(".default", "").split(".lora_")
            key = module.rpartition(".")[2], leaf.removesuffix(".weight")
            expected[key] = parameter.grad.numpy()
    embedding, head = (
        {
            "lora_a": expected.pop((module, f"{kind}A")).T,
            "lora_b": expected.pop((module, f"{kind}B")).T,
        }
        for module, kind in (("embed_tokens", "embedding_"), ("lm_head", ""))
    )
    wanted = {"embed_tokens": embedding, "lm_head": head}
    if lora.use_dora:
        for module, leaves in wanted.items():
            leaves["lora_magnitude"] = expected.pop((module, "magnitude_vector"))
    if shape.ties_head:
        embedding["lora_a"] += head["lora_b"].T
        embedding["lora_b"] += head["lora_a"].T
        del wanted["lm_head"]
    assert not expected
    gradients = gradient(trainable)
    jax.tree.map(assert_close, {name: gradients[name] for name in wanted}, wanted)


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa"])
def test_an_embeddings_adapter_starts_at_zero_with_a_normal_b(init):
    """PEFT's `reset_lora_parameters`: whatever init_lora_weights says."""
    tree = make_tree()
    lora = LoraConfig(r=20, target_modules=tuple(BOTH), init_lora_weights=init)

    adapters = init_adapters(jax.random.key(0), tree, lora)

    below, head = adapters["embed_tokens"], adapters["lm_head"]
    assert below["lora_a"].shape == (VOCAB, 20) and not below["lora_a"].any()
    assert below["lora_b"].shape == (20, WIDTH)
    # 640 draws: the deviation of their deviation is 1 / sqrt(2 * 640) = 0.03.
    assert np.asarray(below["lora_b"]).std() == pytest.approx(1, abs=0.1)
    assert head["lora_a"].shape == (WIDTH, 20)
    _, frozen = trainable_and_frozen(tree, adapters, lora)
    params = merge_into_base(frozen, adapters, lora)
    jax.tree.map(assert_close, params, tree)


def test_the_decoders_own_adapters_are_shaped_like_the_first_ones():
    """What `logical_axes` and layouts go by, and what trains, are one tree."""
    tree = make_tree(tied=True)
    lora = LoraConfig(r=RANK, target_modules=("embed_tokens", "lm_head"), use_dora=True)
    first = jax.eval_shape(
        lambda tree: init_adapters(jax.random.key(0), tree, lora), tree
    )
    config = {
        "model_type": "qwen2",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    targets = frozenset({"embed_tokens", "lm_head"})
    shape = LoraShape(r=RANK, scaling=2.0, targets=targets, use_dora=True)
    decoder = Decoder(ModelConfig.from_hf(config), lora=shape)
    own, axes = decoder.abstract_params(), decoder.logical_axes()
    for module in targets:
        for name, leaf in first[module].items():
            assert own[module][name].shape == leaf.shape
            assert len(axes[module][name]) == leaf.ndim
    assert axes["lm_head"]["lora_b"] == ("lora_rank", "vocab")
    assert set(own["lm_head"]) == {"lora_a", "lora_b", "lora_magnitude"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "olora"}, "out of the embedding, which this head is"),
        ({"modules_to_save": ("embed_tokens",)}, "leave lm_head out"),
        (
            {"ensure_weight_tying": True, "alpha_pattern": {"embed_tokens": 3}},
            "tells them apart",
        ),
        ({"ensure_weight_tying": True, "use_dora": True}, "have no meaning there"),
    ],
)
def test_what_has_no_meaning_beside_tied_weights_is_refused(options, message):
    tree = make_tree(tied=True)
    lora = LoraConfig(r=RANK, target_modules=("lm_head", "q_proj"), **options)
    with pytest.raises(ValueError, match=message):
        adapters = init_adapters(jax.random.key(0), tree, lora)
        trainable_and_frozen(tree, adapters, lora)


def test_all_linear_leaves_the_ends_out_as_peft_does():
    tree = make_tree()
    assert resolve_targets(LoraConfig(), tree).isdisjoint({"embed_tokens", "lm_head"})


def test_dora_with_dropout_on_the_head_is_refused():
    shape = LoraShape(
        r=2, scaling=1.0, dropout=0.1, targets=frozenset({"lm_head"}), use_dora=True
    )
    config = ModelConfig.from_hf({"model_type": "llama", "hidden_size": 64})
    with pytest.raises(ValueError, match="all logits twice"):
        Decoder(config, lora=shape)


def test_an_adapter_of_a_resized_embedding_is_refused(tmp_path):
    tree = make_tree()
    lora = LoraConfig(r=RANK, target_modules=("embed_tokens",))
    adapters = init_adapters(jax.random.key(0), tree, lora)
    save_adapter(tmp_path, adapters, lora, None, tied_embeddings=False)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    for table in (jnp.zeros((VOCAB, WIDTH)), jnp.zeros((VOCAB + 8, WIDTH))):
        safetensors.numpy.save_file(tensors | {name: np.asarray(table)}, file)
        with pytest.raises(ValueError, match="is not that of this base"):
            load_adapter(tmp_path, tree)


@pytest.mark.parametrize("tied", [False, True])
def test_the_bases_own_embeddings_in_an_adapter_are_left_out(tied, tmp_path):
    """As PEFT writes them by save_embedding_layers, and by itself after a resize."""
    tree = make_tree(tied=tied)
    lora = LoraConfig(r=RANK, target_modules=("q_proj",))
    adapters = init_adapters(jax.random.key(0), tree, lora)
    save_adapter(tmp_path, adapters, lora, None, tied_embeddings=tied)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    table = np.asarray(tree["embed_tokens"]["embedding"])
    head = table if tied else np.asarray(tree["lm_head"]["kernel"]).T
    names = [
        f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")
    ]
    safetensors.numpy.save_file(
        tensors | dict(zip(names, (table, np.ascontiguousarray(head)), strict=True)),
        file,
    )
    loaded, _ = load_adapter(tmp_path, tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    for name in names:
        safetensors.numpy.save_file(tensors | {name: np.zeros_like(table)}, file)
        with pytest.raises(ValueError, match="is not that of this base"):
            load_adapter(tmp_path, tree)


def test_tying_that_ties_nothing_is_refused():
    config = tiny_config("lora", lora__ensure_weight_tying=True)
    with pytest.raises(ValueError, match="gives no adapter to an embedding"):
        model_manager.ModelManager(resolve(config, device_count=1)).load_model()
