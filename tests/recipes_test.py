"""Recipes: each resolves at its model's published sizes, and fits its machine."""

import json
import logging
import pathlib
import runpy

import jax
import pytest

from jaxtrain.cli import main as jaxtrain
from jaxtrain.cli.command import ConfigParser, default_workdir
from jaxtrain.config import RunConfig, load_config, resolve
from jaxtrain.config.shipped import read_recipe, shipped_configs
from jaxtrain.models.hf_config import load_config as load_sizes
from jaxtrain.models.load import load_abstract_model

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PAGE = runpy.run_path(str(REPOSITORY / "docs" / "make_recipes.py"))
FOUND = json.loads((REPOSITORY / "docs" / "recipes.json").read_text())
RECIPES = PAGE["recipes"]()
GIB = 2.0**30

# Elements of all tensors of the published safetensors files, as the hub counts them.
# Of Gemma 3 4B those of the text model, which is what trains: 4,300,079,472 less its
# SigLIP encoder (416,866,032) and what projects that (2,950,272). Of Gemma 4 and
# Qwen3.5 those of the text model too: of Qwen3.5 0.8B, 873,438,784 less 100,592,896 for
# images and 20,452,864 for the layer that predicts tokens further on. Gemma 4's count
# its layers' scalars.
PARAMETERS = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-4-e2b": 4_628_569_379,
    "gemma-4-e4b": 7_463_013_418,
    "gemma-4-31b": 30_697_345_340,
    "granite-4.0-350m": 352_379_904,
    "granite-4.0-1b": 1_631_750_144,
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
    "mistral-7b": 7_248_023_552,
    "qwen3.5-0.8b": 752_393_024,
    "qwen3.5-2b": 1_881_825_088,
    "qwen3.5-4b": 4_205_751_296,
    "qwen3.5-9b": 8_953_803_264,
    "qwen3.5-27b": 26_895_998_464,
    "gemma-2b": 2_506_172_416,
    "glm-4-9b": 9_400_279_040,
    "granite-3.3-2b": 2_533_539_840,
    "granite-3.3-8b": 8_170_864_640,
    "granite-4.0-micro": 3_402_836_480,
    "olmo-2-7b": 7_298_617_344,
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176,
    "phi-4": 14_659_507_200,
    "smollm3-3b": 3_075_098_624,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


@pytest.mark.parametrize("shape", PARAMETERS)
def test_a_shape_has_the_parameters_of_the_published_model(shape: str) -> None:
    sizes = load_sizes(REPOSITORY / "configs" / "shapes" / shape)
    assert sizes.num_params() == PARAMETERS[shape]


def run_of(name: str) -> RunConfig:
    """The recipe with its model's published sizes in place of the hub's name."""
    config = load_config(name)
    config.model.name_or_path = str(PAGE["shape_of"](name))
    machine = read_recipe(RECIPES[name]).machine
    return resolve(config, device_count=8 if machine.startswith("TPU") else 1)


def state_bytes(run: RunConfig, shape: str) -> float:
    """Bytes of weights and optimizer state on each device, counted by hand."""
    count, sizes = PARAMETERS[shape], load_sizes(PAGE["SHAPES"] / shape)
    devices = run.mesh.data * run.mesh.fsdp
    if run.lora is None:  # float32 weights and two moments; DPO's reference in bfloat16
        return count * (12 + 2 * (run.dpo is not None)) / devices
    width, inner = sizes.hidden_size, sizes.intermediate_size
    heads = sizes.num_attention_heads * sizes.head_dim
    keys = sizes.num_key_value_heads * sizes.head_dim
    matrices = [(width, heads), (width, keys), (width, keys), (heads, width)]
    matrices += [(width, inner), (width, inner), (inner, width)]
    layers = sizes.num_hidden_layers
    adapters = layers * sum(run.lora.r * (a + b) for a, b in matrices)
    kernels = layers * sum(a * b for a, b in matrices)
    # QLoRA: 4 bits a weight, and a scale in bfloat16 or float32 for each block of 64.
    per_kernel = 2 if run.lora.quantization is None else 0.5 + 4 / 64
    return (count - kernels) * 2 + kernels * per_kernel + adapters * 12


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_at_its_models_sizes_and_fits(name: str) -> None:
    run, shape = run_of(name), PAGE["shape_of"](name).name
    assert not run.notes, "a key of the file does nothing"
    # Its rows fit the model, and every module that it names is there.
    model = load_abstract_model(run, jax.devices()[: 8 if run.mesh.fsdp > 1 else 1])
    assert model.config.num_params() == PARAMETERS[shape]
    # What was compiled is this recipe, and its state is what arithmetic says.
    found = FOUND[name]
    again = "run: python docs/make_recipes.py --compile " + name
    assert found["fingerprint"] == PAGE["fingerprint"](RECIPES[name]), again
    assert found["state_gib"] == pytest.approx(state_bytes(run, shape) / GIB, rel=0.02)
    text = RECIPES[name].read_text()
    on_gpu = "GPU" in read_recipe(RECIPES[name]).machine
    preallocated = "XLA_PYTHON_CLIENT_MEM_FRACTION" in text
    share = 0.75 if on_gpu and not preallocated else 0.92
    assert found["state_gib"] < found["peak_gib"] <= share * found["memory_gib"]


def test_the_page_and_the_comments_are_those_of_what_was_compiled() -> None:
    assert list(FOUND) == list(RECIPES)
    assert PAGE["OUTPUT"].read_text() == PAGE["render"](FOUND)
    for name, path in RECIPES.items():
        lines = path.read_text().splitlines()
        assert PAGE["memory_line"](FOUND[name]) in lines, name
        assert any(f"jaxtrain train {name} --data.train=" in line for line in lines)
        assert load_config(name).model.name_or_path.count("/") == 1  # of the hub


def compiler_problem(topology: str) -> str:
    """Why no step can be compiled for a topology here; "" where one can."""
    from jaxtrain.aot import describe_devices

    try:
        describe_devices(topology)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_compiles_to_the_memory_that_it_names(name: str) -> None:
    topology = FOUND[name]["topology"]
    if problem := compiler_problem(topology):
        pytest.skip(problem)
    compiled = PAGE["compile_recipe"](name)
    assert compiled["state_gib"] == pytest.approx(FOUND[name]["state_gib"], abs=0.02)
    assert compiled["peak_gib"] == pytest.approx(FOUND[name]["peak_gib"], rel=0.05)


# --- by name ------------------------------------------------------------------------


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert jaxtrain(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(RECIPES)
    assert all(" GiB of " in line and "on a" in line for line in listed)
    assert jaxtrain(["recipes", "qwen3-4b-dpo-lora"]) == 0
    assert capsys.readouterr().out == RECIPES["qwen3-4b-dpo-lora"].read_text()
    assert jaxtrain(["configs"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(shipped_configs())


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("qwen3-4b-dpo-lor", "did you mean qwen3-4b-dpo-lora"),
        ("qwen3-0.6b-stf", "did you mean qwen3-0.6b-sft"),
        ("llama-8b-qlora", "did you mean llama-3.1-8b-qlora"),
        ("zzz", "what `jaxtrain recipes` lists"),
    ],
)
def test_a_name_that_is_none_is_answered_with_near_ones(
    given: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jaxtrain(["train", given]) == 2
    assert near in capsys.readouterr().err


def test_a_name_with_a_dot_is_a_recipe_and_names_its_folder() -> None:
    assert load_config("qwen3-0.6b-sft").model.name_or_path == "Qwen/Qwen3-0.6B"
    assert default_workdir("qwen3-0.6b-sft").name == "qwen3-0.6b-sft"
    assert default_workdir("my/run.yaml").name == "run"
    with pytest.raises(ValueError, match="unknown kind"):
        load_config("run.toml")


def read(*arguments: str) -> RunConfig:
    """What a command makes of these arguments."""
    return ConfigParser("train", "").read(arguments)[2]


def test_flags_win_over_a_recipe() -> None:
    run = read("qwen3-4b-dpo-lora", "--training.dpo.beta=0.3", "--data.train=a.jsonl")
    assert run.dpo is not None and run.lora is not None
    assert (run.dpo.beta, run.data.train) == (0.3, "a.jsonl")
    assert run.model.name_or_path == "Qwen/Qwen3-4B"


# --- a preset and a real model -------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "rate"), [("sft", 2e-5), ("lora", 2e-4), ("dpo", 1e-6)]
)
def test_a_preset_does_not_train_a_real_model_at_the_embedded_ones_rate(
    preset: str, rate: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run = read(preset, "--model=owner/name")
    assert run.optimizer.learning_rate == rate  # TRL's default
    assert run.precision.compute_dtype == "bfloat16"
    assert (run.schedule.warmup_steps, run.schedule.warmup_ratio) == (0, 0.0)
    (line,) = caplog.messages
    assert "learning_rate = " in line and "max_steps = " in line
    # By its path too, and what a flag says stays.
    path = str(REPOSITORY / "configs" / f"{preset}.py")
    flag = "--training.learning_rate=0.5"
    run = read(path, flag, "--model.name_or_path=owner/name")
    assert run.optimizer.learning_rate == 0.5
    assert run.precision.compute_dtype == "bfloat16"


def test_a_preset_stays_as_it_is_for_the_embedded_model_and_its_kind(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    for arguments in ([], [f"--model={tmp_path}"]):
        assert read("sft", *arguments).optimizer.learning_rate == 1e-3
    copy = tmp_path / "mine.py"  # a file of one's own means what it says
    copy.write_text((REPOSITORY / "configs" / "sft.py").read_text())
    assert read(str(copy), "--model=owner/name").optimizer.learning_rate == 1e-3
    assert not caplog.messages
