"""Evaluation sets by name: which names they may have, and how their metrics are called.

A single set without a name has the metrics `eval_loss`, `eval_perplexity` and so on.
Of several sets each puts its own name before them, as in the Hugging Face Trainer:
`eval_helpful_loss`, `eval_safe_loss`.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from jaxtrain.record.safe_text import shown

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_LOSS = "_loss"
DEFAULT_METRIC = "eval_loss"


def by_name(sets: _T | Mapping[str, _T] | None) -> dict[str, _T]:
    """The sets by their names: {} of None, and a single one under the name ""."""
    if sets is None:
        return {}
    return dict(sets) if isinstance(sets, Mapping) else {"": sets}


def prefix_of(name: str) -> str:
    """What stands before a set's metrics: `eval_helpful_`; of one alone `eval_`."""
    return f"eval_{name}_" if name else "eval_"


def key_of(name: str) -> str:
    """The key of a set: `data.eval.helpful`; of one alone `data.eval`."""
    return f"data.eval.{name}" if name else "data.eval"


def find_problem(names: Collection[object]) -> str | None:
    """What is wrong with the names of several sets, and what to do; None: nothing."""
    if not names:
        return "it names no set; give at least one as name: path"
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return (
                f"{shown(name)} is not a valid name of an evaluation set; use letters,"
                " digits, _ and -, beginning with a letter"
            )
    for one, other in itertools.permutations(map(str, names), 2):
        if other.startswith(f"{one}_") or one.lower() == other.lower():
            return (
                f"the metrics of {shown(one)} and {shown(other)} could not be told"
                " apart; rename one of them"
            )
    return None


def names_in(metrics: Collection[str]) -> list[str]:
    """The sets that the metrics of one evaluation are of; [""] of one without a name.

    Each set has a loss, and no name begins with another one and an underscore.
    """
    if DEFAULT_METRIC in metrics:
        return [""]
    losses = (name for name in metrics if name.startswith("eval_"))
    found = [
        name.removeprefix("eval_").removesuffix(_LOSS)
        for name in losses
        if name.endswith(_LOSS)
    ]
    return [
        name
        for name in found
        if not any(name.startswith(f"{other}_") for other in found)
    ] or [""]


def plain_name(metric: str, names: Iterable[str]) -> str:
    """A metric without `eval_` and the name of its set: `loss`, for any set's loss."""
    for name in names:
        if metric.startswith(prefix_of(name)):
            return metric.removeprefix(prefix_of(name))
    return metric.removeprefix("eval_")


def choose_metric(metric: str, names: Collection[str], *, decides: bool) -> str:
    """The metric to rank evaluations by, where the sets are these.

    Args:
        metric: `training.metric_for_best_model`, with `eval_` before it.
        decides: whether an early stop or the exported model depends on it. Else the
            first set's loss takes the place of the default, which is no set's.

    Raises:
        ValueError: it is the metric of no set; "problem; fix", without the key.
    """
    if names == [""] or any(
        metric.startswith(prefix_of(name)) for name in names if name
    ):
        return metric
    first = f"{prefix_of(next(iter(names)))}loss"
    if metric == DEFAULT_METRIC and not decides:
        return first
    raise ValueError(
        f"it is not a metric of the evaluation sets {', '.join(names)}; set one of"
        f" theirs, such as {shown(first)}"
    )
