"""Parts of the user's own, imported and called before a model loads."""

import pathlib

from jaxtrain.config import RunConfig
from jaxtrain.config.own_parts import bind_own
from jaxtrain.optimizers.configured import make_optimizer
from jaxtrain.run.callbacks import make_callbacks
from jaxtrain.run.row_metrics import load_row_metrics
from jaxtrain.run.sampler import check_metrics


def check_own_parts(run: RunConfig) -> None:
    """Refuse text metrics and parts of the user's own that cannot be had.

    Raises:
        ValueError: names the key.
    """
    check_metrics(run)
    load_row_metrics(run)
    make_callbacks(run.loop, pathlib.Path())
    make_optimizer(run, total_steps=1000)
    if run.data.format_row:
        bind_own(
            "data.format_row", run.data.format_row, run.loop.function_kwargs, "row"
        )
