"""Export: transformers loads it as the same model."""

import copy
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtrain.models.hf import load_params, save_pretrained


@pytest.mark.torch
def test_an_exported_model_is_the_same_model_in_transformers(
    torch_model, tmp_path
) -> None:
    import torch
    import transformers

    config = torch_model.model.config
    save_pretrained(tmp_path, config, torch_model.params, max_shard_bytes=200_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    theirs, ours = torch_model.torch_model.state_dict(), loaded.state_dict()
    assert theirs.keys() == ours.keys()
    for name, weight in theirs.items():
        assert torch.equal(weight, ours[name]), name
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]])
    with torch.no_grad():
        expected = torch_model.torch_model(tokens).logits
        # Copied, because products of what is mapped from a file, which need not lie at
        # a multiple of its size, may add up in another order.
        assert torch.equal(copy.deepcopy(loaded)(tokens).logits, expected)
    assert loaded.generation_config.eos_token_id == config.eos_token_id
    again = load_params(tmp_path, torch_model.model)
    jax.tree.map(np.testing.assert_array_equal, again, torch_model.params)


def test_shards_hold_no_more_than_asked_and_list_every_tensor_once(
    make_model, tmp_path
) -> None:
    model, params = make_model("gemma2")
    save_pretrained(tmp_path, model.config, params, max_shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = 0
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        sizes = [tensor.nbytes for tensor in tensors.values()]
        assert sum(sizes) <= 50_000 or len(sizes) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
        total += sum(sizes)
    assert total == index["metadata"]["total_size"] == 4 * model.config.num_params()


def test_an_export_replaces_an_earlier_one_whatever_its_shards(
    make_model, tmp_path
) -> None:
    model, params = make_model("qwen3")
    (tmp_path / "notes.txt").write_text("kept")
    other = jax.tree.map(lambda x: x + 1, params)
    for written, limit in ((params, 10**9), (other, 100_000), (params, 10**9)):
        save_pretrained(tmp_path, model.config, written, max_shard_bytes=limit)
        read = load_params(tmp_path, model)
        jax.tree.map(np.testing.assert_array_equal, read, written)
    assert (tmp_path / "notes.txt").exists()
    assert len(list(tmp_path.glob("*.safetensors*"))) == 1


def test_the_config_and_the_end_tokens_go_along(make_model, tmp_path) -> None:
    model, params = make_model("qwen3")
    save_pretrained(tmp_path, model.config, params)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "float32"


def test_adapters_and_misshapen_weights_are_refused(make_model, tmp_path) -> None:
    model, params = make_model("qwen3")
    layers = jax.tree.map(lambda x: x, params["layers"])
    layers["self_attn"]["q_proj"]["lora_a"] = np.zeros((2, 64, 4))
    wrong = {**params, "layers": layers, "norm": {"scale": np.zeros(3)}}
    with pytest.raises(ValueError, match="Merge adapters before") as caught:
        save_pretrained(tmp_path, model.config, wrong)
    message = str(caught.value)
    assert "norm/scale has shape (3,), expected (64,)" in message
    assert "unexpected layers/self_attn/q_proj/lora_a" in message
    assert not list(tmp_path.iterdir())
