"""Adapters of routers and experts against PEFT's target_parameters, live."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxtrain import sharding
from jaxtrain.config import RunConfig, diff, resolve
from jaxtrain.lora import (
    LoraConfig,
    init_adapters,
    load_adapter,
    make_shape,
    merge_into_base,
    parameters,
    save_adapter,
    trainable_and_frozen,
)
from jaxtrain.lora.conversion import converted
from jaxtrain.lora.targets import resolve_ranks
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.hf import load_config, load_params
from jaxtrain.models.quantization import Quantization, quantize_tree
from jaxtrain.optimizers.multipliers import make_multipliers
from jaxtrain.run import preflight
from jaxtrain.tree import overlay, select
from tests.equations import equations
from tests.moe_test import FAMILIES, SIZES
from tests.runs import tiny_config

RANK, LAYERS = 3, SIZES["num_hidden_layers"]
TOKENS = np.random.default_rng(2).integers(1, SIZES["vocab_size"], (2, 9))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ALL_SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("mixtral", {"target_modules": "all-linear", "use_rslora": True}),
    "all of gpt-oss": (
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": [*EXPERTS, "router.weight"],
            "rank_pattern": {"experts.gate_up_proj": 2, "router.weight": 1},
        },
    ),
}
MORE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "seven names": (
        "qwen3_moe",
        {"target_modules": ALL_SEVEN, "alpha_pattern": {"experts.down_proj": 7}},
    ),
    "one parameter": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    ),
    "the other": ("gpt_oss", {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "old names": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "a pattern": ("mixtral", {"target_modules": r".*\.(k_proj|w[123]|gate)"}),
    "all and one": (
        "qwen3_moe",
        {"target_modules": "all-linear", "target_parameters": ["mlp.gate.weight"]},
    ),
    "linear layers of gpt-oss": ("gpt_oss", {"target_modules": "all-linear"}),
    "sigmoids": ("glm4_moe", {"target_modules": "all-linear"}),
    "latent": ("deepseek_v2", {"target_modules": "all-linear"}),
    "gated": ("qwen3_next", {"target_modules": "all-linear"}),
}
# Whose routers are in float32, or that have dense layers or shared experts too.
_ROUTED = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
OPTIONS = FAMILIES | {
    "glm4_moe": _ROUTED | {"head_dim": 8, "norm_topk_prob": True},
    "deepseek_v2": _ROUTED
    | {
        "topk_method": "group_limited_greedy",
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def make_torch_model(family: str) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **SIZES | OPTIONS[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at 0.02 all logits are near 0
            parameter.normal_(0, 0.2)
    return model


def make_peft_model(model: Any, **options: Any) -> Any:
    """PEFT's model, its adapters moved off their initial values."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    settings = {"r": RANK, "lora_alpha": 5} | options
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return adapted


def torch_loss(model: Any) -> tuple[Any, np.ndarray]:
    """The summed loss of all next tokens, and the logits."""
    torch = pytest.importorskip("torch")
    tokens = torch.tensor(TOKENS)
    logits = model(tokens).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    return losses, logits.detach().numpy()


def our_loss(decoder: Decoder, params: Any) -> tuple[jax.Array, jax.Array]:
    tokens = jnp.asarray(TOKENS, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = decoder.logits(params, tokens, positions, jnp.ones_like(tokens))
    logps = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logps, tokens[:, 1:, None], -1).sum(), logits


def tensors_of(path: Any) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(path / "adapter_model.safetensors")


def assert_close(ours: Any, theirs: Any, name: str = "", error: float = 1e-5) -> None:
    atol = error * max(1.0, np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)


@pytest.mark.torch
@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(c, marks=pytest.mark.on_request) for c in MORE_CASES)],
)
def test_an_adapter_of_pefts_acts_and_learns_here_as_there(case, tmp_path):
    """Parameters and their ranks, logits, gradients, merging, and files both ways."""
    peft = pytest.importorskip("peft")
    family, options = (CASES | MORE_CASES)[case]
    model = make_torch_model(family)
    model.save_pretrained(tmp_path / "base")
    adapted = make_peft_model(model, **options)
    adapted.save_pretrained(tmp_path / "theirs")
    loss, expected = torch_loss(adapted)
    loss.backward()

    base = Decoder(
        load_config(tmp_path / "base"), compute_dtype="float32", remat="full"
    )
    frozen = load_params(tmp_path / "base", base)
    trainable, lora = load_adapter(tmp_path / "theirs", frozen)
    asked = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    fresh = converted(LoraConfig(r=RANK, alpha=5, **asked), family, LAYERS)
    assert resolve_ranks(fresh, frozen) == resolve_ranks(lora, frozen)

    decoder = dataclasses.replace(base, lora=make_shape(lora, frozen))
    step = jax.jit(
        jax.value_and_grad(
            lambda tree: our_loss(decoder, overlay(frozen, tree)), has_aux=True
        )
    )
    (_, logits), gradients = step(trainable)
    assert_close(logits, expected)
    save_adapter(tmp_path / "slopes", gradients, lora, None, tied_embeddings=False)
    slopes = tensors_of(tmp_path / "slopes")
    theirs = {n.replace(".default", ""): p for n, p in adapted.named_parameters()}
    theirs = {name: theirs[name].grad.numpy() for name in slopes}
    for name, slope in theirs.items():
        assert np.abs(slope).max() > 1e-3, name
        assert_close(slopes[name], slope, name)

    # Merged, it is a plain model.
    merged = merge_into_base(frozen, trainable, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(frozen)
    assert_close(our_loss(base, merged)[1], expected)

    # The same files, which PEFT reads.
    save_adapter(tmp_path / "ours", trainable, lora, "b", tied_embeddings=False)
    ours, same = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == same.keys()
    for name in same:
        np.testing.assert_array_equal(ours[name], same[name], err_msg=name)
    reloaded = peft.PeftModel.from_pretrained(
        make_torch_model(family), tmp_path / "ours"
    )
    assert_close(torch_loss(reloaded.eval())[1], expected)
    again, lora_again = load_adapter(tmp_path / "ours", frozen)
    assert resolve_ranks(lora_again, frozen) == resolve_ranks(lora, frozen)
    jax.tree.map(np.testing.assert_array_equal, again, trainable)


# --- without torch ----------------------------------------------------------------

ALL = ("mlp.gate.weight", *EXPERTS)


def make_mixture(family: str = "mixtral", **sizes: Any) -> tuple[Decoder, Any]:
    """A decoder, and weights so large that all of them matter."""
    given = {"model_type": family, **SIZES, **FAMILIES[family], **sizes}
    decoder = Decoder(ModelConfig.from_hf(given), compute_dtype="float32")
    params = decoder.init(jax.random.key(0))
    return decoder, jax.tree.map(lambda x: 3 * x if (x != 1).any() else x, params)


def add_adapters(decoder: Decoder, params: Any) -> tuple[Decoder, Any]:
    """The decoder with adapters on all of a mixture, and their values."""
    names = [p.name for p in parameters.iterate_parameters(params)]
    lora = LoraConfig(r=RANK, target_parameters=tuple(names))
    adapters = init_adapters(jax.random.key(1), params, lora)
    draw = np.random.default_rng(0).standard_normal
    moved = jax.tree.map(lambda x: x + 0.1 * draw(x.shape, np.float32), adapters)
    return dataclasses.replace(decoder, lora=make_shape(lora, params)), moved


@functools.partial(jax.jit, static_argnums=0)
def loss_and_slopes(decoder: Decoder, adapters: Any, frozen: Any) -> Any:
    return jax.value_and_grad(lambda tree: our_loss(decoder, overlay(frozen, tree))[0])(
        adapters
    )


@pytest.mark.parametrize(
    ("kind", "largest_error", "on_mesh"), [("nf4", 0.1, True), ("int8", 0.01, False)]
)
def test_experts_in_few_bits_act_as_what_they_stand_for(kind, largest_error, on_mesh):
    """Loss and gradients of adapters, to those of the dequantized experts."""
    pytest.importorskip("qwix")
    # 48 inputs are three blocks, which two devices cannot share.
    few = Quantization(kind, block_size=16)
    decoder, params = make_mixture()
    kept = quantize_tree(jax.tree.map(jnp.copy, params), decoder.linear_kernels(), few)
    names = ("gate_proj", "up_proj", "down_proj")
    experts = kept["layers"]["mlp"]["experts"]
    assert set(experts) == {
        f"{n}_{part}" for n in names for part in ("codes", "scales")
    }
    assert set(kept["layers"]["mlp"]["gate"]) == {"weight"}
    # Merging nothing gives the whole matrices that the codes stand for.
    whole = merge_into_base(kept, {}, LoraConfig())
    for name in names:
        exact = params["layers"]["mlp"]["experts"][name]
        error = np.std(whole["layers"]["mlp"]["experts"][name] - exact) / np.std(exact)
        assert 1e-3 < error < largest_error, name

    decoder = dataclasses.replace(decoder, quantization=few)
    decoder, adapters = add_adapters(decoder, params)
    expected = loss_and_slopes(decoder, adapters, whole)
    found = [loss_and_slopes(decoder, adapters, kept)]
    if on_mesh:
        sizes = {"data": 2, "fsdp": 2, "tensor": 2}
        plan = sharding.ShardingPlan(sharding.make_mesh(sizes))
        decoder = dataclasses.replace(
            decoder, constrain=plan.constrain, map_shards=plan.map_shards, remat="full"
        )
        axes = decoder.logical_axes()
        placed = [
            jax.device_put(tree, plan.parameters(tree, select(axes, tree)))
            for tree in (adapters, kept)
        ]
        of_experts = placed[0]["layers"]["mlp"]["experts"]["adapters"]["down_proj"]
        specs = [of_experts[name].sharding.spec for name in ("lora_a", "lora_b")]
        assert tuple(specs[0])[1:3] == ("fsdp", "tensor")
        assert tuple(specs[1])[1] == "fsdp"
        found.append(loss_and_slopes(decoder, *placed))
    for loss, slopes in found:
        np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
        # Eight devices add up parts of sums, so a few more bits are rounded off.
        close = functools.partial(assert_close, error=3e-5)
        jax.tree.map(close, slopes, expected[1])


def test_of_quantized_experts_only_codes_are_kept_for_the_backward_pass():
    """Without rematerialization of layers; whole matrices are made layer by layer."""
    pytest.importorskip("qwix")
    layers, lora = 6, LoraConfig(r=2, target_parameters=ALL)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 16}
    decoder, _ = make_mixture(num_hidden_layers=layers, **sizes)
    few = Quantization("nf4", block_size=64)
    decoder = dataclasses.replace(decoder, quantization=few, remat="none")
    frozen = decoder.abstract_params()
    experts = jax.tree.leaves(frozen["layers"]["mlp"]["experts"])
    matrices = layers * 16 * 64 * 64
    assert sum(x.size * x.dtype.itemsize for x in experts) == 3 * matrices * 4.5 / 8
    decoder = dataclasses.replace(decoder, lora=make_shape(lora, frozen))

    def kept(frozen: Any) -> Any:
        adapters = init_adapters(jax.random.key(0), frozen, lora)
        return jax.vjp(
            lambda tree: our_loss(decoder, overlay(frozen, tree))[0], adapters
        )[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(kept, frozen))]
    assert (layers, 16, 32, 64) in shapes  # codes, two to a byte
    assert max(map(math.prod, shapes)) < matrices


def test_no_expert_has_a_matrix_of_its_own_adapters_in_the_program():
    """W + A B would be an array [E in out]; the program has only products of rows."""
    decoder, params = make_mixture(num_experts_per_tok=1)
    decoder, adapters = add_adapters(decoder, params)
    traced = jax.make_jaxpr(lambda tree: our_loss(decoder, overlay(params, tree))[0])(
        adapters
    )
    shapes = {(4, 32, 48), (4, 48, 32), (4, 32, 96)}
    made = [
        (equation.primitive.name, tuple(out.aval.shape))
        for equation in equations(traced)
        for out in equation.outvars
        if tuple(out.aval.shape) in shapes
    ]
    assert {name for name, _ in made} <= CARRIED, made


CARRIED = {"convert_element_type", "slice", "split", "pjit", "jit", "squeeze"}


def test_factors_are_stored_as_pefts_product_reads_them(tmp_path):
    """delta[e, out, in] = sum_r B[out, r, e] A[e, r, in] (ParamWrapper)."""
    decoder, params = make_mixture("gpt_oss")
    _, adapters = add_adapters(decoder, params)
    lora = LoraConfig(r=RANK, target_parameters=("mlp.router.weight", *EXPERTS))
    save_adapter(tmp_path, adapters, lora, None, tied_embeddings=False)
    tensors = tensors_of(tmp_path)
    prefix = "base_model.model.model.layers.1.mlp"
    assert {name for name in tensors if name.startswith(prefix)} == {
        f"{prefix}.{wrapper}.lora_{factor}.weight"
        for wrapper in ("router", "experts", "experts.base_layer")
        for factor in "AB"
    }
    ours = adapters["layers"]["mlp"]["experts"]["adapters"]
    for name, wrapper in (
        ("gate_up_proj", "experts.base_layer"),
        ("down_proj", "experts"),
    ):
        a, b = (tensors[f"{prefix}.{wrapper}.lora_{x}.weight"] for x in "AB")
        a, b = a.reshape(4, RANK, -1), b.reshape(len(b), RANK, 4)
        delta = np.einsum("ore,eri->eio", b, a)
        own = ours[name]["lora_a"][1] @ ours[name]["lora_b"][1]
        np.testing.assert_allclose(delta, own, rtol=1e-4, atol=1e-5)
    again, settings = load_adapter(tmp_path, params)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert set(settings.target_parameters or ()) == set(lora.target_parameters or ())
    # Gate's and up's columns take turns in gpt-oss, and are halves elsewhere.
    for in_turns in (True, False):
        place = ("layers", "mlp", "experts", "adapters", "gate_up_proj")
        both = jnp.arange(8.0).reshape(1, 1, 1, 8)
        found = parameters.Parameter(place, ("model.x.gate_up_proj",), (), in_turns)
        leaves = {(*place, "lora_a"): both, (*place, "lora_b"): both}
        path = ("layers", "mlp", "experts", "up_proj")
        _, up, _ = parameters.share_of(path, leaves, {place: found})
        assert up.ravel().tolist() == ([1, 3, 5, 7] if in_turns else [4, 5, 6, 7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, r"lora_dropout = 0.1.*set it to 0"),
        ({"use_dora": True}, "use_dora = True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"target_parameters": ("w1",)}, r"'w1' names no parameter.*down_proj"),
        ({"target_parameters": ("q_proj.weight",)}, "Linear layers go by target_mod"),
        ({"target_parameters": ("weight",)}, "'weight' names no parameter"),
        ({"target_parameters": ("layers.0.mlp.gate.weight",)}, "in some layers only"),
        ({"modules_to_save": ("mlp.gate",)}, "both select"),
        ({"rank_pattern": {"up_proj": 3}}, "'up_proj' matches no module"),
    ],
)
def test_what_peft_cannot_is_refused_with_its_fix(options, message):
    _, params = make_mixture()
    lora = LoraConfig(**{"target_parameters": ALL} | options)
    with pytest.raises(ValueError, match=message):
        resolve_ranks(lora, params)
        trainable_and_frozen(params, {}, lora)


def test_names_of_experts_mean_them_only_where_peft_converts_them():
    seven = LoraConfig(target_modules=tuple(ALL_SEVEN))
    assert converted(seven, "gpt_oss", 2) == converted(seven, "llama", 2) == seven
    found = converted(seven, "qwen3_moe", 2)
    assert found.target_modules == tuple(ATTENTION)
    assert found.target_parameters == ("gate_up_proj", "down_proj")
    none = dataclasses.replace(seven, target_parameters=())
    assert converted(none, "qwen3_moe", 2) == none
    saved = LoraConfig(modules_to_save=("gate",))
    assert "gate.weight" not in (converted(saved, "mixtral", 2).target_parameters or ())
    with pytest.raises(ValueError, match="gate_proj without up_proj"):
        converted(LoraConfig(target_modules=("gate_proj",)), "qwen3_moe", 2)


def test_optimizers_name_an_experts_adapter_by_its_path():
    decoder, params = make_mixture()
    _, adapters = add_adapters(decoder, params)
    patterns = [["layers/1/mlp/experts/adapters/down_proj/lora_.", 0], [".*", 2]]
    rates = make_multipliers(patterns, adapters)
    experts = rates["layers"]["mlp"]["experts"]["adapters"]
    assert experts["down_proj"]["lora_b"].ravel().tolist() == [2, 0]
    assert experts["gate_up_proj"]["lora_b"].ravel().tolist() == [2, 2]


# --- runs -------------------------------------------------------------------------


def test_an_old_run_goes_on_with_the_adapters_that_it_has(tmp_path, monkeypatch):
    """It had none on experts by all-linear, and kept these whole under QLoRA."""
    config = tiny_config("lora", lora__quantization="nf4")
    run = resolve(config, device_count=1)
    saved = run.to_dict()
    assert RunConfig.from_dict(saved) == run
    for key in ("target_parameters", "quantize_experts"):
        assert saved["training"]["lora"].pop(key) is None
    old = RunConfig.from_dict(saved)
    assert (old.lora.target_parameters, old.lora.quantize_experts) == ((), False)

    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    monkeypatch.setattr(preflight, "_saved_config", lambda _: saved)
    assert preflight.keep_recorded(config, tmp_path)
    resumed = resolve(config, device_count=1)
    assert resumed == old
    assert not diff(saved, resumed)
    # What is set now counts.
    config.training.lora.target_parameters = ("mlp.experts.down_proj",)
    preflight.keep_recorded(config, tmp_path)
    kept = resolve(config, device_count=1).lora
    assert kept.target_parameters == ("mlp.experts.down_proj",)
