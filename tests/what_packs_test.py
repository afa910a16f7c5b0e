"""What packs by default: whole runs, packed and padded, have the same numbers.

A row of `CASES` for each kind of run. It packs, or falls back by itself and says why.
"""

import json
import logging
import pathlib
import sys

import datasets
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import records, tiny_config, train
from tiny_bases import chat_tokenizer, write_base

COUNT = 20
DPO, SFT, LORA = "dpo", "sft", "lora"
PRECOMPUTED = {"training.dpo.precompute_ref_log_probs": True}
LENGTHS = {
    "training.curriculum.enabled": True,
    "training.curriculum.start_length": 24,
    "training.curriculum.steps": 2,
}
STREAM = {"data.streaming": True, "data.stream_window_rows": 5}
BASES = {
    "": {},
    "window": {"model_type": "mistral", "sliding_window": 8},
    "longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [1.5] * 8,
        },
    },
    "moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "router_aux_loss_coef": 0.3,
        "output_router_logits": True,
    },
}
# name: training type, keys, base, what the log says of a fallback ("": it packs)
CASES = {
    "sft": (SFT, {}, "", ""),
    "dpo": (DPO, {}, "", ""),
    "kto": (DPO, {"training.objective": "kto"}, "", ""),
    "orpo": (DPO, {"training.objective": "orpo"}, "", ""),
    "cpo": (DPO, {"training.objective": "cpo"}, "", ""),
    "simpo": (DPO, {"training.objective": "simpo"}, "", ""),
    "ld_alpha": (DPO, {"training.dpo.ld_alpha": 0.5}, "", ""),
    "precomputed": (DPO, PRECOMPUTED, "", ""),
    "lengths": (SFT, LENGTHS, "", ""),
    "lengths of pairs": (DPO, LENGTHS, "", ""),
    "window": (DPO, {}, "window", "prompts are not shared, for the model's window of"),
    "longrope": (DPO, {}, "longrope", "prompts are not shared, for under longrope"),
    "stream": (SFT, STREAM, "", ""),
    "stream of pairs": (DPO, STREAM, "", ""),
    "stream, window": (DPO, STREAM, "window", "prompts are not shared, for"),
    "dora": (LORA, {"training.lora.use_dora": True}, "", ""),
    "experts": (DPO, {}, "moe", ""),
    "mixture": (SFT, {"data.train": "mixture"}, "", ""),
    "own data": (SFT, STREAM | {"data.train": "own"}, "", ""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows for each training type, and the bases."""
    folder = tmp_path_factory.mktemp("packs")
    pairs = [
        {
            "prompt": f"{n} and {n * n}: ",
            "chosen": "the dog" * (1 + n % 4),
            "rejected": "a fox" * (1 + n % 3),
        }
        for n in range(COUNT)
    ]
    texts = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]
    for name, rows in ((DPO, pairs), (SFT, texts), (LORA, texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    for name, sizes in BASES.items():
        write_base(folder / f"{name} base", chat_tokenizer(), **sizes)
    return folder


def config_of(folder, training_type, keys, base):
    config = tiny_config(training_type, max_steps=2, save_steps=0, eval_steps=2)
    config.model.name_or_path = str(folder / f"{base} base")
    config.training.save_final_model = False
    config.training.per_device_train_batch_size = 4
    config.training.per_device_eval_batch_size = 8
    if training_type == LORA:
        config.training.lora.lora_dropout = 0.0
    rows = str(folder / f"{training_type}.jsonl")
    config.data.train = config.data.eval = rows
    for key, value in keys.items():
        *path, last = key.split(".")
        section = config
        for name in path:
            section = section[name]
        section[last] = value
    if config.data.train == "mixture":
        config.data.train = f"{rows}:0.7,{rows}:0.3"
    return config


def run(config, workdir):
    """The records of a run, and which share of the computed tokens are useful."""
    own = config.data.train == "own"
    given = {}
    if own:
        rows = datasets.load_dataset("json", data_files=config.data.eval)["train"]
        given["train_dataset"] = rows.to_iterable_dataset()
    train(config, workdir, **given)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    useful = [
        line["useful_token_share"] for line in lines if "step_time_p50_secs" in line
    ]
    return records(workdir), useful[-1]


@pytest.mark.parametrize("name", CASES)
def test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows(
    name, folder, tmp_path, caplog, monkeypatch
):
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    training_type, keys, base, fallback = CASES[name]
    config = config_of(folder, training_type, keys, base)
    with caplog.at_level(logging.INFO, "jaxtrain"):
        found, useful = run(config, tmp_path / "packed")
    assert not fallback or fallback in caplog.text
    config.data.packing = False
    expected, useful_if_padded = run(config, tmp_path / "padded")
    assert useful > 1.1 * useful_if_padded
    assert len(found) == len(expected) == 2 and "eval_loss" in found[-1]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for metric, value in theirs.items():
            assert ours[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric
