"""Sample outputs for a page: those of some evaluations, long texts cut."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

_MOST_EVALUATIONS = 60
_MOST_SAMPLES = 20  # of an evaluation
_MOST_CHARACTERS = 2000  # of a text


def choose_samples(
    lines: Sequence[Mapping[str, Any]], best_step: int | None, most_bytes: int
) -> list[dict[str, Any]]:
    """Choose evenly spaced evaluations, including the first, the best and the last.

    Args:
        lines: the records of samples.jsonl.
        best_step: the step of the best evaluation, or None.
        most_bytes: about how many bytes the samples may take in the page.
    """
    count = min(len(lines), _MOST_EVALUATIONS)
    while True:
        chosen = [_split(lines[at]) for at in _spread(lines, count, best_step)]
        if count <= 1 or size_in_page(chosen) <= most_bytes:
            return chosen
        count = count * 2 // 3


def size_in_page(value: Any) -> int:
    """Bytes of a value as the page holds it."""
    return len(json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").encode())


def _spread(
    lines: Sequence[Mapping[str, Any]], count: int, best_step: int | None
) -> list[int]:
    """Indices of about `count` evenly spaced lines; only the last one if count <= 1."""
    if count <= 1:
        return [len(lines) - 1] if lines else []
    kept = {round(i * (len(lines) - 1) / (count - 1)) for i in range(count)}
    kept |= {at for at, line in enumerate(lines) if line["step"] == best_step}
    return sorted(kept)


def _split(line: Mapping[str, Any]) -> dict[str, Any]:
    """{"sample_1/prompt": ...} -> {"step": ..., "texts": [{"prompt": ...}]}."""
    texts: dict[str, dict[str, str]] = {}
    for name, text in line.items():
        if name in ("step", "time"):
            continue
        sample, _, part = name.rpartition("/")
        texts.setdefault(sample or name, {})[part if sample else "output"] = _cut(text)
    return {"step": line["step"], "texts": list(texts.values())[:_MOST_SAMPLES]}


def _cut(text: Any) -> str:
    whole = str(text)
    if len(whole) <= _MOST_CHARACTERS:
        return whole
    left_out = len(whole) - _MOST_CHARACTERS
    return f"{whole[:_MOST_CHARACTERS]} [{left_out:,} more characters]"
