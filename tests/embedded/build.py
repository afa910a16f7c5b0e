"""Build the embedded assets.

    python -m tests.embedded.build --source ../shared/data/kjv.txt.gz

writes the tokenizer and the data into jaxtrain/assets. The same source gives the same
bytes. The model comes from our own from-scratch run on them, made longer:

    python -m jaxtrain.main --config=configs/from_scratch.py --workdir=out/model \
        --config.training.max_steps=1600 --config.model.export_dtype=bfloat16
    python -m tests.embedded.build --model EXPORTED_DIRECTORY

copies that Hugging Face directory in, after a check that it fits.
"""

import argparse
import gzip
import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtrain import assets
from tests.embedded import pairs, passages, train_tokenizer

TEXT_TRAIN, TEXT_EVAL = assets.DATA["next_token"]
SFT_TRAIN, SFT_EVAL = assets.DATA["sft"]
MESSAGES_TRAIN, MESSAGES_EVAL = assets.DATA["messages"]
PREFERENCE_TRAIN, PREFERENCE_EVAL = assets.DATA["preference"]
PACKAGE_DIR = pathlib.Path(assets.__file__).parent
TRAIN_PAIRS = 4000  # rows of each kind for training
EVAL_PAIRS = 256
CONVERSATIONS = 256
EVAL_CONVERSATIONS = 64
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")


def build_data(source: pathlib.Path, output: pathlib.Path) -> None:
    """Write the tokenizer and all data files under `output`, from the verses."""
    train, held_out = passages.split_chapters(passages.read_verses(source))
    train_tokenizer.save_tokenizer(
        train_tokenizer.train_tokenizer(
            passage for run in train for passage in passages.make_passages(run)
        ),
        output / assets.TOKENIZER,
    )
    counts = pairs.count_words(train)
    files: dict[str, Sequence[Mapping[str, Any]]] = {
        TEXT_TRAIN: _text_rows(train),
        TEXT_EVAL: _text_rows(held_out),
        SFT_TRAIN: pairs.make_sft_rows(train, TRAIN_PAIRS),
        SFT_EVAL: pairs.make_sft_rows(held_out, EVAL_PAIRS),
        MESSAGES_TRAIN: pairs.make_conversations(train, CONVERSATIONS),
        MESSAGES_EVAL: pairs.make_conversations(held_out, EVAL_CONVERSATIONS),
        PREFERENCE_TRAIN: pairs.make_preference_rows(train, counts, TRAIN_PAIRS),
        PREFERENCE_EVAL: pairs.make_preference_rows(held_out, counts, EVAL_PAIRS),
    }
    for name, rows in files.items():
        write_jsonl_gz(output / name, rows)


def copy_model(source: pathlib.Path, output: pathlib.Path) -> None:
    """Copy an exported model into `output`/model, beside a copy of the tokenizer there.

    Raises:
        ValueError: a file is missing, the model has other tokens than `output`, or the
            assets would be larger than SIZE_LIMIT_BYTES.
    """
    needed = (*MODEL_FILES, "tokenizer.json")
    missing = [name for name in needed if not (source / name).is_file()]
    if missing:
        raise ValueError(f"--model {source} lacks {missing}: give an export of ours")
    tokenizer = output / assets.TOKENIZER
    if _vocabulary(source) != _vocabulary(tokenizer):
        raise ValueError(
            f"--model {source} was trained with another tokenizer than {tokenizer}: "
            "build the data first, then train on it"
        )
    target = output / assets.MODEL
    old = set(target.rglob("*"))
    files = [source / name for name in MODEL_FILES] + list(tokenizer.iterdir())
    kept = (file for file in output.rglob("*") if file.is_file() and file not in old)
    size = sum(file.stat().st_size for file in (*files, *kept))
    if size > assets.SIZE_LIMIT_BYTES:
        raise ValueError(
            f"--model {source} makes the assets {size} bytes, more than "
            f"{assets.SIZE_LIMIT_BYTES}: export it in bfloat16, or train a smaller one"
        )
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, target / file.name)


def write_jsonl_gz(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, gzipped without a time or a name in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


def _vocabulary(directory: pathlib.Path) -> dict[str, int]:
    """Token to id. Libraries write the rest of the file each in their own way."""
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    return dict(json.loads(text)["model"]["vocab"])


def _text_rows(runs: Iterable[pairs.Run]) -> list[dict[str, str]]:
    return [
        {"text": passage} for run in runs for passage in passages.make_passages(run)
    ]


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and build what it names."""
    parser = argparse.ArgumentParser(description="Build the embedded assets.")
    parser.add_argument("--source", type=pathlib.Path, help="the gzipped verses")
    parser.add_argument("--model", type=pathlib.Path, help="an exported model to embed")
    parser.add_argument("--output", type=pathlib.Path, default=PACKAGE_DIR)
    arguments = parser.parse_args(argv)
    if arguments.source is None and arguments.model is None:
        parser.error("give --source, --model, or both")
    if arguments.source is not None:
        build_data(arguments.source, arguments.output)
    if arguments.model is not None:
        copy_model(arguments.model, arguments.output)


if __name__ == "__main__":
    main()
