"""Parts of the user's own, imported and called before a model loads."""

import pathlib

import jax

from jaxtrain.config import RunConfig
from jaxtrain.config.own_parts import bind_own
from jaxtrain.models.load import load_abstract_model
from jaxtrain.models.state import abstract_state
from jaxtrain.optimizers.configured import make_optimizer
from jaxtrain.run.callbacks import make_callbacks
from jaxtrain.run.row_metrics import load_row_metrics
from jaxtrain.run.sampler import check_metrics


def check_own_parts(run: RunConfig, *, loads_model: bool = True) -> None:
    """Refuse text metrics and parts of the user's own that cannot be had.

    Args:
        loads_model: whether `run.model` is to be loaded. If a program brings a loaded
            model, the patterns of `lr_multipliers` are checked against its weights
            when the optimizer starts.

    Raises:
        ValueError: names the key.
    """
    check_metrics(run)
    load_row_metrics(run)
    make_callbacks(run.loop, pathlib.Path())
    _, optimizer = make_optimizer(run, total_steps=1000)
    if run.optimizer.lr_multipliers and loads_model:
        # The optimizer compares its patterns with the names of what trains, for which
        # the sizes in config.json are enough.
        model = load_abstract_model(run, jax.devices())
        abstract_state(model, run, optimizer)
    if run.data.format_row:
        bind_own(
            "data.format_row", run.data.format_row, run.loop.function_kwargs, "row"
        )
