"""Bad input in short: by fuzzers with one seed, and the worst by name.

`FUZZ_SEED=7 python -m pytest tests/faults/fuzz_test.py` takes other inputs.
"""

import json
import os
import pathlib
import sys
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import fuzz

from jaxtrain.config import ConfigError, load_config, resolve
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.rows.folders import first_rows
from jaxtrain.data.rows.source import load_rows
from jaxtrain.data.rows.tokenize import load_tokenizer
from jaxtrain.lora import LoraConfig
from jaxtrain.lora.peft_config import read_settings
from jaxtrain.lora.peft_files import load_adapter
from jaxtrain.models import hf_config
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.generation_config import read_generation_config
from jaxtrain.models.hf import load_config as load_sizes
from jaxtrain.models.hf_files import read_header
from jaxtrain.models.load import load_model

# A landing must not depend on the day: fresh seeds are for `run.py`, which resumes.
SEED = int(os.environ.get("FUZZ_SEED") or 20261126)
INPUTS = {"config": 60, "yaml": 150, "model": 120, "tokenizer": 150}
SIZES = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_no_bad_input_ends_in_a_traceback(name, tmp_path):
    kind = fuzz.KINDS[name](tmp_path)
    with fuzz.quiet():
        for number in range(INPUTS.get(name, 300)):
            outcome = fuzz.run_one(kind, name, SEED * 1_000_000 + number)
            assert outcome.handled, f"FUZZ_SEED={SEED}, input {number}: {outcome}"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
FILES = {
    "an alias bomb": (BOMB, "line 6"),
    "an alias within itself": ("a: &a [*a]\n", "line 1"),
    "100,000 brackets": ("training: " + "[" * 100_000, "line 1"),
    "3,000 levels": ("\n".join(" " * i + "a:" for i in range(3000)), "line 60"),
    "20,000 keys": (
        "training:\n" + "".join(f"  k{i}: 1\n" for i in range(20_000)),
        "and 19950 problems more",
    ),
    "a long word": ("training:\n  seed: " + "b" * 10**6, "training.seed"),
    "no integer": ("training:\n  seed: !!int x\n", "'x' is not a valid int"),
    "no date": ("training:\n  seed: 2020-99-99\n", "line 2"),
    "an epsilon": ("training:\n  adam_epsilon: 1e300\n", "adam_epsilon = 1e+300"),
    "alpha": ("training:\n  lora: {lora_alpha: .nan}\n", "lora_alpha = nan"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_without_end_is_refused_in_short(name, tmp_path):
    text, said = FILES[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        resolve(load_config(path))
    assert said in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < fuzz.MOST_CHARACTERS
    assert time.monotonic() - began < 20


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    for name in ("run.yaml", "rows.jsonl", "tokenizer.json", "config.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=r"run\.yaml.*a pipe"):
        load_config(tmp_path / "run.yaml")
    for read in (lambda path: first_rows(path, "train"), lambda p: load_rows(str(p))):
        with pytest.raises(ValueError, match=r"rows\.jsonl is a pipe"):
            read(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="is a pipe"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_sizes(tmp_path)


def test_a_word_of_5_mb_and_deep_rows_are_read_or_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a" * 5_000_000}) + "\n")
    assert len(load_rows(str(path))[0]["text"]) == 5_000_000
    path.write_text('{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="nested too deeply"):
        first_rows(path, "train")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: .*10,000"),
        (
            {"hidden_size": 10**9, "intermediate_size": 10**9, "head_dim": 2},
            "TiB in bfloat16: lower the sizes",
        ),
        ({"vocab_size": 10**30}, "vocab_size = a number above .*at most 2,147,483,647"),
        ({"rope_theta": 0}, "rope_theta = 0: must be a finite number, at least 1"),
        ({"rope_theta": -5.0}, "rope_theta = -5.0"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "rope_theta = 0.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
    ],
)
def test_sizes_that_no_model_has_are_refused_by_arithmetic(changed, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | changed))
    with pytest.raises(ValueError, match=said):
        load_sizes(tmp_path)
    with pytest.raises(ValueError, match=said):  # as of model.architecture
        ModelConfig.from_hf(SIZES | changed)


def test_weights_larger_than_the_device_are_refused_before_any_is_made():
    sizes = {"hidden_size": 2**20, "num_hidden_layers": 2, "vocab_size": 2**20}
    given = {
        "training": {"training_type": "from_scratch"},
        "model": {"architecture": {"model_type": "llama", **sizes}},
    }
    with pytest.raises(ValueError, match=r"need \d+\.\d TiB a device, which has"):
        load_model(resolve(given))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1, 0, "8"])
def test_an_alpha_that_scales_nothing_is_refused(alpha, tmp_path):
    with pytest.raises(ValueError, match="lora_alpha"):
        LoraConfig(alpha=alpha)
    with pytest.raises(ValueError, match="alpha_pattern"):
        LoraConfig(alpha_pattern={"q_proj": alpha})
    kind = fuzz.Adapter(tmp_path)
    settings = json.loads(kind.valid["adapter_config.json"]) | {"lora_alpha": alpha}
    _write(tmp_path, kind.valid | {"adapter_config.json": json.dumps(settings)})
    with pytest.raises(ValueError, match=r"adapter_config\.json: lora_alpha"):
        load_adapter(tmp_path, kind.base)


def test_an_adapter_of_integers_is_refused(tmp_path):
    kind = fuzz.Adapter(tmp_path)
    _write(tmp_path, kind.valid)
    load_adapter(tmp_path, kind.base)  # it is right so far
    tensors = safetensors.numpy.load(kind.valid["adapter_model.safetensors"])
    whole = {name: value.astype(np.int32) for name, value in tensors.items()}
    _write(tmp_path, {"adapter_model.safetensors": safetensors.numpy.save(whole)})
    with pytest.raises(ValueError, match="has type I32"):
        load_adapter(tmp_path, kind.base)


# Deeper than messages show, and not too deep for any of the readers of JSON.
DEEP = json.loads('{"a": ' * 400 + "1" + "}" * 400)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_hidden_layers": DEEP},
        {"model_type": DEEP},
        {"hidden_act": DEEP},
        {"rope_theta": DEEP},
        {"rope_scaling": {"rope_type": "linear", "factor": DEEP["a"]}},
        {"rope_parameters": DEEP},
        {"model_type": "qwen3", "layer_types": ["a" * 3000] * 2},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_a_deep_value_of_a_model_is_told_in_short(changed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | changed))
    key = list(changed)[-1].replace("rope_scaling", "factor")
    _refused_in_short(lambda: load_sizes(tmp_path), rf"config\.json: .*{key}")


def test_a_deep_value_of_another_file_or_a_flag_is_told_in_short(tmp_path):
    (tmp_path / "generation_config.json").write_text(
        json.dumps(dict.fromkeys(("temperature", "top_p", "top_k"), DEEP))
    )
    _refused_in_short(
        lambda: read_generation_config(tmp_path), r"config\.json has temperature = "
    )
    row = {"messages": [{"role": DEEP, "content": "a"}]}
    tokenizer = fuzz.Rows(tmp_path).tokenizer
    options = PrepareOptions("next_token", 64)
    _refused_in_short(lambda: prepare([row], tokenizer, options), r"row 0: .*role \{")
    given = {
        "training_type": "from_scratch",
        "from_scratch": {"objective": "(" * 5000},
    }
    _refused_in_short(lambda: resolve({"training": given}), r"objective = '\(\(")


@pytest.mark.parametrize("key", ["peft_type", "init_lora_weights", "r", "use_x"])
def test_a_deep_value_of_an_adapter_is_told_in_short(key, tmp_path):
    kind = fuzz.Adapter(tmp_path)
    settings = json.loads(kind.valid["adapter_config.json"]) | {key: DEEP}
    _write(tmp_path, kind.valid | {"adapter_config.json": json.dumps(settings)})
    _refused_in_short(lambda: load_adapter(tmp_path, kind.base), key)


def test_a_deep_place_in_a_header_is_told_in_short(tmp_path):
    header = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, DEEP]}}
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    _refused_in_short(lambda: read_header(file), r"model\.safetensors: .*'w'")


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling", "vocab_size"])
def test_a_model_s_values_without_end_are_refused(key, tmp_path, monkeypatch):
    """However deep Python reads JSON: libraries raise its limit."""
    deep: object = 1
    for _ in range(5000):
        deep = {"a": deep}
    (tmp_path / "config.json").touch()
    options = SIZES | {key: {"factor": deep}}
    monkeypatch.setattr(hf_config, "read_json", lambda _: options)
    _refused_in_short(lambda: load_sizes(tmp_path), r"config\.json: ")


def test_settings_of_generation_without_end_are_refused(tmp_path):
    deep = '{"a": ' * 5000 + "1" + "}" * 5000
    (tmp_path / "generation_config.json").write_text(f'{{"top_k": {deep}}}')
    _refused_in_short(lambda: read_generation_config(tmp_path), "nested too deeply")


@pytest.mark.parametrize("changed", [{"head_dim": 10**9}, {"hidden_size": 2**30}])
def test_heads_too_wide_are_refused_before_their_angles_are_made(changed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | changed))
    tracemalloc.start()
    _refused_in_short(lambda: load_sizes(tmp_path), "head_dim = .*at most 1,048,576")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 * 2**20


@pytest.mark.parametrize(
    "pattern", ["[]", "(", "(?i)q_proj", "(" * 5000, "q{" + "9" * 20 + "}"]
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_none_is_refused_in_an_adapter_too(key, pattern, tmp_path):
    with pytest.raises(ValueError, match=rf"lora\.{key} = .* not a regular expression"):
        LoraConfig(**{key: {pattern: 4}})
    kind = fuzz.Adapter(tmp_path)
    settings = json.loads(kind.valid["adapter_config.json"]) | {key: {pattern: 4}}
    _write(tmp_path, kind.valid | {"adapter_config.json": json.dumps(settings)})
    _refused_in_short(
        lambda: read_settings(tmp_path), rf"{key} = .*regular expressions"
    )


def test_flags_may_begin_the_one_pattern_of_whole_names():
    LoraConfig(target_modules=r"(?i).*Q_PROJ")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a\ud800"},
        {"prompt": "a", "completion": "\ud800"},
        {"messages": [{"role": "user", "content": "\udcff"}, fuzz._MESSAGES[2]]},
    ],
    ids=lambda row: next(iter(row)),
)
def test_half_a_surrogate_pair_in_a_program_s_row_is_refused(row, tmp_path):
    tokenizer = fuzz.Rows(tmp_path).tokenizer
    options = PrepareOptions("next_token", 64)
    _refused_in_short(lambda: prepare([row], tokenizer, options), "row 0: .*half of a")
    skipping = PrepareOptions("next_token", 64, on_bad_row="skip")
    good = fuzz.ROWS[_FORMS[next(iter(row))]][1]
    assert len(prepare([row, good], tokenizer, skipping)) == 1


def test_half_a_surrogate_pair_of_a_template_is_refused(tmp_path):
    tokenizer = fuzz.Rows(tmp_path).tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '\\ud800' + m['content'] }}{% endfor %}"
    )
    options = PrepareOptions("next_token", 64)
    row = {"messages": fuzz._MESSAGES}
    _refused_in_short(lambda: prepare([row], tokenizer, options), "chat template makes")


# What rows with these columns are called among the fuzzers' forms.
_FORMS = {"text": "text", "prompt": "completion", "messages": "messages"}


def _refused_in_short(read: Callable[[], object], said: str) -> None:
    """Reading raises ValueError with lines that the fuzzers take as short."""
    with pytest.raises(ValueError, match=said) as caught:
        read()
    outcome = fuzz.judge(caught.value)
    assert outcome.handled, outcome


def _write(folder: pathlib.Path, files: dict[str, bytes | str]) -> None:
    for name, data in files.items():
        raw = data.encode() if isinstance(data, str) else data
        (folder / name).write_bytes(raw)
