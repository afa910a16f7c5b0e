"""JSON values of a record, and what the processes of a run tell each other."""

import json
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_T = TypeVar("_T")


def as_json(name: str, value: _T) -> _T:
    """`value` as JSON gives it back (tuples become lists).

    Raises:
        ValueError: it has no JSON form.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} has no JSON form ({error}): use dicts, lists, strings, numbers, "
            "booleans and None"
        ) from error


def as_exact_json(name: str, value: _T) -> _T:
    """`value`, refused if JSON would give back something else, such as a list.

    Raises:
        ValueError: it would.
    """
    if as_json(name, value) != value:
        raise ValueError(
            f"{name} changes when it is written as JSON (tuples become lists, integer "
            "keys strings): use lists and string keys"
        )
    return value


def gather(value: Any) -> list[Any]:
    """The JSON value of every process, in process order."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    padded = np.frombuffer(text.ljust(longest), np.uint8)  # JSON ends in no space
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row.tobytes()) for row in rows]
