"""Adapters of routers and experts against PEFT's target_parameters, live."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxtrain.lora import (
    LoraConfig,
    load_adapter,
    make_shape,
    merge_into_base,
    save_adapter,
)
from jaxtrain.lora.conversion import converted
from jaxtrain.lora.targets import resolve_ranks
from jaxtrain.models import Decoder
from jaxtrain.models.hf import load_config, load_params
from jaxtrain.tree import overlay
from tests.moe_test import FAMILIES, SIZES

RANK, LAYERS = 3, SIZES["num_hidden_layers"]
TOKENS = np.random.default_rng(2).integers(1, SIZES["vocab_size"], (2, 9))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ALL_SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("mixtral", {"target_modules": "all-linear", "use_rslora": True}),
    "seven names": (
        "qwen3_moe",
        {"target_modules": ALL_SEVEN, "alpha_pattern": {"experts.down_proj": 7}},
    ),
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
}


def make_torch_model(family: str) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family])
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


def assert_close(ours: Any, theirs: Any, name: str = "") -> None:
    scale = max(1.0, np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale, err_msg=name)


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
