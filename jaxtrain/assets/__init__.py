"""The embedded default: a tokenizer, data and a small model that need no network.

Everything here is built by `python -m tests.embedded.build` from the public-domain
King James text. `asset_path` is the one way in: configs name an asset, not a path.
"""

import importlib.resources
import pathlib

MODEL = "model"
TOKENIZER = "tokenizer"
TEXT_TRAIN = "data/text/train.jsonl.gz"
TEXT_EVAL = "data/text/eval.jsonl.gz"
SFT_TRAIN = "data/sft/train.jsonl.gz"
SFT_EVAL = "data/sft/eval.jsonl.gz"
MESSAGES_TRAIN = "data/messages/train.jsonl.gz"
MESSAGES_EVAL = "data/messages/eval.jsonl.gz"
PREFERENCE_TRAIN = "data/preference/train.jsonl.gz"
PREFERENCE_EVAL = "data/preference/eval.jsonl.gz"

# The (train, eval) files of each form of data.
DATA = {
    "next_token": (TEXT_TRAIN, TEXT_EVAL),
    "sft": (SFT_TRAIN, SFT_EVAL),
    "messages": (MESSAGES_TRAIN, MESSAGES_EVAL),
    "preference": (PREFERENCE_TRAIN, PREFERENCE_EVAL),
}

SIZE_LIMIT_BYTES = 8 * 2**20  # of all assets together: a clone stays small


def asset_path(name: str) -> pathlib.Path:
    """The path of the embedded file or directory `name` (a constant of this module).

    Raises:
        ValueError: the package holds no asset of that name.
    """
    root = pathlib.Path(str(importlib.resources.files(__package__)))
    path = root / name
    if not path.exists():
        names = [MODEL, TOKENIZER, *(file for pair in DATA.values() for file in pair)]
        raise ValueError(
            f"asset {name!r} is not in {root}: use one of {names}, or rebuild them "
            "with `python -m tests.embedded.build`"
        )
    return path
