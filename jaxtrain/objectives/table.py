"""Training objectives: next token, the table of all objectives, and how to get one.

An objective is a pure function of token log-probs. It takes the policy and the
reference as closures (`LogProbsFn`) and a batch, and returns the loss and the metrics
as `WeightedSum`s. It never sees the vocabulary axis, a parameter or the mesh.

To add one: write the function, list it in `_ALL`, declare its options and its row in
`options.py`, and test it. One of your own needs no edit here: see `load_objective`.
"""

import functools
from collections.abc import Callable
from typing import Any

from jaxtrain.config.own_parts import load_own
from jaxtrain.objectives import preference as pairs
from jaxtrain.objectives.kto import kto
from jaxtrain.objectives.options import (
    OBJECTIVES,
    Options,
    make_options,
    unknown_objective,
)
from jaxtrain.objectives.preference import count_tokens, masked_sum, real_rows
from jaxtrain.record.safe_text import shown
from jaxtrain.types import Batch, LogProbsFn, Metrics, Objective, WeightedSum


def next_token(
    policy: LogProbsFn,
    reference: LogProbsFn | None,
    batch: Batch,
    options: Options | None = None,
) -> tuple[WeightedSum, Metrics]:
    """Mean negative log-likelihood of the targets: -sum m log p / sum m, m the mask.

    Sums and counts leave here undivided, so the mean is over all tokens of the global
    batch, whatever the accumulation or the mesh. Perplexity is exp of it.
    """
    del reference, options
    scored, mask = policy(batch), batch.loss_mask
    metrics = {
        "mean_token_accuracy": masked_sum(scored.correct, mask),
        "entropy": masked_sum(scored.entropy, mask),
        "num_tokens": count_tokens(real_rows(batch), batch),
    }
    if scored.total is not None:
        return WeightedSum(-scored.total, mask.sum()), metrics
    return masked_sum(-scored.logps, mask), metrics


# --- the table --------------------------------------------------------------------

_ALL = (next_token, pairs.preference, pairs.orpo, pairs.cpo, pairs.simpo, kto)
FUNCTIONS: dict[str, Callable[..., tuple[WeightedSum, Metrics]]] = {
    function.__name__: function for function in _ALL
}
if unmatched := FUNCTIONS.keys() ^ OBJECTIVES.keys():
    raise ImportError(
        f"{sorted(unmatched)}: an objective needs a row in options.OBJECTIVES and a"
        " function in table.FUNCTIONS; add what is missing"
    )


def make_objective(name: str, **hyperparameters: Any) -> Objective:
    """Bind checked options to the objective `name` of `OBJECTIVES`.

    `name` may also be `module:function`, see `load_objective`; its hyperparameters are
    bound unchecked.

    Raises:
        ValueError: an unknown name, or a line for each hyperparameter that is unknown
            or cannot work, alone or together with others.
    """
    if ":" in name:
        return functools.partial(load_objective(name), **hyperparameters)
    if name not in OBJECTIVES:
        raise ValueError(f"objective = {shown(name)}: {unknown_objective(name)}")
    options, problems = make_options(OBJECTIVES[name].options, hyperparameters)
    if problems:
        raise ValueError("\n".join(line for _, line in problems))
    return functools.partial(FUNCTIONS[name], options=options)


def load_objective(path: str) -> Callable[..., tuple[WeightedSum, Metrics]]:
    """Import an objective of your own from `module:function`.

    The module must be importable: installed, or in the working directory or on
    PYTHONPATH. The function has the signature of `next_token` and is traced by jax, so
    it must be pure; its keyword arguments are its hyperparameters. For example, in
    `my_losses.py`:

        def focal(policy, reference, batch, *, gamma=2.0):
            logps = policy(batch).logps
            losses = -((1 - jnp.exp(logps)) ** gamma) * logps * batch.loss_mask
            return WeightedSum(losses.sum(), batch.loss_mask.sum()), {}

    and `make_objective("my_losses:focal", gamma=1.0)`.

    Raises:
        ValueError: no such module or function, or it is not callable.
    """
    return load_own("training.objective", path)
