"""What packs by default: whole runs, packed and padded, have the same numbers.

A row of `CASES` for each kind of run. It packs, or falls back by itself and says why.
"""

import json
import logging
import pathlib
import sys

import datasets
import pytest

from jaxtrain.config import resolve
from jaxtrain.models.transformer import Decoder

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import records, tiny_config, train
from tiny_bases import chat_tokenizer, read_json, write_base

COUNT = 20
DPO, SFT, LORA = "dpo", "sft", "lora"
PRECOMPUTED = {"training.dpo.precompute_ref_log_probs": True}
EVALUATED = {"training.eval_steps": 2, "data.eval": "the same"}
# Long rows need no pretence then; the padded run has the whole mask.
IN_BLOCKS = {"model.attention": "xla_blocks"}
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
    "sft": (SFT, EVALUATED, "", ""),
    "dpo": (DPO, EVALUATED | IN_BLOCKS, "", ""),
    "kto": (DPO, {"training.objective": "kto"}, "", ""),
    "orpo": (DPO, {"training.objective": "orpo"}, "", ""),
    "cpo": (DPO, {"training.objective": "cpo"}, "", ""),
    "simpo": (DPO, {"training.objective": "simpo"}, "", ""),
    "ld_alpha": (DPO, {"training.dpo.ld_alpha": 0.5}, "", ""),
    "precomputed": (DPO, PRECOMPUTED, "", ""),
    "lengths": (SFT, LENGTHS, "", ""),
    "lengths of pairs": (DPO, LENGTHS, "", ""),
    "window": (
        DPO,
        {},
        "window",
        "prompts are not shared, because the model's window of",
    ),
    "longrope": (DPO, {}, "longrope", "prompts are not shared, because under longrope"),
    "stream": (SFT, STREAM, "", ""),
    "stream of pairs": (DPO, STREAM, "", ""),
    "stream, window": (DPO, STREAM, "window", "prompts are not shared, because"),
    "dora": (LORA, {"training.lora.use_dora": True}, "", ""),
    "experts": (DPO, {}, "moe", ""),
    "mixture": (SFT, {"data.train": "mixture"}, "", ""),
    "own data": (SFT, STREAM | {"data.train": "own"}, "", ""),
}

# As where attention leaves out blocks: rows are long, and the head scores what trains.
IN_LONG_ROWS = {"sft", "kto", "stream", "stream of pairs", "dora", "experts"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows for each training type, and the bases."""
    folder = tmp_path_factory.mktemp("packs")
    pairs = [
        {
            "prompt": f"{n} and {n * n}: ",
            "chosen": "the dog" * (9 if n % 5 == 0 else 1),
            "rejected": "a fox" * (1 + n % 3),
        }
        for n in range(COUNT)
    ]
    texts = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]
    for name, rows in ((DPO, pairs), (SFT, texts), (LORA, texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    for name, sizes in BASES.items():
        sizes = {"max_position_embeddings": 128} | sizes
        write_base(folder / f"{name} base", chat_tokenizer(), **sizes)
    return folder


def config_of(folder, training_type, keys, base):
    config = tiny_config(training_type, max_steps=2, save_steps=0)
    config.data.max_length = 128
    config.model.name_or_path = str(folder / f"{base} base")
    config.training.save_final_model = False
    config.training.per_device_train_batch_size = 8
    config.training.gradient_accumulation_steps = 1
    if training_type == LORA:
        config.training.lora.lora_dropout = 0.0
    rows = str(folder / f"{training_type}.jsonl")
    config.data.train = rows
    for key, value in keys.items():
        *path, last = key.split(".")
        section = config
        for name in path:
            section = section[name]
        section[last] = value
    if config.data.eval:
        config.data.eval = rows
    if config.data.train == "mixture":
        config.data.train = f"{rows}:0.7,{rows}:0.3"
    return config


def run(config, workdir, folder):
    """The records of a run, how it packs, and its useful share of computed tokens."""
    given = {}
    if config.data.train == "own":
        path = str(folder / "sft.jsonl")
        rows = datasets.load_dataset("json", data_files=path)["train"]
        given["train_dataset"] = rows.to_iterable_dataset()
    train(config, workdir, **given)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line).get("useful_token_share", 0) for line in lines]
    packing = read_json(workdir / "config.json")["data"]["packing"]
    return records(workdir), packing, max(shares)


@pytest.mark.parametrize("name", CASES)
def test_a_run_packs_by_default_and_has_the_numbers_of_padded_rows(
    name, folder, tmp_path, caplog, monkeypatch
):
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    training_type, keys, base, fallback = CASES[name]
    config = config_of(folder, training_type, keys, base)
    if name in IN_LONG_ROWS:
        monkeypatch.setattr(Decoder, "skips_blocks", lambda *_: True)
    with caplog.at_level(logging.INFO, "jaxtrain"):
        found, packing, useful = run(config, tmp_path / "packed", folder)
    assert packing == "batch"
    assert not fallback or caplog.text.count(fallback) == 1
    config.data.packing, config.model.attention = False, "xla"
    expected, _, useful_if_padded = run(config, tmp_path / "padded", folder)
    # A curriculum has short rows, and too few steps here for as many shapes.
    assert useful > 1.1 * useful_if_padded or "curriculum" in str(keys)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for metric, value in theirs.items():
            if metric == "rewards/accuracies" and ours["step"] == 1:
                continue  # policy and reference are the same: whose rounding wins
            # The same float32 sums of some hundred terms in another order, and two
            # updates of a learning rate of 1e-3 that follow from them.
            assert ours[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric


@pytest.mark.parametrize(
    "training_type, keys, packing, why",
    [
        # A loss of one's own may take a row for an example.
        (SFT, {"training.objective": "a:b"}, False, "a loss of your own"),
        (DPO, {"training.objective": "a:b"}, False, "a loss of your own"),
        (SFT, {"training.use_auxiliary_loss": True}, False, "a loss of your own"),
        (
            DPO,
            {"training.objective": "a:b", "data.packing": "batch"},
            False,
            "takes a pair a row",
        ),
        (
            DPO,
            {"training.objective": "kto", "data.packing": True},
            "batch",
            "completions are packed by micro-batch only",
        ),
        (
            DPO,
            PRECOMPUTED | {"data.packing": True},
            "batch",
            "precompute_ref_log_probs keeps one sum a row",
        ),
        (
            DPO,
            LENGTHS | {"data.packing": True},
            "batch",
            "a length_based curriculum takes a pair a row",
        ),
    ],
)
def test_what_cannot_pack_so_gives_way_and_says_so_once(
    folder, training_type, keys, packing, why
):
    resolved = resolve(config_of(folder, training_type, keys, ""))
    assert resolved.data.packing == packing
    (note,) = [str(n) for n in resolved.notes if n.key == "data.packing"]
    assert why in note
