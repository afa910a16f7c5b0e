"""eval, generate, chat and export, on runs, models and adapters."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import xla_flags
from runs import tiny_config, train

from jaxtrain import assets, cli
from jaxtrain.cli import chat
from jaxtrain.cli.source import configure, find
from jaxtrain.config import resolve
from jaxtrain.data.rows.tokenize import load_tokenizer
from jaxtrain.evaluation import stream
from jaxtrain.evaluation.generate import generate_tokens, make_generate
from jaxtrain.evaluation.stream import make_stream, text_pieces
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Decoder
from jaxtrain.run.saved_record import read_record

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE = assets.asset_path(assets.MODEL)
PREFERENCES = assets.asset_path(assets.DATA["preference"][1])
# What distinguishes the runs, each of four steps, evaluated and saved at 2 and 4.
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"generation__metrics": ("exact_match",), "generation__num_prompts": 2},
    "lora": {
        "lora__init_lora_weights": "pissa",
        "lora__r": 4,
        "lora__target_modules": ("q_proj",),
    },
    "dpo": {"bf16": True},
    "dpo_lora": {
        "lora__enabled": True,
        "dpo__sync_ref_model": True,
        "dpo__ref_model_sync_steps": 2,
    },
    "dpo_sums": {"dpo__precompute_ref_log_probs": True, "save_final_model": False},
}
Train = Callable[[str], pathlib.Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A function from a name of `KINDS` to the work directory of that run."""
    folder = tmp_path_factory.mktemp("runs")

    def workdir_of(kind: str) -> pathlib.Path:
        workdir = folder / kind
        if not workdir.exists():
            config = tiny_config(
                kind.partition("_")[0],
                str(BASE),
                max_steps=4,
                save_steps=2,
                eval_steps=2,
                gradient_accumulation_steps=1,
                per_device_eval_batch_size=4,
                **KINDS[kind],
            )
            if config.training.generation.metrics:
                config.training.generation.max_new_tokens = 4
            train(config, workdir)
        return workdir

    return workdir_of


def command(*arguments: Any) -> None:
    """Run a command in this process; it must succeed."""
    assert cli.main([str(argument) for argument in arguments]) == 0


def evaluate(tmp_path: pathlib.Path, *arguments: Any) -> dict[str, float]:
    output = tmp_path / "results.json"
    command("eval", *arguments, f"--output={output}")
    return json.loads(output.read_text())["metrics"]


def logged(workdir: pathlib.Path, step: int) -> dict[str, float]:
    """The evaluation that training logged at a step."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    found = [r for r in records if r["step"] == step and "eval_loss" in r]
    return {k: v for k, v in found[-1].items() if k.startswith("eval_")}


def files(folder: pathlib.Path) -> dict[str, int]:
    """Every file of a folder, with the time of its last change."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in paths}


def tensors(directory: pathlib.Path) -> dict[str, Any]:
    (file,) = directory.glob("*.safetensors")
    return safetensors.numpy.load_file(file)


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        np.testing.assert_array_equal(value, right[name], err_msg=name)


# --- eval --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_eval_repeats_the_numbers_of_the_log_and_leaves_the_run_alone(
    kind, trained, tmp_path
):
    workdir = trained(kind)
    before = files(workdir)
    found = {
        2: evaluate(tmp_path, workdir, "--step=2"),
        4: evaluate(tmp_path, workdir),
    }
    for step, metrics in found.items():
        assert metrics == logged(workdir, step), step
    assert found[2] != found[4]
    assert files(workdir) == before


def test_eval_of_an_exported_model_against_a_reference_is_that_of_its_run(
    trained, tmp_path
):
    workdir = trained("dpo")
    found = evaluate(
        tmp_path,
        workdir / "model",
        f"--reference={BASE}",
        f"--data={PREFERENCES}",
        "--data.max_eval_rows=12",
        "--training.dpo.max_length=64",
        "--training.bf16=true",
        "--training.num_gpus=1",
        "--training.per_device_eval_batch_size=4",
    )
    assert found == logged(workdir, 4)


def test_eval_of_an_adapter_puts_it_on_its_base_or_another(trained, tmp_path):
    workdir = trained("dpo_lora")
    options = (
        f"--data={PREFERENCES}",
        "--data.max_eval_rows=12",
        "--training.dpo.max_length=64",
        "--training.bf16=false",
        "--training.num_gpus=1",
        "--training.per_device_eval_batch_size=4",
    )
    found = evaluate(tmp_path, workdir / "adapter", *options)
    expected = logged(workdir, 4)
    # The run's reference moved; an adapter's is its base.
    for name in ("eval_logps/chosen", "eval_logps/rejected", "eval_entropy"):
        assert found[name] == expected[name], name
    assert found["eval_loss"] != expected["eval_loss"]
    moved = evaluate(
        tmp_path, workdir / "adapter", f"--model={trained('sft') / 'model'}", *options
    )
    assert moved["eval_logps/chosen"] != found["eval_logps/chosen"]


def test_eval_of_a_model_takes_the_rows_kind_and_any_mesh(tmp_path, caplog):
    few = ("--data.max_eval_rows=8", "--training.bf16=false", "--data.max_length=64")
    one = evaluate(
        tmp_path, BASE, f"--data={PREFERENCES}", *few, "--training.num_gpus=1"
    )
    # Without a reference, a reward is beta times the completion's log-probability.
    assert one["eval_rewards/chosen"] == pytest.approx(0.1 * one["eval_logps/chosen"])
    assert "no --reference is named" in caplog.text
    spread = evaluate(
        tmp_path,
        BASE,
        f"--data={PREFERENCES}",
        *few,
        "--mesh.fsdp=4",
        "--mesh.tensor=2",
    )
    # Sums in another order.
    assert spread == pytest.approx(one, rel=1e-4)


def test_eval_tells_of_rows_that_it_cut(tmp_path, capsys):
    """Their ends were left out of the loss without a word."""
    rows = [{"text": "In the beginning " * times} for times in (2, 30, 40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for length, cut in ((64, 2), (1024, None)):
        evaluate(tmp_path, BASE, f"--data={file}", f"--data.max_length={length}")
        told = "2 rows are cut to 64 tokens; --data.max_length sets more"
        assert (told in capsys.readouterr().out) == bool(cut)
        found = json.loads((tmp_path / "results.json").read_text())
        assert found.get("truncated") == cut


def test_eval_of_a_run_by_another_type_drops_what_its_own_settled(trained, tmp_path):
    """It was told that share_prompts, which nobody had set, is of pairs alone."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Let there", "completion": " be light"}))
    run = trained("dpo")
    assert json.loads((run / "config.json").read_text())["data"]["share_prompts"]
    found = evaluate(tmp_path, run, f"--data={file}", "--training.training_type=sft")
    assert found["eval_perplexity"] > 1


def test_eval_tells_where_the_best_step_is_no_checkpoint(trained, caplog, monkeypatch):
    """Another step was taken for the best one without a word."""
    run = trained("sft")
    command("eval", run, "--step=best", "--data.max_eval_rows=2")
    assert "there is no checkpoint" not in caplog.text

    def read(checkpoint: pathlib.Path) -> Any:
        best = {"value": 1.0, "step": 3}
        return read_record(checkpoint) | {"data_states": [{"best": best}]}

    monkeypatch.setattr("jaxtrain.run.weights.read_record", read)
    command("eval", run, "--step=best", "--data.max_eval_rows=2")
    assert "best at step 3, of which there is no checkpoint; of those" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft"], "is a configuration, not a model"),
        (["run.yaml"], "is a configuration, not a model"),
        (["./nothing"], "there is no such directory"),
        ([BASE, "--step=2"], "only a run has checkpoints"),
        ([BASE, "--model=x"], "only an adapter or a run has a base"),
        (["{run}/checkpoints/2"], "--step=2"),
        (["{run}", "--step=7"], "choose from 2, 4"),
        (["{run}", "--step=first"], "give a number, best or last"),
        (["{run}", "--config=sft"], "a run has its own"),
        (["{run}", f"--reference={BASE}"], "a run has its own"),
        (["{run}", "--training.learning_rate=1"], "no effect on an evaluation"),
        (["{run}", "--training.sft.max_steps=1"], "no effect on an evaluation"),
        (["{run}", "--data=nothing.jsonl"], "nothing.jsonl"),
        (["{run}", "--metrics=blue"], "'blue' is no metric"),
        (["{run}", "--outptu=x"], "did you mean --output?"),
        ([], "MODEL_OR_RUN"),
    ],
)
def test_eval_refuses_in_one_message(arguments, message, trained, capsys):
    given = [str(each).replace("{run}", str(trained("sft"))) for each in arguments]
    assert cli.main(["eval", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error and len(error.splitlines()) <= 2, error


def test_a_folder_is_told_by_what_it_holds(trained, tmp_path):
    workdir = trained("dpo_lora")
    assert find(str(workdir)).kind == "run"
    assert find(str(workdir / "model")).kind == "model"
    adapter = find(str(workdir / "adapter"))
    assert (adapter.kind, adapter.base) == ("adapter", str(BASE))
    assert find("Qwen/Qwen2.5-0.5B").kind == "model"
    # What training writes beside the sections of a configuration does not matter.
    saved = json.loads((workdir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"provenance": {"a": 1}}))
    assert find(str(tmp_path)).run().to_dict() == find(str(workdir)).run().to_dict()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        find(str(tmp_path))


def test_a_run_is_used_on_other_devices_than_it_was_trained_on(trained, tmp_path):
    workdir = trained("dpo_lora")
    spread = evaluate(tmp_path, workdir, "--mesh.fsdp=4", "--mesh.tensor=2")
    # Sums in another order; rewards are small differences of sums near 50.
    assert spread == pytest.approx(logged(workdir, 4), rel=1e-4, abs=1e-5)
    saved = json.loads((workdir / "config.json").read_text())
    saved["training"]["num_gpus"] = None
    for fsdp, expected in ((4, (1, 8)), (1, (8, 1))):
        # Sixteen devices; here are eight.
        saved["mesh"] |= {"data": 16 // fsdp, "fsdp": fsdp}
        saved["training"]["deepspeed"]["zero_stage"] = 3 if fsdp > 1 else 0
        (tmp_path / "config.json").write_text(json.dumps(saved))
        run = resolve(configure(find(str(tmp_path))), device_count=8)
        assert (run.mesh.data, run.mesh.fsdp) == expected


def test_the_harness_takes_a_run_for_the_model_it_exported(trained):
    pytest.importorskip("lm_eval")
    from jaxtrain.lm_eval.__main__ import model_of

    workdir = trained("dpo_lora")
    assert model_of(str(workdir)) == str(workdir / "model")
    assert model_of("") == "" and model_of(str(BASE)) == str(BASE)
    with pytest.raises(ValueError, match="jaxtrain export writes a whole model"):
        model_of(str(workdir / "adapter"))


# --- generate and chat -------------------------------------------------------------


@pytest.mark.torch
def test_generate_says_what_transformers_says(trained, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    workdir = trained("sft")
    capsys.readouterr()  # the log of the training, where this test is the first
    prompts = ["In the beginning", "And it came to pass"]
    command("generate", workdir, "--max_new_tokens=24", prompts[0])
    streamed = capsys.readouterr().out
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    command("generate", workdir, "--step=4", f"--prompts={file}", "--max_new_tokens=24")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        workdir / "model", dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "model")
    expected = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")
        made = theirs.generate(**tokens, max_new_tokens=24, do_sample=False)
        text = made[0, tokens["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(text, skip_special_tokens=True))
    assert streamed == expected[0] + "\n"
    assert rows == [
        {"prompt": prompt, "completion": text}
        for prompt, text in zip(prompts, expected, strict=True)
    ]
    assert len(set(expected[0].split())) > 4  # not one word over and over


def test_generate_draws_and_ends_texts_as_the_models_file_says(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    tokenizer = load_tokenizer(str(BASE))
    prompt, other = "In the beginning", "And it came to pass"

    def say(generation: dict[str, Any], *flags: str) -> str:
        (model / "generation_config.json").write_text(json.dumps(generation))
        few = ("--max_new_tokens=12", "--training.num_gpus=1")
        command("generate", model, prompt, *few, *flags)
        return capsys.readouterr().out.removesuffix("\n")

    greedy = say({})
    samples = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95}
    flags = ("--seed=1", "--temperature=0.9", "--top_k=20", "--top_p=0.95")
    sampled = say(samples, "--seed=1")
    assert sampled == say({}, *flags) != greedy
    assert say(samples, "--temperature=0") == greedy
    # A flag alone, where the file draws; of one token there is no choice.
    assert say(samples, "--seed=1", "--top_k=1") == greedy
    # Tokens with a character that the text has late end it before that.
    last = max(set(greedy.strip()), key=greedy.index)
    ids = range(len(tokenizer))
    ends = [number for number in ids if last in tokenizer.decode([number])]
    ended = say({"eos_token_id": ends})
    assert last not in ended
    assert greedy.startswith(ended)
    assert ended.strip()
    # The text of a prompt in a batch is the one that it has by itself.
    both = say(samples, other, "--seed=1")
    rows = [json.loads(line) for line in both.splitlines()]
    assert [row["prompt"] for row in rows] == [prompt, other]
    assert rows[0]["completion"] == sampled


def test_a_stream_makes_the_tokens_of_the_whole_loop_by_two_programs():
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        }
    )
    decoder = Decoder(config, compute_dtype="float32")
    params = jax.tree.map(lambda x: 3 * x, decoder.init(jax.random.key(0)))
    key = jax.random.key(1)
    ends: set[int] = set()
    for temperature, eos_ids in ((0.0, ()), (0.8, (5, 9, 31))):
        settings = {"max_new_tokens": 20, "temperature": temperature, "pad_id": 0}
        whole = make_generate(decoder, eos_ids=eos_ids, **settings)
        stream = make_stream(decoder, eos_ids=eos_ids, **settings)
        for prompt in ([3, 7, 1], [8], list(range(1, 15))):
            (row,) = generate_tokens(whole, params, [prompt], key=key, batch_size=1)
            made = list(stream(params, prompt, key=key))
            stop = next((i for i, t in enumerate(row) if t in eos_ids), len(row))
            assert made == row[:stop].tolist()
            ends.add(stop)
        assert stream.start._cache_size() == stream.extend._cache_size() == 1
    assert len(ends) > 2  # some texts ended early


def test_text_comes_in_whole_characters_and_adds_up():
    tokenizer = load_tokenizer(str(BASE))
    text = "Über π and 日本 — naïve 🙂🏽 end"
    ids = tokenizer(text)["input_ids"]
    pieces = list(text_pieces(tokenizer, [*ids, tokenizer.eos_token_id]))
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)
    # Bytes that never become a character are shown at the end, not lost.
    cut = next(ids[:n] for n in range(len(ids), 0, -1) if _is_cut(tokenizer, ids[:n]))
    assert "".join(text_pieces(tokenizer, cut)) == tokenizer.decode(cut)


def _is_cut(tokenizer: Any, ids: list[int]) -> bool:
    return tokenizer.decode(ids).endswith("\ufffd")


def test_a_chat_answers_in_the_room_that_its_model_has_left(monkeypatch):
    """With 512 new tokens by default, a model of so few positions said nothing."""
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(longest_text=10),
        on_device=lambda params: params,
        params=None,
        tokenizer=None,
    )
    monkeypatch.setattr(
        chat, "make_stream", lambda *_: lambda *_, key: itertools.count()
    )
    monkeypatch.setattr(chat, "encode", lambda *_: [1] * lengths.pop(0))
    monkeypatch.setattr(stream, "text_pieces", lambda _, tokens: map(str, tokens))
    answer = chat.make_answer(model, types.SimpleNamespace(seed=0, max_new_tokens=512))
    lengths = [7, 10]
    assert [*answer([])] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="has 10 tokens, and the model 10 positions"):
        next(answer([]))


def test_a_chat_remembers_is_cleared_and_stopped(trained, monkeypatch, capsys):
    asked: list[list[dict[str, str]]] = []

    def answer(messages):
        asked.append(messages)
        yield "so "
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        if messages[-1]["content"] == "fail":
            raise ValueError("too long")
        yield "be it"

    turns = iter(
        [
            "one",
            "stop",
            "two",
            "fail",
            "/what",
            "/clear",
            "caf\udce9",
            "three",
            "",
            "/exit",
        ]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(turns))
    chat.talk(answer, "be brief")
    said = [[m["content"] for m in messages] for messages in asked]
    assert said == [
        ["be brief", "one"],
        ["be brief", "one", "so be it", "stop"],
        ["be brief", "one", "so be it", "stop", "so ", "two"],
        ["be brief", "one", "so be it", "stop", "so ", "two", "so be it", "fail"],
        ["be brief", "three"],
    ]
    assert [m["role"] for m in asked[1]] == ["system", "user", "assistant", "user"]
    output = capsys.readouterr()
    assert "too long; /clear begins anew" in output.err
    assert "so be it\n" in output.out and "not UTF-8" in output.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", BASE], "no prompt is given"),
        (["generate", BASE, "a", "--top_k=5"], "add --temperature"),
        (["generate", BASE, "a", "--temperature=-1"], "give 0 (greedy) or more"),
        (["generate", BASE, "a", "--system=b"], "add --chat"),
        (["generate", BASE, "a", "--max_new_tokens=9999"], "4096 positions"),
        (["generate", BASE, "--prompts={rows}"], "line 2: a row needs a prompt"),
        (["generate", BASE, "a", "--training.max_steps=2"], "no effect on generation"),
        (["generate", BASE, "a", "--output={plain}"], "is a directory; name a file"),
        (["generate", BASE, "a", "--output={rows}/x/y"], "rows.jsonl is no folder to"),
        (["eval", "{run}", "--output={rows}/x"], "rows.jsonl is no folder to write"),
        (["report", "{run}", "--output={plain}"], "error: argument --output: "),
        (["generate", "{bare}", "a"], "it has no model_type in its config.json"),
        (["chat", "{plain}"], "has no chat template"),
        (["export", BASE], "is a model, not a run"),
        (["export", "{run}", "--adapter"], "it has no adapter"),
        (["export", "nope"], "'nope' is no folder here, not a run"),
        (["export", "{run}", "--output={run}/model"], "is not empty"),
        (["export", "{run}", "--output={run}", "--force"], "work directory of a run"),
        (["export", "{run}", "--training.seed=1"], "no effect on an export"),
    ],
)
def test_other_commands_refuse_in_one_message(
    arguments, message, trained, tmp_path, capsys
):
    rows, plain = tmp_path / "rows.jsonl", tmp_path / "plain"
    rows.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    plain.mkdir()
    for file in BASE.iterdir():
        if file.name != "chat_template.jinja":
            (plain / file.name).write_bytes(file.read_bytes())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"hidden_size": 8}')
    places = {"{run}": trained("sft"), "{rows}": rows, "{plain}": plain, "{bare}": bare}
    given = [str(argument) for argument in arguments]
    for name, path in places.items():
        given = [argument.replace(name, str(path)) for argument in given]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error and len(error.splitlines()) == 1, error


# --- export ------------------------------------------------------------------------


def card_of(folder: pathlib.Path) -> list[str]:
    """A model card's lines, but for torch: another test may have loaded it between."""
    lines = (folder / "README.md").read_text().splitlines()
    return [line for line in lines if not line.startswith("- torch ")]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dpo_sums"])
def test_an_exported_checkpoint_is_what_the_run_exported_itself(
    kind, trained, tmp_path, monkeypatch
):
    workdir = trained(kind)
    before = files(workdir)
    command("export", workdir, f"--output={tmp_path / 'last'}")
    assert_same(tensors(tmp_path / "last"), tensors(workdir / "model"))
    command("export", workdir, "--step=2", f"--output={tmp_path / 'second'}")
    earlier = tensors(tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    assert "library_name: transformers" in card and "optimizer step 2." in card
    assert card_of(tmp_path / "last") == card_of(workdir / "model")
    assert any((earlier[n] != x).any() for n, x in tensors(workdir / "model").items())
    if "lora" in kind:
        command("export", workdir, "--adapter", f"--output={tmp_path / 'adapter'}")
        assert_same(tensors(tmp_path / "adapter"), tensors(workdir / "adapter"))
        configs = (
            d / "adapter_config.json"
            for d in (tmp_path / "adapter", workdir / "adapter")
        )
        left, right = (json.loads(file.read_text()) for file in configs)
        assert left == right
        card = card_of(tmp_path / "adapter")
        assert card == card_of(workdir / "adapter")
        assert "library_name: peft" in card
    else:
        held = _read_checkpoint(workdir / "checkpoints" / "2")
        embedding = held["trainable.embed_tokens.embedding"]
        np.testing.assert_array_equal(earlier["model.embed_tokens.weight"], embedding)
        kernel = held["trainable.layers.self_attn.q_proj.kernel"][1].T
        name = "model.layers.1.self_attn.q_proj.weight"
        np.testing.assert_array_equal(earlier[name], kernel)
    assert files(workdir) == before


def _read_checkpoint(step: pathlib.Path) -> dict[str, Any]:
    """A saved state by Orbax alone, as it lies on the disk."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(step / "state")


@pytest.mark.torch
def test_an_export_loads_in_transformers_and_peft_in_the_type_it_was_asked_for(
    trained, tmp_path, capsys
):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    workdir, merged = trained("dpo_lora"), tmp_path / "merged"
    merged.mkdir()
    (merged / "notes.txt").write_text("mine")
    command("export", workdir, f"--output={merged}", "--dtype=float32", "--force")
    command("export", workdir, "--adapter", f"--output={tmp_path / 'adapter'}")
    assert (merged / "notes.txt").read_text() == "mine"
    load = transformers.AutoModelForCausalLM.from_pretrained
    whole = load(merged, dtype=torch.float32)
    with_adapter = peft.PeftModel.from_pretrained(
        load(BASE, dtype=torch.float32), tmp_path / "adapter"
    )
    tokens = torch.tensor([[5, 77, 300, 12, 9]])
    with torch.no_grad():
        ours, theirs = (model(tokens).logits for model in (whole, with_adapter))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # Asked by itself, an adapter stays beside its base, as in PEFT.
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    prompt = tokenizer("And the LORD said", return_tensors="pt")
    made = with_adapter.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = made[0, prompt["input_ids"].shape[1] :]
    capsys.readouterr()
    command(
        "generate",
        tmp_path / "adapter",
        "And the LORD said",
        "--max_new_tokens=16",
        "--training.bf16=false",
    )
    expected = tokenizer.decode(text, skip_special_tokens=True)
    assert capsys.readouterr().out == f"{expected}\n"
    narrow = tmp_path / "narrow"
    command("export", workdir, f"--output={narrow}", "--dtype=bfloat16")
    assert {str(x.dtype) for x in tensors(narrow).values()} == {"bfloat16"}
    assert json.loads((narrow / "config.json").read_text())["dtype"] == "bfloat16"


# --- as a user does ----------------------------------------------------------------


def test_the_commands_run_from_an_empty_folder(trained, tmp_path):
    workdir = trained("sft")

    def run(*arguments: Any, given: str = "") -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "jaxtrain", *map(str, arguments)],
            input=given,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": xla_flags.QUICK_TO_COMPILE,
                "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
            },
        )

    evaluated = run("eval", workdir, "--step=best", "--output=out/results.json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert not evaluated.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metrics"] == pytest.approx(logged(workdir, results["step"]))
    for name in results["metrics"]:
        assert name in evaluated.stdout

    talked = run(
        "chat", workdir, "--max_new_tokens=8", given="Who?\nAnd?\n/clear\nWho?\n"
    )
    assert talked.returncode == 0, talked.stderr
    assert not talked.stderr
    first, second, again = talked.stdout.splitlines()
    assert first == again != second
