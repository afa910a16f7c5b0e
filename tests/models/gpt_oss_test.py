"""What gpt-oss alone has: MXFP4 directories, and gradients of all that it adds."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtrain import sharding
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.lora import LoraConfig, resolve_targets
from jaxtrain.lora.targets import resolve_modules_to_save
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.hf import load_config, load_params, save_pretrained
from jaxtrain.models.hf_experts import join_fused
from jaxtrain.models.hf_names import leaves_of
from jaxtrain.models.rope import inverse_frequencies
from jaxtrain.tree import flatten
from jaxtrain.types import Batch

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
ROWS = ((17,), (9, 11), (14, 5), (6, 8, 7))  # the lengths of documents
T = 24


def make_batch() -> tuple[Batch, list[np.ndarray]]:
    """Packed rows, and their documents by themselves."""
    rng = np.random.default_rng(0)
    fields = {
        name: np.zeros((len(ROWS), T), np.int32)
        for name in ("tokens", "targets", "positions", "segment_ids", "loss_mask")
    }
    documents = []
    for row, lengths in enumerate(ROWS):
        start = 0
        for number, length in enumerate(lengths, start=1):
            document = rng.integers(3, 128, length)
            part = (row, slice(start, start + length))
            fields["tokens"][part] = document
            fields["targets"][part] = np.roll(document, -1)
            fields["positions"][part] = np.arange(length)
            fields["segment_ids"][part] = number
            fields["loss_mask"][part] = np.arange(length) < length - 1
            documents.append(document)
            start += length
    return Batch(**fields), documents


def on_mesh(model: Decoder) -> tuple[Decoder, Any]:
    """The decoder on eight devices, and how its weights lie there."""
    plan = sharding.ShardingPlan(sharding.make_mesh(MESH))
    layout = Layout(plan.mesh, ("data", "fsdp"), ("tensor",))
    model = dataclasses.replace(
        model, constrain=plan.constrain, map_shards=plan.map_shards, layout=layout
    )
    return model, plan.parameters(model.abstract_params(), model.logical_axes())


@pytest.mark.torch
@pytest.mark.parametrize("family", ["gpt_oss"], indirect=True)
def test_gradients_of_packed_rows_on_a_mesh_equal_transformers(torch_model) -> None:
    """Of every weight, sinks and biases too; three documents share a row."""
    torch = pytest.importorskip("torch")
    batch, documents = make_batch()
    theirs = torch_model.torch_model
    theirs.zero_grad()
    for document in documents:
        tokens = torch.tensor(document[None].tolist())
        logps = torch.log_softmax(theirs(tokens).logits[0, :-1], dim=-1)
        picked = logps.gather(1, tokens[0, 1:, None])
        (-picked.sum()).backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    model, layouts = on_mesh(torch_model.model)

    def loss(params: Any) -> Any:
        return -(model.token_log_probs(params, batch).logps * batch.loss_mask).sum()

    gradients = jax.jit(jax.grad(loss))(jax.device_put(torch_model.params, layouts))
    flat, parts = flatten(gradients), {}
    for leaf in leaves_of(model.config):
        for place in leaf.places:
            part = np.asarray(flat[leaf.path])[place]
            parts[leaf.tensor_name(place)] = part.T if leaf.transposed else part
    ours = join_fused(parts, joined=False)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert np.abs(expected[name]).max() > 1e-2, name
        # A sum of about 80 tokens' gradients: float32 in another order.
        bound = 1e-4 * max(1.0, np.abs(expected[name]).max())
        np.testing.assert_allclose(
            gradient, expected[name], rtol=0, atol=bound, err_msg=name
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": "all"}, r"lora.bias = 'all'.*set it to 'lora_only'"),
        ({"target_modules": ("gate_up_proj",)}, r"target_parameters.*mlp\.router"),
        ({"modules_to_save": ("mlp.gate",)}, "selects this model's router"),
        ({"modules_to_save": ("experts",)}, "selects the experts"),
    ],
)
def test_what_adapters_cannot_do_is_refused(make_model, options, words: str) -> None:
    _, params = make_model("gpt_oss")
    with pytest.raises(ValueError, match=words):
        resolve_targets(LoraConfig(**options), params)
        resolve_modules_to_save(LoraConfig(**options), params)


# --- MXFP4 ------------------------------------------------------------------------


@pytest.fixture
def packed(make_model, tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory whose experts are in MXFP4, as OpenAI publishes them."""
    model, params = make_model("gpt_oss")
    save_pretrained(tmp_path, model.config, params, dtype="bfloat16")
    file = tmp_path / "model.safetensors"
    rng = np.random.default_rng(1)
    tensors = {}
    for name, tensor in load_file(file).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = (experts, outputs, inputs // 32, 16)
        tensors[f"{name}_blocks"] = rng.integers(0, 256, blocks).astype(np.uint8)
        scales = rng.integers(118, 126, blocks[:3]).astype(np.uint8)
        tensors[f"{name}_scales"] = scales
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.torch
def test_mxfp4_experts_are_those_that_transformers_unpacks(packed, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    stored = load_file(packed / "model.safetensors")
    model = Decoder(load_config(packed))
    _, layouts = on_mesh(model)
    for shardings in (None, layouts):  # whole, and each device its own slices
        params = load_params(packed, model, shardings)
        save_pretrained(tmp_path / "export", model.config, params)
        exported = load_file(tmp_path / "export" / "model.safetensors")
        unpacked = 0
        for name, tensor in stored.items():
            if name.endswith("_scales"):
                continue
            whole = name.removesuffix("_blocks")
            if whole != name:
                scales = torch.tensor(stored[f"{whole}_scales"])
                both = (torch.tensor(tensor), scales)
                tensor = mxfp4.convert_moe_packed_tensors(*both).float().numpy()
                unpacked += 1
            assert exported[whole].dtype == jnp.bfloat16
            np.testing.assert_array_equal(exported[whole], tensor, err_msg=whole)
        assert unpacked == 2 * model.config.num_hidden_layers
    assert "quantization_config" not in json.loads(
        (tmp_path / "export" / "config.json").read_text()
    )


@pytest.mark.parametrize("harm", ["missing", "misshapen"])
def test_mxfp4_blocks_without_their_scales_are_refused(packed, harm: str) -> None:
    file = packed / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    scales = tensors.pop(name)
    if harm == "misshapen":
        tensors[name] = scales[:, :-1].copy()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"needs {name} of shape .* download"):
        load_params(packed, Decoder(load_config(packed)))


# --- sizes ------------------------------------------------------------------------


def test_the_published_model_has_twenty_billion_weights_and_four_of_32_experts() -> (
    None
):
    config = load_config(
        pathlib.Path(__file__).parents[2] / "configs" / "shapes" / "gpt-oss-20b"
    )
    assert config.num_params() == 20_914_757_184  # 20.91 billion on its card
    assert config.layer_types[:2] == ("sliding_attention", "full_attention")
    # The ramp between kept and slowed frequencies starts between two pairs.
    frequencies, scale = inverse_frequencies(config.rope, config.head_dim)
    whole = dataclasses.replace(config.rope, truncate=True)
    assert (inverse_frequencies(whole, 64)[0] != frequencies).any()
    np.testing.assert_allclose(scale, 0.1 * np.log(32) + 1)
    plain = ModelConfig.from_hf({"model_type": "gpt_oss"})
    assert (plain.rope, plain.num_hidden_layers) == (config.rope, 36)
