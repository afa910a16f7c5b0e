"""Rows that are token ids already, as TRL's SFTTrainer takes them.

`input_ids`, and where not every token is to be trained either `labels` (-100 on what is
not) or `completion_mask` and `assistant_masks` (1 on what is). Unlike there, padding
that an `attention_mask` tells of is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.rows.formats import IDS, MASKS, PADDING, BadRow, shown

_IGNORED = -100  # PyTorch's label of a token that has no loss


def read_tokens(
    row: Mapping[str, Any], *, completion_only: bool, highest_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids and a bool mask of those to train, of a canonical row.

    Labels alone decide where they are given; else a token is trained that every mask
    has.

    Args:
        completion_only: whether `completion_mask` counts.
        highest_id: of the tokenizer.

    Raises:
        BadRow: an id that is none, columns of several lengths, a label that is another
            token than the one it stands for, or padding within a text.
    """
    ids = _integers(row[IDS], IDS)
    if not len(ids):
        raise BadRow(f"{IDS} is empty")
    outside = (ids < 0) | (ids > highest_id)
    if outside.any():
        where = int(np.argmax(outside))
        raise BadRow(
            f"{IDS}[{where}] is {ids[where]}, which is no token: the tokenizer's go "
            f"from 0 to {highest_id}"
        )
    trained = np.ones(len(ids), bool)
    if row.get("labels") is not None:
        trained = _read_labels(row["labels"], ids)
    else:
        for name in MASKS:
            counts = completion_only or name != "completion_mask"
            if row.get(name) is not None and counts:
                trained &= _read_mask(row[name], name, len(ids))
    text = slice(None)
    if row.get(PADDING) is not None:
        text = _find_text(_read_mask(row[PADDING], PADDING, len(ids)))
    return ids[text].astype(np.int32), trained[text]


def _find_text(attended: np.ndarray) -> slice:
    """Where the tokens between the padding on both sides are."""
    places = np.flatnonzero(attended)
    if not len(places):
        raise BadRow(f"{PADDING} is 0 throughout: the row is padding alone")
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 > len(places):
        raise BadRow(
            f"{PADDING} is 0 between tokens, behind {IDS}[{first}], and only padding"
            " before or behind a text can be left out: take these tokens out"
        )
    return slice(first, last + 1)


def _read_labels(value: Any, ids: np.ndarray) -> np.ndarray:
    labels = _integers(value, "labels")
    _check_length(labels, "labels", len(ids))
    trained = labels != _IGNORED
    other = trained & (labels != ids)
    if other.any():
        where = int(np.argmax(other))
        raise BadRow(
            f"labels[{where}] is {labels[where]}, but {IDS}[{where}] is {ids[where]}: "
            f"a label is the token itself, or {_IGNORED} where it is not trained"
        )
    return trained


def _read_mask(value: Any, name: str, length: int) -> np.ndarray:
    mask = np.asarray(value)
    if mask.dtype != bool:
        mask = _integers(value, name)
        if not np.isin(mask, (0, 1)).all():
            raise BadRow(f"{name} may hold only 0 and 1")
    _check_length(mask, name, length)
    return mask.astype(bool)


def _check_length(values: np.ndarray, name: str, length: int) -> None:
    if len(values) != length:
        raise BadRow(f"{name} has {len(values)} numbers, {IDS} has {length}")


def _integers(value: Any, name: str) -> np.ndarray:
    """int64[numbers] of a list of integers."""
    bad = BadRow(f"{name} is {shown(value)}, expected a list of integers")
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise bad
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):  # a list of lists of several lengths
        raise bad from None
    if found.size == 0 and found.ndim == 1:
        return np.zeros(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise bad
    return found.astype(np.int64)
