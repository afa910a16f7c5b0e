"""Rows and feed as a model's attention wants them."""

import logging
from collections.abc import Mapping

from jaxtrain.config import RunConfig
from jaxtrain.data.batches import shared_prompt
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.stream.batches import StreamDataset
from jaxtrain.models.load import LoadedModel
from jaxtrain.models.transformer import Decoder
from jaxtrain.objectives.options import OBJECTIVES
from jaxtrain.run.feed import Feed, Prepared

logger = logging.getLogger(__name__)


def make_feed(run: RunConfig, model: LoadedModel) -> Feed:
    """The feed of a run, with rows that suit the model's attention."""
    long_rows = model.decoder.skips_blocks(run.data.max_length)
    row = OBJECTIVES.get(run.objective)
    reads_trained = row is not None and not row.scores_prompts
    # Nobody knows what a loss of one's own reads.
    reads_trained = reads_trained and not run.loop.use_auxiliary_loss
    selects = reads_trained and model.plan.mesh.shape["context"] == 1
    return Feed(run, model.plan, long_rows, selects)


def fit_to_model(
    rows: tuple[Prepared, Mapping[str, PreparedDataset]], decoder: Decoder
) -> tuple[Prepared, dict[str, PreparedDataset]]:
    """The rows to train and to evaluate on, prompts shared only if the model can."""
    train, held_out = rows
    if not isinstance(train, StreamDataset):
        train = fit(train, decoder)
    elif train.options.share_prompts and _refuses(decoder, train.row_length):
        train = train.without_shared_prompts()
    return train, {name: fit(each, decoder) for name, each in held_out.items()}


def fit(data: PreparedDataset, decoder: Decoder) -> PreparedDataset:
    """These rows, prompts shared only if the model can."""
    if not data.shares_prompts:
        return data
    longest = int(shared_prompt.pair_lengths(data.stores).max())
    return data.without_shared_prompts() if _refuses(decoder, longest) else data


def _refuses(decoder: Decoder, longest: int) -> bool:
    """Whether the model cannot share the prompts of such pairs; the log says why."""
    why = decoder.why_no_shared_prompts(longest)
    if why is not None:
        logger.info("data.share_prompts: prompts are not shared, because %s", why)
    return why is not None
