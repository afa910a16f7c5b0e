"""Loading: slices onto a mesh, stored types, and files that are refused."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxtrain.models import Decoder
from jaxtrain.models import hf as hf_module
from jaxtrain.models.hf import (
    load_config,
    load_params,
    match_weights,
    resolve_model_path,
    save_pretrained,
)
from jaxtrain.models.quantization import Quantization
from jaxtrain.sharding import ShardingPlan, make_mesh
from jaxtrain.types import Params


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    """A Qwen3 model in four shards, and what was saved."""
    model, params = make_model("qwen3")
    directory = tmp_path_factory.mktemp("qwen3")
    save_pretrained(directory, model.config, params, max_shard_bytes=100_000)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory, model, params


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def edit_index(directory: pathlib.Path, **files: str) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= files
    file.write_text(json.dumps(index))


def assert_equal_trees(ours, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_shards_are_read_back_bit_by_bit(saved) -> None:
    directory, model, params = saved
    assert load_config(directory) == model.config
    assert_equal_trees(load_params(directory, model), params)


def test_every_device_reads_only_its_slice(saved, monkeypatch) -> None:
    directory, model, params = saved
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=axis_types)
    names = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}

    def shard(leaf, axes):
        spec = PartitionSpec(*(names.get(axis) for axis in axes))
        return NamedSharding(mesh, spec)

    shardings = jax.tree.map(shard, params, model.logical_axes())
    read: list[int] = []
    read_slice = hf_module._read_slice

    def counting(leaf, tensors, bounds, dtype):
        part = read_slice(leaf, tensors, bounds, dtype)
        if leaf.path == ("layers", "mlp", "up_proj", "kernel"):
            read.append(part.size)
        return part

    monkeypatch.setattr(hf_module, "_read_slice", counting)
    loaded = load_params(directory, model, shardings)
    assert_equal_trees(loaded, params)
    kernel = loaded["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding == shardings["layers"]["mlp"]["up_proj"]["kernel"]
    assert read == [kernel.size // 8] * 8  # each part once, nothing twice


def test_replicas_share_one_read_of_the_file(saved, monkeypatch) -> None:
    directory, model, params = saved
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=axis_types)
    halves = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda x: halves if x.ndim > 1 else whole, params)
    reads = []
    read_slice = hf_module._read_slice
    monkeypatch.setattr(
        hf_module, "_read_slice", lambda *args: reads.append(0) or read_slice(*args)
    )
    assert_equal_trees(load_params(directory, model, shardings), params)
    assert len(reads) == sum(1 + (x.ndim > 1) for x in jax.tree.leaves(params))


def test_stored_types_are_kept_unless_another_is_asked_for(saved, tmp_path) -> None:
    _, model, params = saved
    save_pretrained(tmp_path, model.config, params, dtype="bfloat16")
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for dtype in (None, "keep"):
        kept = load_params(tmp_path, model, dtype=dtype)
        assert {x.dtype.name for x in jax.tree.leaves(kept)} == {"bfloat16"}
        assert_equal_trees(kept, stored)
    wide = load_params(tmp_path, model, dtype="float32")
    assert {x.dtype.name for x in jax.tree.leaves(wide)} == {"float32"}
    assert_equal_trees(wide, jax.tree.map(lambda x: x.astype(jnp.float32), stored))


def test_tensors_that_do_not_fit_are_all_named_in_one_error(copy, saved) -> None:
    shard = next(
        file
        for file in copy.glob("*.safetensors")
        if "model.layers.0.mlp.up_proj.weight" in load_file(file)
    )
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up.weight"] = tensors.pop(
        "model.layers.0.mlp.up_proj.weight"
    )
    name = next(name for name in tensors if name.endswith("layernorm.weight"))
    tensors[name] = np.zeros(3, np.float32)
    save_file(tensors, shard)
    with pytest.raises(ValueError) as caught:
        load_params(copy, saved[1])
    message = str(caught.value)
    assert "missing model.layers.0.mlp.up_proj.weight" in message
    assert "unexpected model.layers.0.mlp.up.weight" in message
    assert f"{name} has shape (3,), expected (64,)" in message


def test_integer_weights_are_refused(copy, saved) -> None:
    shard = min(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].astype(np.int8)}, shard)
    with pytest.raises(ValueError, match=f"{name} has type I8, expected a float type"):
        load_params(copy, saved[1])


def in_host_memory(model: Decoder) -> Params:
    """Where each leaf goes if parameters are offloaded."""
    plan = ShardingPlan(make_mesh({}, jax.devices()[:1]), offload_params=True)
    return plan.parameters(model.abstract_params(), model.logical_axes())


@pytest.mark.parametrize(
    ("number", "kept"),
    [(np.nan, ""), (np.inf, ""), (-np.inf, ""), (np.nan, "nf4"), (np.inf, "int8"),
     (np.nan, "pinned_host")],
)  # fmt: skip
def test_weights_that_are_no_numbers_are_refused_by_name(
    copy, saved, number, kept
) -> None:
    """Also those that are quantized as they come, and those kept in host memory."""
    model, wanted = saved[1], None
    if kept == "pinned_host":
        wanted = in_host_memory(model)
    elif kept:
        model = dataclasses.replace(model, quantization=Quantization(kept, 32))
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in set(names) & set(tensors):
            tensors[name] = tensors[name].copy()
            tensors[name].flat[-1] = number
        save_file(tensors, shard)
    with pytest.raises(ValueError, match="NaN or infinity is in") as caught:
        load_params(copy, model, wanted)
    assert sorted(re.findall(r"model\.[\w.]+", str(caught.value))) == names


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_may_be_stored_or_not_and_an_untied_one_must(
    make_model, tmp_path, tied: bool
) -> None:
    model, params = make_model("qwen2_tied" if tied else "qwen2")
    save_pretrained(tmp_path, model.config, params)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert ("lm_head.weight" in tensors) != tied
    if tied:
        embedding = tensors["model.embed_tokens.weight"]
        save_file({**tensors, "lm_head.weight": embedding}, file)
        assert match_weights(tmp_path, model.config) == model.config
        assert_equal_trees(load_params(tmp_path, model), params)
    else:
        del tensors["lm_head.weight"]
        save_file(tensors, file)
        with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
            load_params(tmp_path, model)


def test_rotary_buffers_of_old_checkpoints_are_passed_over(
    make_model, tmp_path
) -> None:
    model, params = make_model("llama")
    save_pretrained(tmp_path, model.config, params)
    file = tmp_path / "model.safetensors"
    buffer = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    save_file({**load_file(file), **buffer}, file)
    assert_equal_trees(load_params(tmp_path, model), params)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b", ".."])
def test_an_index_may_not_name_files_elsewhere(copy, saved, name: str) -> None:
    edit_index(copy, **{"model.norm.weight": name})
    with pytest.raises(ValueError, match="shards must lie beside the index"):
        load_params(copy, saved[1])


def test_missing_shards_are_named(copy, saved) -> None:
    shard = min(copy.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks: {shard.name}; download"):
        load_params(copy, saved[1])


def test_pickles_are_refused_with_the_way_out(saved, tmp_path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"pickles \(pytorch_model.bin\).*safetensors"):
        load_params(tmp_path, saved[1])


def test_directories_without_weights_or_config_are_refused(saved, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        load_params(tmp_path, saved[1])
    with pytest.raises(ValueError, match=r"config.json is missing"):
        load_config(tmp_path)


def test_a_work_directory_is_not_a_model_but_holds_one(saved, tmp_path) -> None:
    shutil.copytree(saved[0], tmp_path / "model")
    with pytest.raises(ValueError, match=r"work directory of a run: .*/model$"):
        resolve_model_path(str(tmp_path))
    # A model may have a folder of that name.
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    assert resolve_model_path(str(tmp_path)) == tmp_path


def test_a_model_is_a_directory_or_a_name_that_the_hub_gives(
    tmp_path, monkeypatch
) -> None:
    import huggingface_hub

    assert resolve_model_path(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="is not a directory; check the spelling"):
        resolve_model_path("./absent")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model_path("Qwen/Qwen2.5-0.5B", revision="abc") == tmp_path
    assert (asked["name"], asked["revision"]) == ("Qwen/Qwen2.5-0.5B", "abc")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(".bin" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_name_offline_says_what_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"hf download Qwen/Absent.*directory"):
        resolve_model_path("Qwen/Absent")


def test_adapters_of_the_model_do_not_count_as_missing(saved) -> None:
    from jaxtrain.models import LoraShape

    directory, model, params = saved
    lora = LoraShape(r=2, scaling=1.0, targets=frozenset({"self_attn.q_proj"}))
    adapted = Decoder(model.config, lora=lora)
    shardings = jax.tree.map(
        lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[1]),
        adapted.abstract_params(),
    )
    loaded = load_params(directory, adapted, shardings)
    assert_equal_trees(loaded, params)
    assert loaded["norm"]["scale"].devices() == {jax.devices()[1]}
