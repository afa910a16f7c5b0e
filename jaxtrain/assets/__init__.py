"""The embedded default: a tokenizer, data and a small model that need no network.

Everything here is built by `python -m tests.embedded.build` from the public-domain
King James text. `asset_path` is the one way in: configs name an asset, not a path.
"""

import importlib.resources
import pathlib

MODEL = "model"
TOKENIZER = "tokenizer"

# The (train, eval) files of each form of data.
DATA = {
    form: (f"data/{folder}/train.jsonl.gz", f"data/{folder}/eval.jsonl.gz")
    for form, folder in (
        ("next_token", "text"),
        ("sft", "sft"),
        ("messages", "messages"),
        ("preference", "preference"),
    )
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
