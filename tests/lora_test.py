"""LoRA against PEFT, live: targets, initial values, what trains, logits, files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
from jaxtrain.models.transformer import Decoder
from jaxtrain.tree import overlay

LAYERS, WIDTH, INNER, VOCAB, RANK = 2, 32, 48, 128, 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_tree(dtype=jnp.float32, *, tied=False):
    """The tree of a tiny Qwen 2: biases on q, k and v."""
    draw = np.random.default_rng(0).standard_normal

    def leaf(*shape):
        return jnp.asarray(draw(shape), dtype)

    def linear(width_in, width_out, bias=False):
        parts = {"kernel": leaf(LAYERS, width_in, width_out)}
        return parts | ({"bias": leaf(LAYERS, width_out)} if bias else {})

    return {
        "embed_tokens": {"embedding": leaf(VOCAB, WIDTH)},
        "layers": {
            "input_layernorm": {"scale": leaf(LAYERS, WIDTH)},
            "post_attention_layernorm": {"scale": leaf(LAYERS, WIDTH)},
            "self_attn": {
                "q_proj": linear(WIDTH, WIDTH, bias=True),
                "k_proj": linear(WIDTH, WIDTH // 2, bias=True),
                "v_proj": linear(WIDTH, WIDTH // 2, bias=True),
                "o_proj": linear(WIDTH, WIDTH),
            },
            "mlp": {
                "gate_proj": linear(WIDTH, INNER),
                "up_proj": linear(WIDTH, INNER),
                "down_proj": linear(INNER, WIDTH),
            },
        },
        "norm": {"scale": leaf(WIDTH)},
    } | ({} if tied else {"lm_head": {"kernel": leaf(WIDTH, VOCAB)}})


def leaf_names(tree):
    return {
        ".".join(key.key for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


# --- torch and PEFT, live ----------------------------------------------------------


# What some families need beside sizes.
FAMILY_OPTIONS = {
    "granitemoehybrid": {
        "layer_types": ["attention"] * LAYERS,
        "mamba_n_heads": 4,  # unused, but transformers checks it against the width
        "num_local_experts": 0,
        "shared_intermediate_size": 24,
    },
}


def make_torch_model(family="qwen2", *, tied=False):
    """A tiny random torch model, in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        **FAMILY_OPTIONS.get(family, {}),
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    config = transformers.AutoConfig.for_model(family, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tree_of(model):
    """Our tree of a torch model's weights."""
    tied = model.config.tie_word_embeddings
    tree, stacks = {}, {}
    for name, tensor in model.state_dict().items():
        *path, leaf = name.removeprefix("model.").split(".")
        value = tensor.numpy()
        if leaf == "weight":
            leaf = {1: "scale", 2: "kernel"}[value.ndim]
            leaf = "embedding" if path == ["embed_tokens"] else leaf
        if leaf == "kernel":
            value = value.T
        if path[0] == "layers":
            key = ("layers", *path[2:], leaf)
            stacks.setdefault(key, []).append(value)
        elif not (tied and path == ["lm_head"]):
            stacks[(*path, leaf)] = value
    for path, value in stacks.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(np.array(value))
    return tree


def make_peft_model(model, **options):
    """PEFT's model with LoRA, everything that trains moved off its initial value."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": RANK} | options)
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


TOKENS = np.random.default_rng(2).integers(1, VOCAB, (2, 9)).astype(np.int32)


def torch_logits(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def our_logits(config, params, lora=None):
    """Logits of our decoder, with the adapters of `params` if `lora` is given."""
    shape = lora and make_shape(lora, params)
    decoder = Decoder(
        ModelConfig.from_hf(config.to_dict()), compute_dtype="float32", lora=shape
    )
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    return np.asarray(
        jax.jit(decoder.logits)(params, TOKENS, positions, jnp.ones_like(TOKENS))
    )


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5)


# --- targets -----------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {"target_modules": ["q_proj", "v_proj"]}),
        ("qwen2", {"target_modules": ["self_attn.o_proj", "down_proj"]}),
        ("qwen2", {"target_modules": r".*\.(q_proj|up_proj)"}),
        ("qwen2", {"target_modules": r"model\.layers\.\d+\.self_attn\.[kv]_proj"}),
        ("qwen2", {"target_modules": "all-linear"}),
        ("qwen2", {"target_modules": r".*_proj", "modules_to_save": ["mlp"]}),
        ("qwen2", {"target_modules": "all-linear", "modules_to_save": ["o_proj"]}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("phi3", {"target_modules": "all-linear"}),
        ("gemma3_text", {"target_modules": "all-linear"}),
    ],
)
def test_targets_are_those_that_peft_adapts(family, options):
    peft = pytest.importorskip("peft")
    model = make_torch_model(family)
    tree = tree_of(model)

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, **options))

    expected = {
        name.split(".", 3)[3] for name in adapted.base_model.targeted_module_names
    }
    assert resolve_targets(LoraConfig(r=RANK, **options), tree) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "qkv_proj"), "'qkv_proj' matches no module.*self_attn.q_proj"),
        (r".*\.c_attn", "matches no module of this model"),
        (("proj",), "'proj' matches no module"),  # whole names between dots only
        (("layers.0.self_attn.q_proj",), r"in layers \[0\] of 2 only.*every layer"),
        (r".*\.1\.mlp\.up_proj", r"in layers \[1\] of 2 only"),
        (r".*self_attn.*", "selects self_attn, which is neither a linear layer"),
        (("input_layernorm",), "input_layernorm, which is neither a linear layer"),
        (r"*_proj", "is not a regular expression"),
        ((), "target_modules is empty"),
    ],
)
def test_wrong_targets_are_refused_with_their_fix(targets, message):
    with pytest.raises(ValueError, match=message):
        resolve_targets(LoraConfig(target_modules=targets), make_tree())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "lora.r = 0"),
        ({"dropout": 1.0}, "lora_dropout = 1.0"),
        ({"bias": "some"}, "lora.bias = 'some'.*lora_only"),
    ],
)
def test_wrong_settings_are_refused_with_their_fix(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


# --- initial values ----------------------------------------------------------------


def test_a_starts_uniform_within_its_bound_and_b_at_zero():
    tree = {"layers": {"mlp": {"up_proj": {"kernel": jnp.zeros((3, 400, 60))}}}}
    lora = LoraConfig(r=50)

    adapter = init_adapters(jax.random.key(0), tree, lora)["layers"]["mlp"]["up_proj"]

    a, b = np.asarray(adapter["lora_a"]), np.asarray(adapter["lora_b"])
    assert (a.shape, b.shape) == ((3, 400, 50), (3, 50, 60))
    assert a.dtype == b.dtype == np.float32
    bound = 1 / np.sqrt(400)
    assert 0.999 * bound < np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    assert abs(a.mean()) < 0.01 * bound
    assert not b.any()
    assert np.abs(np.corrcoef(a.reshape(3, -1)) - np.eye(3)).max() < 0.05


@pytest.mark.torch
def test_a_starts_as_widely_spread_as_in_peft():
    peft = pytest.importorskip("peft")
    lora = LoraConfig(r=16, target_modules=("down_proj",))
    model = make_torch_model()
    tree = tree_of(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=16, target_modules=["down_proj"])
    )
    theirs = [p.detach() for n, p in adapted.named_parameters() if "lora_A" in n]
    expected = np.quantile(np.stack(theirs), [0, 0.25, 0.5, 0.75, 1])

    adapters = init_adapters(jax.random.key(0), tree, lora)

    actual = np.quantile(
        adapters["layers"]["mlp"]["down_proj"]["lora_a"], [0, 0.25, 0.5, 0.75, 1]
    )
    np.testing.assert_allclose(actual, expected, atol=0.1 / np.sqrt(INNER))


def test_a_modules_draw_does_not_depend_on_the_other_targets():
    key, tree = jax.random.key(3), make_tree()
    one = init_adapters(key, tree, LoraConfig(target_modules=("q_proj",)))
    many = init_adapters(key, tree, LoraConfig(target_modules=("q_proj", "k_proj")))

    attention = many["layers"]["self_attn"]
    np.testing.assert_array_equal(
        one["layers"]["self_attn"]["q_proj"]["lora_a"], attention["q_proj"]["lora_a"]
    )
    assert not np.array_equal(
        attention["q_proj"]["lora_a"][:, :8], attention["k_proj"]["lora_a"][:, :8]
    )


def test_shapes_of_adapters_need_no_arrays():
    abstract = jax.eval_shape(make_tree)
    lora = LoraConfig(r=RANK, bias="all", modules_to_save=("lm_head",))

    def start(base):
        adapters = init_adapters(jax.random.key(0), base, lora)
        return trainable_and_frozen(base, adapters, lora)

    trainable, frozen = jax.eval_shape(start, abstract)

    assert trainable["lm_head"]["kernel"].dtype == jnp.float32
    assert jax.tree.structure(frozen) == jax.tree.structure(abstract)


def test_gaussian_starts_normal_with_the_deviation_of_one_over_the_rank():
    tree = {"layers": {"mlp": {"up_proj": {"kernel": jnp.zeros((3, 400, 60))}}}}
    lora = LoraConfig(r=50, init_lora_weights="gaussian")

    adapter = init_adapters(jax.random.key(0), tree, lora)["layers"]["mlp"]["up_proj"]

    a = np.asarray(adapter["lora_a"])
    assert a.std() == pytest.approx(1 / 50, rel=0.02)
    assert np.mean(np.abs(a) < 1 / 50) == pytest.approx(0.6827, abs=0.01)
    assert not np.asarray(adapter["lora_b"]).any()


def test_pissa_takes_the_largest_singular_values_of_a_diagonal_kernel():
    """W = diag(5, 3, 1): rank 2 at scaling 2 is A B = diag(5, 3, 0) / 2."""
    tree = {
        "layers": {"mlp": {"up_proj": {"kernel": jnp.diag(jnp.array([1.0, 3, 5]))}}}
    }
    tree = jax.tree.map(lambda x: x[None], tree)
    lora = LoraConfig(r=2, alpha=4, init_lora_weights="pissa")

    adapters = init_adapters(jax.random.key(0), tree, lora)
    _, frozen = trainable_and_frozen(tree, adapters, lora)

    adapter = adapters["layers"]["mlp"]["up_proj"]
    product = adapter["lora_a"][0] @ adapter["lora_b"][0]
    np.testing.assert_allclose(product, np.diag([0, 1.5, 2.5]), atol=1e-6)
    residual = frozen["layers"]["mlp"]["up_proj"]["kernel"][0]
    np.testing.assert_allclose(residual, np.diag([1.0, 0, 0]), atol=1e-6)
    # Each factor has an equal share.
    np.testing.assert_allclose(
        np.linalg.norm(adapter["lora_a"]), np.linalg.norm(adapter["lora_b"]), rtol=1e-6
    )


@pytest.mark.torch
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_of_the_base_start_and_cross_as_in_peft(init, use_dora, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = make_torch_model()
    config, tree, base_logits = base.config, tree_of(base), torch_logits(base)
    lora = LoraConfig(
        r=RANK,
        alpha=6,
        target_modules=("q_proj", "up_proj"),
        init_lora_weights=init,
        use_dora=use_dora,
        rank_pattern={"up_proj": 6},
    )
    adapters = init_adapters(jax.random.key(0), tree, lora)
    trainable, frozen = trainable_and_frozen(tree, adapters, lora)

    # The start is the base, in other parts: those of PEFT.
    assert_close(our_logits(config, overlay(frozen, trainable), lora), base_logits)
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=RANK,
            lora_alpha=6,
            target_modules=["q_proj", "up_proj"],
            init_lora_weights=init,
            use_dora=use_dora,
            rank_pattern={"up_proj": 6},
        ),
    ).eval()
    state = theirs.state_dict()
    for module, name in (("self_attn", "q_proj"), ("mlp", "up_proj")):
        adapter = adapters["layers"][module][name]
        for layer in range(LAYERS):
            key = f"base_model.model.model.layers.{layer}.{module}.{name}."
            a, b = (state[f"{key}lora_{x}.default.weight"].numpy() for x in "AB")
            ours = adapter["lora_a"][layer] @ adapter["lora_b"][layer]
            assert_close(ours, (b @ a).T)
            residual = frozen["layers"][module][name]["kernel"][layer]
            assert_close(residual, state[f"{key}base_layer.weight"].numpy().T)

    # Moved off, it is saved for the base as it was, and merges to the same.
    draw = np.random.default_rng(3).standard_normal
    moved = jax.tree.map(
        lambda x: x + 0.1 * jnp.asarray(draw(x.shape), x.dtype), trainable
    )
    expected = our_logits(config, overlay(frozen, moved), lora)
    assert np.abs(expected - base_logits).max() > 0.05
    assert_close(our_logits(config, merge_into_base(frozen, moved, lora)), expected)
    save_adapter(
        tmp_path / "ours", moved, lora, None, tied_embeddings=False, initial=adapters
    )
    reloaded = peft.PeftModel.from_pretrained(make_torch_model(), tmp_path / "ours")
    assert_close(torch_logits(reloaded.eval()), expected)
    again, lora_again = load_adapter(tmp_path / "ours", tree)
    assert_close(our_logits(config, overlay(tree, again), lora_again), expected)

    # PEFT's, converted as its documentation says, is a plain adapter of the base.
    if use_dora:
        return  # PEFT converts no pattern and no magnitude
    theirs = peft.get_peft_model(
        make_torch_model(),
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=RANK,
            target_modules=["q_proj"],
            init_lora_weights=init,
        ),
    ).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(
        tmp_path / "theirs",
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    loaded, plain = load_adapter(tmp_path / "theirs", tree)
    assert plain.r == 2 * RANK
    assert_close(our_logits(config, overlay(tree, loaded), plain), torch_logits(theirs))


def test_adapters_that_are_no_numbers_are_refused(tmp_path):
    tree = make_tree()
    lora = LoraConfig(r=RANK, target_modules=("q_proj",))
    adapters = init_adapters(jax.random.key(0), tree, lora)
    trainable, _ = trainable_and_frozen(tree, adapters, lora)
    bad = jax.tree.map(lambda x: x.at[(-1,) * x.ndim].set(jnp.inf), trainable)
    save_adapter(tmp_path, bad, lora, None, tied_embeddings=False)
    with pytest.raises(ValueError, match=r"NaN or infinity is in .*q_proj\.lora_"):
        load_adapter(tmp_path, tree)


def test_a_factored_adapter_is_not_saved_without_its_start(tmp_path):
    tree = make_tree()
    lora = LoraConfig(r=2, target_modules=("q_proj",), init_lora_weights="pissa")
    adapters = init_adapters(jax.random.key(0), tree, lora)
    with pytest.raises(ValueError, match="pass the first adapters"):
        save_adapter(tmp_path, adapters, lora, None, tied_embeddings=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, "without layer numbers"),
        ({"alpha_pattern": {"layers.1.mlp.up_proj": 2}}, "without layer numbers"),
        ({"rank_pattern": {"lm_head": 2}}, "'lm_head' matches no module"),
        ({"rank_pattern": {"q_proj": 0}}, "at least 1"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ({"r": 40, "init_lora_weights": "pissa"}, "a rank of at most 32"),
        ({"init_lora_weights": "loftq"}, "choose from default"),
    ],
)
def test_wrong_variants_are_refused_with_their_fix(options, message):
    tree = make_tree()
    with pytest.raises(ValueError, match=message):
        init_adapters(jax.random.key(0), tree, LoraConfig(**options))


# --- what trains -------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize(
    "options",
    [
        {"bias": "none"},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": ["norm"]},  # also the layers' norms: their names end so
        {"modules_to_save": ["k_proj"], "bias": "lora_only"},
    ],
)
def test_what_trains_is_what_peft_trains(options):
    peft = pytest.importorskip("peft")
    model = make_torch_model()
    tree = tree_of(model)
    lora = LoraConfig(r=RANK, target_modules=("q_proj", "o_proj"), **options)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, target_modules=["q_proj", "o_proj"], **options)
    )
    expected = set()
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        for old, new in [
            ("base_model.model.", ""),
            ("model.", ""),
            (".modules_to_save.default", ""),
            (".base_layer", ""),
            (".lora_A.default.weight", ".lora_a"),
            (".lora_B.default.weight", ".lora_b"),
            (".0.", "."),
            (".1.", "."),
            ("embed_tokens.weight", "embed_tokens.embedding"),
            ("norm.weight", "norm.scale"),
            (".weight", ".kernel"),
        ]:
            name = name.replace(old, new)
        expected.add(name)

    adapters = init_adapters(jax.random.key(0), tree, lora)
    trainable, frozen = trainable_and_frozen(tree, adapters, lora)

    assert leaf_names(trainable) == expected
    assert frozen is tree


def test_trained_copies_are_float32_and_share_no_memory_with_the_base():
    for dtype in (jnp.float32, jnp.bfloat16):
        tree = make_tree(dtype)
        lora = LoraConfig(r=RANK, bias="all", modules_to_save=("lm_head",))
        trainable, frozen = trainable_and_frozen(
            tree, init_adapters(jax.random.key(0), tree, lora), lora
        )

        assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {
            np.dtype("float32")
        }
        assert frozen["lm_head"]["kernel"].dtype == dtype
        # Donating what trains must leave the base alive.
        donate = jax.jit(lambda t: jax.tree.map(jnp.add, t, t), donate_argnums=0)
        donate(trainable)
        jax.block_until_ready(jax.tree.map(lambda x: x + 0, frozen))


@pytest.mark.parametrize(
    ("modules_to_save", "message"),
    [
        (("lm_head",), "lm_head.*tie_word_embeddings.*name embed_tokens"),
        (("classifier",), "'classifier' matches no module.*embed_tokens"),
        (("0.mlp.up_proj",), r"in layers \[0\] of 2 only"),
        (("proj",), "modules_to_save and target_modules both select"),
    ],
)
def test_wrong_modules_to_save_are_refused_with_their_fix(modules_to_save, message):
    lora = LoraConfig(target_modules=("q_proj",), modules_to_save=modules_to_save)
    with pytest.raises(ValueError, match=message):
        trainable_and_frozen(make_tree(tied=True), {}, lora)


# --- merging -----------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merging_adds_the_scaled_product(use_rslora):
    tree = make_tree()
    lora = LoraConfig(
        r=RANK, alpha=6, target_modules=("q_proj",), use_rslora=use_rslora
    )
    draw = np.random.default_rng(5).standard_normal
    a = draw((LAYERS, WIDTH, RANK)).astype(np.float32)
    b = draw((LAYERS, RANK, WIDTH)).astype(np.float32)
    bias = np.ones((LAYERS, WIDTH), np.float32)
    trainable = {
        "layers": {"self_attn": {"q_proj": {"lora_a": a, "lora_b": b, "bias": bias}}}
    }

    merged = merge_into_base(tree, trainable, lora)

    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    scale = 6 / 2.0 if use_rslora else 6 / 4
    w = np.asarray(tree["layers"]["self_attn"]["q_proj"]["kernel"], np.float64)
    expected = [w[i] + scale * a[i].astype(np.float64) @ b[i] for i in range(LAYERS)]
    q_proj = merged["layers"]["self_attn"]["q_proj"]
    np.testing.assert_allclose(q_proj["kernel"], expected, atol=1e-5)
    np.testing.assert_array_equal(q_proj["bias"], bias)
    np.testing.assert_array_equal(
        merged["lm_head"]["kernel"], tree["lm_head"]["kernel"]
    )


def test_merging_rounds_once_to_the_type_of_the_base():
    tree = make_tree(jnp.bfloat16)
    lora = LoraConfig(r=RANK, alpha=1, target_modules=("o_proj",))
    adapters = jax.tree.map(
        lambda x: x + 0.37, init_adapters(jax.random.key(0), tree, lora)
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    merged = merge_into_base(tree, adapters, lora)

    expected = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), merge_into_base(wide, adapters, lora)
    )
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    assert merged["layers"]["self_attn"]["o_proj"]["kernel"].dtype == jnp.bfloat16


def test_weights_that_come_with_adapters_train_in_place_of_copies_of_the_base():
    tree = make_tree()
    lora = LoraConfig(r=RANK, target_modules=("q_proj",), modules_to_save=("lm_head",))
    adapters = init_adapters(jax.random.key(0), tree, lora)
    trained = np.full_like(tree["lm_head"]["kernel"], 7.0)

    trainable, frozen = trainable_and_frozen(
        tree, adapters | {"lm_head": {"kernel": trained}}, lora
    )

    np.testing.assert_array_equal(trainable["lm_head"]["kernel"], trained)
    assert frozen is tree


def test_a_base_in_host_memory_trains_and_merges_as_one_on_the_device():
    tree = make_tree()
    lora = LoraConfig(r=RANK, target_modules=("q_proj",), modules_to_save=("lm_head",))
    adapters = jax.tree.map(
        lambda x: x + 0.1, init_adapters(jax.random.key(0), tree, lora)
    )
    host = jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), tree
    )

    trainable, frozen = trainable_and_frozen(host, adapters, lora)
    merged = merge_into_base(frozen, trainable, lora)

    expected = merge_into_base(tree, adapters, lora)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves((trainable, merged))}
    assert kinds == {"device"}


# --- end to end with PEFT ----------------------------------------------------------

ADAPTERS = {
    "plain": ("qwen2", False, {"target_modules": list(ATTENTION), "lora_alpha": 7}),
    "rslora": (
        "llama",
        False,
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    ),
    "bias all": ("qwen2", False, {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": (
        "qwen2",
        True,
        {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    ),
    "modules_to_save": (
        "qwen2",
        False,
        {
            "target_modules": ["v_proj", "up_proj"],
            "modules_to_save": ["lm_head", "embed_tokens", "norm"],
        },
    ),
    "tied embeddings": (
        "qwen2",
        True,
        {
            "target_modules": ["v_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "a saved module with bias": (
        "qwen2",
        False,
        {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"], "bias": "all"},
    ),
    "dora": ("qwen2", False, {"target_modules": "all-linear", "use_dora": True}),
    "patterns": (
        "llama",
        False,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 7, "self_attn.[qk]_proj": 2},
            "alpha_pattern": {"mlp.*": 3, "v_proj": 1},
        },
    ),
    "dora with patterns and rslora": (
        "qwen2",
        False,
        {
            "target_modules": ["q_proj", "up_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"up_proj": 9},
            "alpha_pattern": {"up_proj": 2},
            "bias": "all",
        },
    ),
    "fused modules": ("phi3", False, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "scaled logits": (
        "cohere2",
        False,
        {"target_modules": ["q_proj", "down_proj", "lm_head"]},
    ),
}
ALL_LINEAR = {
    family: (family, False, {"target_modules": "all-linear"})
    for family in (
        "gemma", "glm4", "granite", "granitemoehybrid", "ministral3", "olmo2", "olmo3",
        "seed_oss", "smollm3",
    )
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize(
    "case",
    [
        *ADAPTERS,
        *(pytest.param(name, marks=pytest.mark.on_request) for name in ALL_LINEAR),
    ],
)
def test_an_adapter_crosses_between_peft_and_us_without_changing_logits(case, tmp_path):
    peft = pytest.importorskip("peft")
    family, tied, options = (ADAPTERS | ALL_LINEAR)[case]
    base = make_torch_model(family, tied=tied)
    config, tree = base.config, tree_of(base)
    base_logits = torch_logits(base)
    theirs = make_peft_model(base, **options)
    expected = torch_logits(theirs)
    assert np.abs(expected - base_logits).max() > 0.05  # the adapter does something
    theirs.save_pretrained(tmp_path / "theirs")

    # Theirs, loaded by us.
    trainable, lora = load_adapter(tmp_path / "theirs", tree)
    params = overlay(tree, trainable)
    assert_close(our_logits(config, params, lora), expected)

    # The base alone is still the base: DPO's reference.
    assert_close(our_logits(config, tree, lora), base_logits)

    # Merged, it is a plain model.
    merged = merge_into_base(tree, trainable, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    assert_close(our_logits(config, merged), expected)

    # Ours, loaded by PEFT, and by us again.
    save_adapter(tmp_path / "ours", trainable, lora, "some/base", tied_embeddings=tied)
    fresh = make_torch_model(family, tied=tied)
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    assert_close(torch_logits(reloaded), expected)
    again, lora_again = load_adapter(tmp_path / "ours", tree)
    assert lora_again == lora
    assert jax.tree.structure(again) == jax.tree.structure(trainable)
    jax.tree.map(np.testing.assert_array_equal, again, trainable)


@pytest.mark.torch
def test_our_files_hold_the_same_tensors_as_pefts(tmp_path):
    tied_options = ADAPTERS["tied embeddings"][2]
    for tied, options in [
        (False, {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
        (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
        (True, tied_options),
    ]:
        model = make_torch_model(tied=tied)
        tree = tree_of(model)
        make_peft_model(model, **options).save_pretrained(tmp_path / "theirs")
        trainable, lora = load_adapter(tmp_path / "theirs", tree)
        save_adapter(tmp_path / "ours", trainable, lora, None, tied_embeddings=tied)

        theirs, ours = (
            safetensors.numpy.load_file(tmp_path / name / "adapter_model.safetensors")
            for name in ("theirs", "ours")
        )

        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.torch
def test_fresh_adapters_leave_the_logits_as_they_were():
    model = make_torch_model()
    tree = tree_of(model)
    lora = LoraConfig(r=RANK, dropout=0.5)
    adapters = init_adapters(jax.random.key(0), tree, lora)

    actual = our_logits(model.config, overlay(tree, adapters), lora)

    np.testing.assert_array_equal(actual, our_logits(model.config, tree))


# --- files, without torch ----------------------------------------------------------


def save_example(path, **options):
    """Save an adapter with distinct numbers; return tree, trainable and config."""
    tree = make_tree()
    lora = LoraConfig(**{"r": RANK, "target_modules": ("q_proj",)} | options)
    trainable, _ = trainable_and_frozen(
        tree, init_adapters(jax.random.key(0), tree, lora), lora
    )
    numbers = np.random.default_rng(9)
    trainable = jax.tree.map(
        lambda x: numbers.standard_normal(x.shape).astype(np.float32), trainable
    )
    save_adapter(path, trainable, lora, "base", tied_embeddings=False)
    return tree, trainable, lora


def test_an_adapter_survives_our_own_files(tmp_path):
    options = {
        "bias": "all",
        "modules_to_save": ("lm_head",),
        "dropout": 0.1,
        "target_modules": ("k_proj", "q_proj"),
        # The first match counts: their order must survive too.
        "rank_pattern": {"q_proj": 5, "[qk]_proj": 2},
    }
    tree, trainable, lora = save_example(tmp_path, **options)

    loaded, loaded_lora = load_adapter(tmp_path, jax.eval_shape(lambda: tree))

    assert loaded_lora == lora
    jax.tree.map(np.testing.assert_array_equal, loaded, trainable)


def test_pefts_names_and_shapes_are_written(tmp_path):
    _, trainable, _ = save_example(tmp_path)

    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")

    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    a = trainable["layers"]["self_attn"]["q_proj"]["lora_a"]
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_A.weight"], a[1].T)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (WIDTH, RANK)
    assert len(tensors) == 2 * LAYERS
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == ["q_proj"]
    assert config["base_model_name_or_path"] == "base"


def test_a_sharded_adapter_is_saved_whole(tmp_path):
    tree, trainable, lora = save_example(tmp_path / "whole")
    mesh = Mesh(np.asarray(jax.devices()).reshape(8), ("fsdp",))

    def shard(x):
        axis = next(i for i, size in enumerate(x.shape) if size % 8 == 0)
        spec = PartitionSpec(*[None] * axis, "fsdp")
        return jax.device_put(x, NamedSharding(mesh, spec))

    sharded = jax.tree.map(shard, trainable)
    save_adapter(tmp_path / "sharded", sharded, lora, None, tied_embeddings=False)

    loaded, _ = load_adapter(tmp_path / "sharded", tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, trainable)
    merged = merge_into_base(tree, sharded, lora)
    expected = merge_into_base(tree, trainable, lora)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, expected
    )


def test_a_bfloat16_adapter_is_read_as_float32(tmp_path):
    tree, trainable, _ = save_example(tmp_path)
    rewrite_tensors(
        tmp_path, lambda t: {k: v.astype(jnp.bfloat16) for k, v in t.items()}
    )

    loaded, _ = load_adapter(tmp_path, tree)

    expected = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(np.float32), trainable
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def rewrite_tensors(path, change):
    file = path / "adapter_model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)


def rewrite_config(path, **entries):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    "entries",
    [
        {"layers_to_transform": [0]},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"trainable_token_indices": [3]},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
        {"a_variant_of_tomorrow": True},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_an_unsupported_variant_is_refused_by_name(entries, tmp_path):
    tree, _, _ = save_example(tmp_path)
    rewrite_config(tmp_path, **entries)

    with pytest.raises(ValueError, match=f"{next(iter(entries))}.*not supported"):
        load_adapter(tmp_path, tree)


def test_prompts_that_were_learned_cannot_be_merged(tmp_path):
    tree, _, _ = save_example(tmp_path)
    rewrite_config(tmp_path, peft_type="PREFIX_TUNING")
    with pytest.raises(ValueError, match="only LORA: train an adapter of LORA anew"):
        load_adapter(tmp_path, tree)


Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "layers.1" not in k},
            r"lora_a is given for layers \[0\] of 2 only",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "lora_B" not in k},
            "it must hold both",
        ),
        (
            lambda t: t | {f"{Q_PROJ}.lora_A.weight": np.zeros((RANK, 5), np.float32)},
            r"lora_a has shape \(5, 4\), the base calls for \(32, 4\)",
        ),
        (
            lambda t: {k: v[..., :1] if "lora_A" in k else v for k, v in t.items()},
            r"lora_a has shape \(1, 4\), the base calls for \(32, 4\)",
        ),
        (
            lambda t: t | {f"{Q_PROJ}.lora_magnitude_vector": np.ones(3, np.float32)},
            "use_dora = False, but it holds magnitudes",
        ),
        (
            lambda t: (
                t
                | {
                    "base_model.model.lm_head.lora_A.weight": np.zeros((RANK, WIDTH)),
                    "base_model.model.lm_head.lora_B.weight": np.zeros((VOCAB, 3)),
                }
            ),
            r"lm_head.lora_b has shape \(3, 128\), the base calls for \(4, 128\)",
        ),
        (
            lambda t: {k.replace("q_proj", "c_attn"): v for k, v in t.items()},
            "c_attn.*has no place in this model",
        ),
        (
            lambda t: (
                t
                | {
                    "base_model.model.lm_head.weight": np.zeros(
                        (VOCAB, WIDTH), np.float32
                    )
                }
            ),
            "its lm_head .* is not that of this base.*or name lm_head in its",
        ),
    ],
)
def test_weights_that_do_not_fit_the_base_are_refused(change, message, tmp_path):
    tree, _, _ = save_example(tmp_path)
    rewrite_tensors(tmp_path, change)

    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, tree)


def test_embeddings_untied_by_peft_are_refused(tmp_path):
    save_example(tmp_path, modules_to_save=("embed_tokens",))

    with pytest.raises(ValueError, match="ensure_weight_tying=True"):
        load_adapter(tmp_path, make_tree(tied=True))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        load_adapter(tmp_path, make_tree())
    with pytest.raises(ValueError, match="/gone: there is no such directory"):
        load_adapter(tmp_path / "gone", make_tree())
    save_example(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"has no adapter_config\.json: give .*/adapter$"
    ):
        load_adapter(tmp_path, make_tree())
