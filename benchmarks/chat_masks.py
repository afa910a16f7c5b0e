"""CPU time of tokens and assistant masks of conversations, against TRL, in one run.

    python benchmarks/chat_masks.py [folder of a tokenizer]

The template is TRL's copy of Qwen2.5's, which has no `{% generation %}`: TRL swaps in
its own that has. "beginnings" renders every beginning of a conversation, the way that
is left for templates whose turns cannot be told otherwise. Prints microseconds a token,
the best of several passes, on one thread.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import trl
from transformers import AutoTokenizer
from trl.chat_template_utils import get_training_chat_template

from jaxtrain import assets
from jaxtrain.data.rows import template

SAID = "The quick brown fox jumps over the lazy dog, and the dog does not mind. "
PASSES = 5

Row = list[dict[str, Any]]


def conversation(turns: int) -> Row:
    roles = ("user", "assistant") * turns
    return [
        {"role": role, "content": f"{i}: " + SAID * (1 + i % 4)}
        for i, role in enumerate(roles)
    ]


def microseconds_per_token(
    encode: Callable[[Row], list[int]], rows: Sequence[Row]
) -> float:
    best = float("inf")
    for _ in range(PASSES):
        start = time.process_time()
        tokens = sum(len(encode(row)) for row in rows)
        best = min(best, (time.process_time() - start) / tokens)
    return best * 1e6


def main(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    templates = pathlib.Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen2_5.jinja").read_text()
    patched = get_training_chat_template(tokenizer)
    print(f"{'turns':>5} {'ours':>7} {'beginnings':>11} {'TRL':>7} {'ours / TRL':>11}")
    offsets = {"return_offsets_mapping": True, "verbose": False}
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    for turns in (4, 16, 64):
        # As many rows as make the clock's steps small.
        rows = [conversation(turns)] * max(1, 256 // turns)

        def ours(row: Row) -> list[int]:
            text, spans = template.render_with_spans(tokenizer, row, {})
            encoded = tokenizer(text, add_special_tokens=False, **offsets)
            template.mask_assistant(encoded["offset_mapping"], spans)
            return encoded["input_ids"]

        def theirs(row: Row) -> list[int]:
            encode = tokenizer.apply_chat_template
            return list(encode(row, chat_template=patched, **options)["input_ids"])

        assert ours(rows[0]) == theirs(rows[0])
        linear = microseconds_per_token(ours, rows)
        trls = microseconds_per_token(theirs, rows)
        find, template.find_assistant_spans = template.find_assistant_spans, _unsure
        beginnings = microseconds_per_token(ours, rows)
        template.find_assistant_spans = find
        print(
            f"{turns:5} {linear:7.2f} {beginnings:11.2f} {trls:7.2f}"
            f" {linear / trls:11.2f}"
        )


def _unsure(*_: Any) -> None:
    """In place of the linear way: leaves every conversation to its beginnings."""


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else str(assets.asset_path(assets.TOKENIZER)))
