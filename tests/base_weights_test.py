"""A run whose frozen base was replaced is refused, as one whose data were."""

import json
import logging
import pathlib
import shutil
import sys
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config, train
from tiny_bases import chat_tokenizer, write_base

from jaxtrain.config import resolve
from jaxtrain.models import hf
from jaxtrain.models.fingerprint import fingerprint_files, fingerprint_model
from jaxtrain.run import base_weights, weights
from jaxtrain.trainer import TrainingOrchestrator

PAIRS = [{"prompt": p, "chosen": p + "a", "rejected": p + "b"} for p in "qrstuvwx"]
ROWS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]


def test_a_fingerprint_tells_weights_apart_and_not_how_they_are_stored(tmp_path):
    draw = np.random.default_rng(0)
    large = draw.standard_normal((700, 1024)).astype(np.float32)  # of several blocks
    tensors = {"a": large, "b": draw.standard_normal(5).astype(np.float16)}
    safetensors.numpy.save_file(tensors, tmp_path / "whole.safetensors")
    whole = fingerprint_files([tmp_path / "whole.safetensors"])
    for name in tensors:
        safetensors.numpy.save_file(
            {name: tensors[name]}, tmp_path / f"{name}.safetensors", {"format": "pt"}
        )
    shards = [tmp_path / "b.safetensors", tmp_path / "a.safetensors"]
    assert fingerprint_files(shards) == whole
    others = [
        tensors | {"a": large + np.float32(1e-3)},
        tensors | {"b": np.nextafter(tensors["b"], np.float16(9))},
        {"a": tensors["a"], "c": tensors["b"]},
        tensors | {"b": tensors["b"].view(np.int16)},
        tensors | {"a": large.reshape(1024, 700)},
        tensors | {"a": np.concatenate([large[:-1], large[:1]])},  # the end alone
    ]
    found = {whole}
    for number, other in enumerate(others):
        safetensors.numpy.save_file(other, tmp_path / "other.safetensors")
        found.add(fingerprint_files([tmp_path / "other.safetensors"]))
        assert len(found) == number + 2


def test_a_model_in_shards_has_the_fingerprint_of_one_file(tmp_path):
    tokenizer = chat_tokenizer()
    one = fingerprint_model(write_base(tmp_path / "one", tokenizer))
    other = write_base(tmp_path / "other", tokenizer, seed=1)
    assert fingerprint_model(other) != one
    from jaxtrain.models import hf_save
    from jaxtrain.models.transformer import Decoder

    config = hf.load_config(tmp_path / "one")
    params = hf.load_params(tmp_path / "one", Decoder(config))
    hf_save.save_pretrained(tmp_path / "s", config, params, max_shard_bytes=9000)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    assert fingerprint_model(tmp_path / "s") == one


def cut_off_run(kind: str, base: pathlib.Path, workdir: pathlib.Path) -> Any:
    """Train to step 4 with checkpoints at 2 and 4, and lose the last one."""
    config = tiny_config(
        kind,
        str(base),
        max_steps=4,
        save_steps=2,
        gradient_accumulation_steps=1,
        save_final_model=False,
    )
    rows = PAIRS if kind == "dpo" else ROWS
    train(config, workdir, train_dataset=rows)
    shutil.rmtree(workdir / "checkpoints" / "4")
    return config, rows


def name_another_model(folder: pathlib.Path, **differences: int) -> Any:
    """A run of whole training in `folder`, cut off, whose config names another model.

    `differences`: of that model, as `write_base` takes them. Both models' folders come
    first.
    """
    tokenizer = chat_tokenizer()
    base = write_base(folder / "base", tokenizer)
    config, rows = cut_off_run("sft", base, folder / "run")
    other = write_base(folder / "other", tokenizer, **differences)
    config.model.name_or_path = str(other)
    return base, other, config, rows


def use(config: Any, workdir: pathlib.Path, caplog: pytest.LogCaptureFixture) -> str:
    """The log of loading a checkpoint of the run to be evaluated or asked."""
    caplog.clear()
    caplog.set_level(logging.WARNING, "jaxtrain")
    run = resolve(config, device_count=jax.device_count())
    weights.load_state(run, weights.choose_checkpoint(run, workdir / "checkpoints"))
    return caplog.text


@pytest.mark.parametrize("kind", ["lora", "dpo"])
def test_a_run_on_replaced_weights_is_refused(kind, tmp_path, caplog):
    base = write_base(tmp_path / "base", chat_tokenizer())
    other = write_base(tmp_path / "other", chat_tokenizer(), seed=1)
    config, rows = cut_off_run(kind, base, tmp_path / "run")
    kept = (base / "model.safetensors").rename(tmp_path / "kept")
    shutil.copy(other / "model.safetensors", base)
    with pytest.raises(ValueError, match="cannot resume: the weights") as caught:
        train(config, tmp_path / "run", train_dataset=rows)
    assert str(base) in str(caught.value)
    assert "holds other weights" in use(config, tmp_path / "run", caplog)
    shutil.copyfile(kept, base / "model.safetensors")  # the same weights, a new file
    assert "holds other weights" not in use(config, tmp_path / "run", caplog)
    results = train(config, tmp_path / "run", train_dataset=rows)
    assert results["global_step"] == 4


def test_whole_training_needs_its_base_no_more(tmp_path):
    base = write_base(tmp_path / "base", chat_tokenizer())
    config, rows = cut_off_run("sft", base, tmp_path / "run")
    other = write_base(tmp_path / "other", chat_tokenizer(), seed=1)
    shutil.copy(other / "model.safetensors", base)
    assert train(config, tmp_path / "run", train_dataset=rows)["global_step"] == 4


def test_whole_training_is_not_resumed_under_the_name_of_another_model(
    tmp_path, caplog
):
    """It read nothing of that model, and trained on with a warning."""
    base, other, config, rows = name_another_model(tmp_path, seed=1)
    with pytest.raises(ValueError, match="a checkpoint belong to the weights") as e:
        train(config, tmp_path / "run", train_dataset=rows)
    assert f"those of {other} have" in str(e.value) and "model.name_or" in str(e.value)
    assert "holds other weights" not in use(config, tmp_path / "run", caplog)
    shutil.copytree(base, tmp_path / "moved")
    config.model.name_or_path = str(tmp_path / "moved")
    results = train(config, tmp_path / "run", train_dataset=rows)
    assert results["global_step"] == 4


def test_a_model_of_other_sizes_is_refused_by_its_key(tmp_path, caplog):
    """A list of arrays did not say that it is the model that differs."""
    base, other, config, rows = name_another_model(tmp_path, num_hidden_layers=3)
    with pytest.raises(ValueError, match="holds step 2 of a run with other") as caught:
        train(config, tmp_path / "run", train_dataset=rows)
    changed = f"model.name_or_path: '{base}' -> '{other}'. Set them back"
    assert changed in str(caught.value) and "leaves" not in str(caught.value)
    with pytest.raises(ValueError, match=r"holds step 2.*\. Leave out --model$"):
        use(config, tmp_path / "run", caplog)
    shutil.rmtree(base)
    shutil.copytree(other, base)  # no key tells of this
    config.model.name_or_path = str(base)
    with pytest.raises(ValueError, match="leaves differ"):
        train(config, tmp_path / "run", train_dataset=rows)


@pytest.mark.parametrize("kind", ["sft", "lora"])
def test_the_same_weights_under_another_config_are_another_model(
    kind, tmp_path, caplog
):
    """Only weights were compared: the run went on with norms of another epsilon."""
    base = write_base(tmp_path / "base", chat_tokenizer())
    config, rows = cut_off_run(kind, base, tmp_path / "run")
    file = base / "config.json"
    kept = file.read_text()

    def write(**options: Any) -> None:
        file.write_text(json.dumps(json.loads(kept) | options))

    write(rms_norm_eps=0.1, rope_theta=5e3, rope_parameters=None)
    with pytest.raises(ValueError, match="cannot resume: this run began") as caught:
        train(config, tmp_path / "run", train_dataset=rows)
    told = str(caught.value)
    assert f"config.json in {base}: " in told and "rms_norm_eps 1e-06 -> 0.1" in told
    assert "rope.theta" in told and "5000.0" in told
    assert "is not the model of the run: " in use(config, tmp_path / "run", caplog)
    # What does not act on results may change, and so may a rope by the run's own key.
    write(initializer_range=0.5, max_position_embeddings=4096)
    config.model.rope_scaling = {"rope_type": "linear", "factor": 2.0}
    assert "not the model" in use(config, tmp_path / "run", caplog)
    assert train(config, tmp_path / "run", train_dataset=rows)["global_step"] == 4


def test_a_description_is_the_same_when_it_was_stored():
    """Some have nested parts: routing, ropes of two kinds, layers of their own."""
    shapes = pathlib.Path(__file__).parent.parent / "configs" / "shapes"
    for folder in sorted(shapes.iterdir()):
        config = hf.load_config(folder)
        described = base_weights.describe_model(config)
        assert described == json.loads(json.dumps(described)), folder.name
        assert described["rope.theta"] == config.rope.theta


def test_a_checkpoint_without_a_fingerprint_resumes_with_a_note(caplog):
    caplog.set_level(logging.INFO, "jaxtrain")
    base_weights.check_base(None, "ab", "some/base")
    assert "whether some/base has still the same weights is not checked" in caplog.text
    base_weights.check_base(None, None, None)
    base_weights.check_base("ab", "ab", "some/base")
    with pytest.raises(ValueError, match=r"fingerprint ab, .* have cd"):
        base_weights.check_base("ab", "cd", "some/base")


def test_the_adapter_of_a_reference_is_a_part_of_it(tmp_path):
    base = write_base(tmp_path / "base", chat_tokenizer())
    config = tiny_config("lora", str(base), max_steps=1, save_steps=0)
    train(config, tmp_path / "first", train_dataset=ROWS)
    config = tiny_config("dpo", str(base), max_steps=1, save_steps=0)
    config.training.lora.enabled = True
    config.training.lora.init_from = str(tmp_path / "first" / "adapter")
    orchestrator = TrainingOrchestrator(config, workdir=tmp_path / "second")
    orchestrator.prepare()

    found = base_weights.identify_base(orchestrator.run, orchestrator.model)
    first, adapter = found.split("+")
    assert first == fingerprint_model(base)
    file = tmp_path / "first" / "adapter" / "adapter_model.safetensors"
    assert adapter == fingerprint_files([file])


@pytest.mark.parametrize(
    "setting",
    [
        {"target_modules": r".*layers\.[02]\..*q_proj"},
        {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1\..*q_proj": 4}},
    ],
    ids=lambda setting: [*setting][-1],
)
def test_a_trained_adapter_of_some_layers_is_told_to_be_merged(setting, tmp_path):
    """The advice was to write another pattern, which does not help a trained one."""
    base = write_base(tmp_path / "base", chat_tokenizer(), num_hidden_layers=3)
    folder = tmp_path / "adapter"
    folder.mkdir()
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **setting}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {
        name.format(layer, side): np.zeros((2, 32) if side == "A" else (32, 2))
        for layer in ([0, 2] if "rank_pattern" not in setting else [0, 1, 2])
        for side in "AB"
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = tiny_config("lora", str(base), max_steps=1, save_steps=0)
    config.training.lora.init_from = str(folder)
    message = f"adapter {folder}: .* train alike: merge it with PEFT"
    with pytest.raises(ValueError, match=message):
        TrainingOrchestrator(config, workdir=tmp_path / "run").prepare()
