"""Directories as others publish and damage them: loaded right, or refused in a line."""

import json
import logging
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtrain import assets
from jaxtrain.cli.ending import describe
from jaxtrain.config import default_config
from jaxtrain.model_manager import ModelManager
from jaxtrain.models import Decoder, ModelConfig, hf_files
from jaxtrain.models.families import FAMILIES
from jaxtrain.models.hf import load_config, load_params, match_weights, save_pretrained

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def tied(make_model, tmp_path) -> tuple[pathlib.Path, Decoder, Any]:
    """A model with a tied embedding, saved in one file: directory, decoder, weights."""
    model, params = make_model("qwen2_tied")
    save_pretrained(tmp_path, model.config, params)
    return tmp_path, model, params


@pytest.fixture
def whole(tmp_path) -> pathlib.Path:
    """A copy of the model that comes with jaxtrain: config, weights and tokenizer."""
    return shutil.copytree(assets.asset_path(assets.MODEL), tmp_path / "whole")


def edit(file: pathlib.Path, **keys: Any) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def rewrite(directory: pathlib.Path, change) -> None:
    """Replace the tensors of a directory by what `change` makes of them."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file)


def load(directory: pathlib.Path) -> tuple[ModelConfig, Any]:
    """What a run loads from a directory."""
    config = match_weights(directory, load_config(directory))
    return config, load_params(directory, Decoder(config))


def assert_equal_trees(ours: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


# --- config.json -----------------------------------------------------------------

UNREAD = {
    "is_llama_config": True,
    "transformers.js_config": {"dtype": "q4"},
    "unk_token_id": 0,
    "is_decoder": True,
    "pruned_heads": {},
    "num_logits_to_keep": 0,
    "our_own_note": "trained on a Tuesday",
    "num_experts_of_another_family": 8,
}
OF_GENERATION = {"max_length": 4096, "temperature": 0.6, "top_p": 0.9, "num_beams": 4}


def test_keys_that_nothing_reads_are_named_in_one_warning(tied, caplog) -> None:
    directory, model, _ = tied
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}
    edit(directory / "config.json", **UNREAD, **OF_GENERATION, rope_parameters=rope)
    with caplog.at_level(logging.WARNING):
        assert load_config(directory) == model.config
    (record,) = caplog.records
    named = record.getMessage().split("passed over: ")[1].split(", ")
    assert sorted(named) == sorted([*UNREAD, "rope_parameters.mrope_section"])


def test_a_known_key_counts_where_it_is_not_at_its_default(tied, caplog) -> None:
    directory, model, _ = tied
    config = directory / "config.json"
    edit(
        config, attention_dropout=0.0, chunk_size_feed_forward=0, per_layer_config=None
    )
    assert load_config(directory) == model.config
    assert not caplog.records
    edit(config, attention_dropout=0.1, per_layer_config={"0": {"head_dim": 8}})
    with pytest.raises(ValueError, match=r"attention_dropout = 0\.1.*per_layer_config"):
        load_config(directory)


def test_a_key_that_a_later_transformers_adds_is_refused(tied, monkeypatch) -> None:
    from jaxtrain.models import hf_config

    directory, model, _ = tied
    known = dict(hf_config.transformers_keys("qwen2"))
    known["query_multiplier"] = known["rms_norm_eps"].replace(default=1.0)
    monkeypatch.setattr(hf_config, "transformers_keys", lambda model_type: known)
    edit(directory / "config.json", query_multiplier=1.0)
    assert load_config(directory) == model.config
    edit(directory / "config.json", query_multiplier=2.0)
    with pytest.raises(ValueError, match=r"not implement: query_multiplier = 2\.0"):
        load_config(directory)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_types_that_are_taken_unasked_are_right_for_transformers(model_type) -> None:
    from jaxtrain.models import hf_config

    arguments = hf_config.transformers_keys(model_type)
    assert not hf_config._OF_ANY_TYPE & arguments.keys()
    samples = [1, 0.5, True, "a", None, [1], ["a"], [0.5], {"a": 1}]
    for name, taken in hf_config._RIGHT_TYPES.items():
        fits = [value for value in samples if hf_config._is_of(value, taken)]
        assert fits
        if (model_type, name) == ("gemma4_text", "sliding_window"):
            continue  # null leaves its sliding layers without a window: refused later
        if (model_type, name) == ("deepseek_v2", "attention_dropout"):
            continue  # transformers wants 0.0 there and refuses 0, which is as much
        if name in arguments:
            wanted = arguments[name].annotation
            assert all(hf_config._is_of(value, wanted) for value in fits), name


def test_values_of_a_wrong_type_are_named_before_transformers_checks(tied) -> None:
    wrong = {
        "hidden_size": "64",
        "num_key_value_heads": True,
        "rms_norm_eps": 1,
        "tie_word_embeddings": None,
        "eos_token_id": [2, "3"],
        "rope_theta": "1e4",
        "rope_scaling": "yarn",
    }
    edit(tied[0] / "config.json", **wrong, attention_dropout=0.5)
    with pytest.raises(ValueError) as caught:
        load_config(tied[0])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(wrong) + 1
    for name, value in wrong.items():
        (line,) = (line for line in lines if f"config.json: {name} = {value!r}" in line)
        assert "must be " in line
    assert "attention_dropout = 0.5" in lines[-1]


def test_all_problems_of_a_config_are_reported_at_once(tied) -> None:
    edit(
        tied[0] / "config.json",
        attention_dropout=0.5,
        rope_parameters={"rope_type": "spiral"},
        num_attention_heads=3,
        hidden_act="relu6",
    )
    with pytest.raises(ValueError) as caught:
        load_config(tied[0])
    lines = str(caught.value).splitlines()
    for part in ("attention_dropout", "'spiral'", "3 is not a multiple", "'relu6'"):
        assert sum(part in line for line in lines) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "lora.quantization"),
        ({"load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'.*dequantize"),
        ({"quant_method": "aqlm"}, "'aqlm'"),
    ],
)
def test_quantized_weights_are_refused_with_the_way_out(tied, settings, words) -> None:
    edit(tied[0] / "config.json", quantization_config=settings)
    with pytest.raises(ValueError, match=f"{words}.*") as caught:
        load_config(tied[0])
    assert "Train the model that they were made from" in str(caught.value)


# --- tensors ---------------------------------------------------------------------


def test_a_head_that_is_not_the_tied_embedding_is_kept_and_said(tied, caplog) -> None:
    directory, model, params = tied
    head = np.random.default_rng(1).standard_normal((128, 64)).astype(np.float32)
    rewrite(directory, lambda tensors: {**tensors, HEAD: head})
    config, loaded = load(directory)
    assert not config.tie_word_embeddings
    assert "loaded as two matrices" in caplog.text
    np.testing.assert_array_equal(loaded.pop("lm_head")["kernel"], head.T)
    assert_equal_trees(loaded, params)
    # Nothing drops it without a word, whatever config a caller has.
    with pytest.raises(ValueError, match=r"is not the embedding.*match_weights"):
        load_params(directory, model)


@pytest.mark.torch
def test_an_untied_head_counts_as_in_transformers(tied, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    directory = tied[0]
    head = np.random.default_rng(1).standard_normal((128, 64)).astype(np.float32)
    rewrite(directory, lambda tensors: {**tensors, HEAD: head})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokens = np.asarray([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens.tolist())).logits.numpy()
    config, params = load(directory)
    model = Decoder(config, compute_dtype="float32")
    positions, segments = jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32)
    ours = model.logits(params, jnp.asarray(tokens), positions, segments)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_only_the_head_of_a_tied_pair_may_be_stored(tied) -> None:
    directory, model, params = tied
    rewrite(
        directory, lambda ts: {HEAD if n == EMBEDDING else n: t for n, t in ts.items()}
    )
    config, loaded = load(directory)
    assert config == model.config
    assert_equal_trees(loaded, params)


def test_names_may_lack_their_first_part(tied) -> None:
    directory, _, params = tied
    rewrite(directory, lambda ts: {n.removeprefix("model."): t for n, t in ts.items()})
    assert_equal_trees(load(directory)[1], params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_sixteen_bits_load(tied, dtype: str) -> None:
    directory, model, params = tied
    save_pretrained(directory, model.config, params, dtype=dtype)
    expected = jax.tree.map(lambda x: x.astype(dtype), params)
    assert_equal_trees(load(directory)[1], expected)


@pytest.mark.torch
@pytest.mark.parametrize("block", [(16, 32), None], ids=["blocks", "one scale"])
def test_float8_weights_are_multiplied_by_their_scales(
    make_model, tmp_path, block: tuple[int, int] | None
) -> None:
    """As DeepSeek's published `weight_dequant` does: each block times its scale."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    model, params = make_model("qwen3_moe")
    save_pretrained(tmp_path, model.config, params)
    tensors = load_torch(tmp_path / "model.safetensors")
    stored, expected = {}, {}
    for name, tensor in tensors.items():
        expected[name] = tensor
        if tensor.ndim != 2 or "proj" not in name:
            stored[name] = tensor
            continue
        rows, columns = block or tensor.shape
        counts = -(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns)
        scales = 0.01 + torch.rand(counts if block else ())
        spread = scales
        if block:
            spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            spread = spread[: tensor.shape[0], : tensor.shape[1]]
        codes = (tensor / spread).clamp(-400, 400).to(torch.float8_e4m3fn)
        stored |= {name: codes, f"{name}_scale_inv": scales}
        stored[name.replace(".weight", ".input_scale")] = torch.ones(())
        expected[name] = codes.float() * spread
    # Scales in another file than their weights.
    parts: dict[str, dict[str, Any]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in stored.items():
        parts["b.safetensors" if "scale" in name else "a.safetensors"][name] = tensor
    (tmp_path / "model.safetensors").unlink()
    for file, part in parts.items():
        save_torch(part, tmp_path / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {"quant_method": "fp8", "weight_block_size": block and list(block)}
    edit(tmp_path / "config.json", quantization_config=settings)

    config = match_weights(tmp_path, load_config(tmp_path))
    loaded = load_params(tmp_path, Decoder(config), dtype="float32")
    save_pretrained(tmp_path / "export", config, loaded)
    exported = load_torch(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-6, atol=0, msg=name)
    assert "quantization_config" not in json.loads(
        (tmp_path / "export" / "config.json").read_text()
    )
    as_stored = load_params(tmp_path, Decoder(config))
    kernel = as_stored["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.dtype == ml_dtypes.bfloat16


# --- damaged files ---------------------------------------------------------------

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
)
DAMAGES = {
    "cut off": (lambda content: content[:-7], "is cut off: .* bytes, but its header"),
    "cut off in the header": (
        lambda content: content[:100],
        "is cut off in its header",
    ),
    "longer": (lambda content: content + b"x", "is too long"),
    "pointer": (lambda content: POINTER, "is a git-lfs pointer.*git lfs pull"),
    "empty": (lambda content: b"", "is empty: download it again"),
    "a page": (lambda content: b"<!doctype html>", ".* is not a safetensors file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_by_file_reason_and_way_out(tied, damage) -> None:
    change, words = DAMAGES[damage]
    file = tied[0] / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"model.safetensors {words}") as caught:
        load_params(tied[0], tied[1])
    assert len(str(caught.value).splitlines()) == 1
    assert "download" in str(caught.value)


INDEXES = {
    "no weight_map": ("{}", "index.json has no weight_map"),
    "an empty one": ('{"weight_map": {}}', "index.json has no weight_map"),
    "of numbers": ('{"weight_map": {"a": 1}}', "index.json has no weight_map"),
    "a list": ("[]", "holds a list, not an object"),
    "cut off": ('{"weight_map": {"a', "index.json is not JSON"),
    "pointer": (POINTER.decode(), "is a git-lfs pointer"),
    "empty": ("", "index.json is empty"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_damaged_indexes_are_refused(tied, kind: str) -> None:
    text, words = INDEXES[kind]
    directory = tied[0]
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_params(directory, tied[1])


def test_a_tensor_that_only_the_index_knows_is_named_with_its_file(tied) -> None:
    directory, model, _ = tied
    file = directory / "model-1.safetensors"
    tensors = load_file(directory / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, file.name)}
    save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    words = r"missing model\.norm\.weight \(the index says it is in model-1.safetensors"
    with pytest.raises(ValueError, match=words):
        load_params(directory, model)


def test_many_tensors_of_another_model_make_a_short_message(tied) -> None:
    edit(tied[0] / "config.json", num_hidden_layers=40, max_window_layers=40)
    edit(tied[0] / "config.json", layer_types=["full_attention"] * 40)
    with pytest.raises(ValueError, match=r"; and \d+ more$") as caught:
        match_weights(tied[0], load_config(tied[0]))
    assert len(str(caught.value)) < 1000


def test_an_adapters_directory_names_the_way_out(tied) -> None:
    (tied[0] / "model.safetensors").unlink()
    (tied[0] / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"an adapter.*training\.lora\.init_from"):
        load_params(tied[0], tied[1])


def test_every_problem_of_a_directory_is_reported_at_once(whole) -> None:
    config = default_config()
    config.model.name_or_path = str(whole)
    config.training.training_type = "sft"
    edit(whole / "config.json", attention_dropout=0.1, hidden_size="128")
    (whole / "tokenizer.json").write_bytes(POINTER)
    weights = whole / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-3])
    with pytest.raises(ValueError) as caught:
        ModelManager(config).load_model()
    found = describe(caught.value)
    assert found is not None and found[0] == 2
    lines = found[1].splitlines()
    for part in (
        "config.json: hidden_size = '128'",
        "attention_dropout = 0.1",
        "tokenizer.json is a git-lfs pointer",
        "model.safetensors is cut off",
    ):
        assert sum(part in line for line in lines) == 1, lines
    assert len(lines) == 4


def test_a_damaged_tokenizer_counts_only_where_it_is_used(whole) -> None:
    config = default_config()
    config.model.name_or_path = str(whole)
    config.training.training_type = "sft"
    (whole / "tokenizer.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer\.json is empty"):
        ModelManager(config).load_model()
    config.model.tokenizer_name_or_path = str(assets.asset_path(assets.TOKENIZER))
    ModelManager(config).load_model()


def test_a_tokenizer_and_weights_that_fail_are_reported_together(whole) -> None:
    config = default_config()
    config.model.name_or_path = str(whole)
    config.training.training_type = "sft"
    edit(whole / "tokenizer_config.json", eos_token=None)
    rewrite(whole, lambda ts: {n: t for n, t in ts.items() if n != "model.norm.weight"})
    with pytest.raises(ValueError, match="has no EOS token") as caught:
        ModelManager(config).load_model()
    assert "missing model.norm.weight" in str(caught.value).splitlines()[-1]


# --- a longer context ------------------------------------------------------------


def test_a_loaded_models_context_is_stretched_by_a_key(whole, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    before = load_config(whole)
    config = default_config()
    config.model.name_or_path = str(whole)
    config.training.training_type = "sft"
    trained = before.max_position_embeddings
    config.data.max_length = 4 * trained
    with pytest.raises(ValueError, match=r"context by model\.rope_scaling"):
        ModelManager(config).load_model()
    config.model.rope_scaling = {"rope_type": "yarn", "factor": 4.0}
    model = ModelManager(config).load_model()
    save_pretrained(tmp_path / "export", model.config, model.params)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "export")
    assert theirs.max_position_embeddings == 4 * trained
    rope = theirs.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 4.0)
    assert rope["original_max_position_embeddings"] == trained
    assert rope["rope_theta"] == before.rope.theta
    config.model.rope_scaling = {"rope_type": "yarn"}
    with pytest.raises(ValueError, match=r"model\.rope_scaling.*'rope_type'|fac"):
        ModelManager(config).load_model()


def test_a_variant_is_told_from_a_part_of_several(tmp_path):
    (tmp_path / "model.fp16.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only the variant model\.fp16"):
        hf_files.find_weights(tmp_path)
    (tmp_path / "model.fp16.safetensors").rename(
        tmp_path / "model-00001-of-00002.safetensors"
    )
    with pytest.raises(ValueError, match="download the index too"):
        hf_files.find_weights(tmp_path)
