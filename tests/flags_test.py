"""Flags win over files, always: one that would not act is refused, never ignored."""

import functools
import types
import typing
from typing import Annotated, Any, Literal, Union

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxtrain import schema
from jaxtrain.config import ConfigError, RunConfig, default_config, resolve
from jaxtrain.config.flags import Flag, override, resolve_flags
from jaxtrain.config.sections import SCHEMA, TRAINING_SECTIONS, TYPE_DEFAULTS
from jaxtrain.schema import Bound, OneOf, OwnName
from jaxtrain.tree import dotted, nest

KEYS = sorted(dotted(SCHEMA))
TYPES = tuple(TYPE_DEFAULTS)
# Texts that a key's own rules take; any other key of texts has a name or a path.
TEXTS = {
    "metric_for_best_model": ["eval_loss", "eval_perplexity"],
    "metrics": ["exact_match", "bleu"],
    "objective": ["auto", "orpo", "cpo", "simpo", "kto", "losses:mine"],
    "target_modules": ["all-linear", "q_proj"],
    "train": ["", "rows.jsonl", "owner/rows"],
    "eval": ["", "rows.jsonl"],
    "init_from": ["", "adapter"],
}


def values(key: str, hint: Any) -> st.SearchStrategy[Any]:
    """Values that a key's annotation allows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        checks = [check for check in arguments[1:] if isinstance(check, Bound | OneOf)]
        if any(isinstance(check, OwnName) for check in checks):
            return st.just("my_parts:part")
        tables = [[*check.table] for check in checks if isinstance(check, OneOf)]
        base = st.sampled_from(tables[0]) if tables else values(key, arguments[0])
        return base.filter(lambda value: all(value in check for check in checks))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        arms = [arm for arm in arguments if arm is not type(None)]
        return st.one_of([values(key, arm) for arm in arms])
    if origin is tuple:
        return st.lists(
            values(key, arguments[0]), min_size=1, max_size=2, unique_by=repr
        )
    if origin is dict or hint == dict[str, Any]:
        return st.just({})
    name = key.rsplit(".", 1)[-1]
    return {
        bool: st.booleans(),
        int: st.sampled_from([-1, 0, 1, 2, 4, 8, 64, 1000]),
        float: st.sampled_from([0.0, 1e-6, 0.1, 0.25, 0.5, 0.9, 1.0, 2.0]),
        str: st.sampled_from(TEXTS.get(name, ["", "name"])),
    }[hint]


def settings_of(key: str) -> st.SearchStrategy[Any]:
    return values(key, dotted(SCHEMA)[key].hint)


def found(run: RunConfig, key: str) -> Any:
    """What a run holds for a key, which may stand in a block of its type."""
    path = key.removeprefix("training.").split(".")
    if path[0] == run.training_type and not hasattr(run.dpo or run.lora, path[1]):
        path = path[1:]
    if path == ["lora", "enabled"]:
        return run.lora is not None
    if key.startswith("training."):
        for name in TRAINING_SECTIONS:
            if hasattr(getattr(run, name), path[0]):
                path.insert(0, name)
                break
    return functools.reduce(getattr, path, run)


@st.composite
def files(draw: st.DrawFn, key: str) -> dict[str, Any]:
    """A file with a value of `key` or none, some other keys and a training type."""
    named = draw(st.lists(st.sampled_from(KEYS), max_size=3))
    chosen = {key, *named} if draw(st.booleans()) else set(named)
    flat = {tuple(name.split(".")): draw(settings_of(name)) for name in chosen}
    flat[("training", "training_type")] = draw(st.sampled_from(TYPES))
    return nest(flat)


def as_text(value: Any) -> str:
    if isinstance(value, list) and not any(isinstance(x, dict) for x in value):
        return ",".join(map(str, value))
    return str(value)


@settings(max_examples=150)
@given(st.data())
def test_a_flag_acts_or_is_refused_by_name(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(KEYS), "key")
    file = data.draw(files(key), "file")
    value = data.draw(settings_of(key), "flag")
    config = default_config()
    assume(not schema.overlay(config, SCHEMA, file))
    try:
        resolve(config)
    except ConfigError:
        assume(False)  # the file does not hold by itself
    try:
        _, run = resolve_flags(config, [Flag(key, as_text(value))])
    except ConfigError as error:
        # It names a key in full: the flag's own, or the one that it contradicts.
        assert any(name in str(error) for name in KEYS), str(error)
        return
    wanted = schema.convert(value, dotted(SCHEMA)[key].hint)
    actual = found(run, key)
    if value == "" and dotted(SCHEMA)[key].default is None:
        assume(False)  # a text that unsets
    if key.endswith("report_to") and wanted == ("none",):
        wanted = ()
    elif key.endswith("objective_kwargs"):
        actual = actual or {}
    elif key.endswith("target_modules"):  # one name is a list of it, all-linear is not
        one = {"q_proj": ("q_proj",), ("all-linear",): "all-linear"}
        wanted = one.get(wanted, wanted)
    elif key.startswith("mesh.") and wanted == -1:
        actual = -1  # the rest of the devices, whose number may be known
    assert actual == wanted


ONLY_FLAGS = [  # a file, a flag that would not act in it, the key that does
    ("training.optimizer=adafactor", "adam_beta1=0.8", "optimizer is adafactor"),
    ("training.optimizer=lion", "adam_epsilon=1e-6", "optimizer is lion"),
    ("", "remat_policy=dots", "set training.gradient_checkpointing = true too"),
    ("", "remat_layers=3", "set training.gradient_checkpointing = true too"),
    ("training.gradient_checkpointing=true;training.remat_policy=auto",
     "remat_layers=3", "remat_policy is auto"),
    ("", "reshard_after_forward=false",
     "set training.gradient_checkpointing = true too"),
    ("", "spike_window=9", "set training.spike_threshold too"),
    ("", "on_spike=skip", "set training.spike_threshold too"),
    ("training.fp16=true", "on_nonfinite=skip", "fp16 is true"),
    ("", "early_stopping_threshold=0.1", "set training.early_stopping_patience too"),
    ("training.save_steps=0", "save_total_limit=2", "save_steps is 0"),
    ("training.save_final_model=false", "load_best_model_at_end=true",
     "set training.save_final_model = true too"),
    ("training.eval_steps=0", "per_device_eval_batch_size=2", "eval_steps is 0"),
    ("data.train=rows.jsonl", "eval_steps=5", "set data.eval too"),
    ("data.train=rows.jsonl", "early_stopping_patience=2", "set data.eval too"),
    ("", "generation.num_prompts=4", "set training.generation.enabled = true too"),
    ("training.generation.metrics=bleu;training.generation.temperature=0",
     "generation.top_k=5", "temperature is 0"),
    ("training.generation.metrics=bleu", "generation.bertscore_model=x",
     "does not name bertscore"),
    ("", "distributed=true", "the launcher's environment"),
    ("training.training_type=lora", "lora.task_type=CAUSAL_LM", "training_type"),
    ("training.training_type=lora", "lora.quantization_block_size=32",
     "set training.lora.quantization too"),
    ("training.training_type=dpo", "dpo.ref_model_sync_steps=5",
     "set training.dpo.sync_ref_model = true too"),
    ("training.training_type=dpo", "dpo.f_alpha_divergence_coef=0.4",
     "f_divergence_type is reverse_kl"),
    ("training.training_type=dpo", "dpo.label_smoothing=0.0", "training.dpo.loss_type"),
    ("training.training_type=dpo", "sft.seed=1", "set training.seed"),
    ("training.training_type=dpo", "data.completion_only_loss=true", "training_type"),
    ("data.cache=false", "data.cache_dir=x", "set data.cache = true too"),
    ("data.format=messages", "data.text_column=body", "data.format"),
    ("data.streaming=true;training.max_steps=9;data.shuffle=false",
     "data.shuffle_buffer_size=5", "set data.shuffle = true too"),
    ("", "data.train_split=test", "set data.train too"),
    ("", "model.revision=main", "model.name_or_path"),
    ("training.training_type=lora", "model.param_dtype=bfloat16", "base in compute"),
    ("training.save_final_model=false", "model.export_dtype=float16",
     "training.save_final_model"),
    ("training.save_final_model=false", "model.export_text_only=true",
     "training.save_final_model"),
]  # fmt: skip


def flags_of(text: str) -> list[Flag]:
    flags = [part.partition("=") for part in text.split(";") if part]
    sections = ("training.", "data.", "model.", "mesh.")
    return [
        Flag(key if key.startswith(sections) else f"training.{key}", value)
        for key, _, value in flags
    ]


@pytest.mark.parametrize(("file", "flag", "acting"), ONLY_FLAGS)
def test_what_a_file_may_leave_idle_a_flag_may_not(
    file: str, flag: str, acting: str
) -> None:
    config = default_config()
    override(config, flags_of(file))
    (given_flag,) = flags_of(flag)
    with pytest.raises(ConfigError) as caught:
        resolve_flags(config.copy_and_resolve_references(), [given_flag])
    assert given_flag.key in str(caught.value)
    assert acting in str(caught.value)
    override(config, [given_flag])
    resolve(config)  # as a file, it is noted at most


@pytest.mark.parametrize("temperature", ["", ";training.generation.temperature=0.7"])
def test_draws_may_be_limited_where_the_model_may_sample(temperature: str) -> None:
    config = default_config()
    override(config, flags_of(f"training.generation.metrics=bleu{temperature}"))
    _, run = resolve_flags(config, flags_of("generation.top_k=5;generation.top_p=0.9"))
    assert (run.generation.top_k, run.generation.top_p) == (5, 0.9)


SWITCHED = [  # a file, a flag that contradicts it and wins, what the run then has
    ("training.bf16=true", "fp16=true", "float16"),
    ("training.fp16=true", "bf16=true", "bfloat16"),
    ("training.fp16=true", "bf16=false", "float16"),
]


@pytest.mark.parametrize(("file", "flag", "dtype"), SWITCHED)
def test_a_flag_switches_off_what_a_file_has_in_its_place(
    file: str, flag: str, dtype: str
) -> None:
    config = default_config()
    override(config, flags_of(file))
    _, run = resolve_flags(config, flags_of(flag))
    assert run.precision.compute_dtype == dtype


def test_a_flag_unsets_a_files_other_names_of_it() -> None:
    config = default_config()
    text = "training_type=lora;lora.load_in_4bit=true;pin_memory=true;cpu_offload=true"
    override(config, flags_of(text))
    flags = "lora.quantization=int8;dataloader_pin_memory=false;cpu_offload=false"
    _, run = resolve_flags(config, flags_of(flags))
    assert run.lora is not None and run.lora.quantization == "int8"
    assert not run.devices.dataloader_pin_memory
    assert not run.devices.deepspeed.offload_param


def test_a_mapping_with_a_slip_in_it_is_not_taken_for_a_path() -> None:
    slips = ("{helpful: a.jsonl, safe: b.jsonl", "{a: b: c}", "[{path: a.jsonl}")
    for text in slips:
        flags = [Flag("data.train", text)]
        with pytest.raises(ConfigError, match="no list and no mapping: look at") as got:
            resolve_flags(default_config(), flags)
        assert f"--data.train={text}: " in str(got.value)
    flags = [Flag("data.train", "./{a}.jsonl"), Flag("training.run_name", "{a")]
    _, run = resolve_flags(default_config(), flags)
    assert (run.data.train, run.loop.run_name) == ("./{a}.jsonl", "{a")


def test_numbers_with_commas_between_them_are_a_list() -> None:
    text = "training_type=dpo;dpo.loss_type=sigmoid,sft;dpo.loss_weights=1.0,0.5"
    _, run = resolve_flags(default_config(), flags_of(text))
    assert run.dpo is not None and run.dpo.loss_weights == (1.0, 0.5)
