"""The model that a run names, all of it but its weights.

That is its directory, its sizes, its tokenizer, and the special tokens and settings of
generation that these agree on.
"""

import dataclasses
import functools
import logging
from typing import Any

from jaxtrain import assets
from jaxtrain.config import RunConfig
from jaxtrain.data.loading import load_run_tokenizer
from jaxtrain.models import bucket, hf
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.ends import fit_ends
from jaxtrain.models.families import FAMILIES
from jaxtrain.models.generation_config import GenerationConfig, read_generation_config
from jaxtrain.models.special_tokens import align_special_tokens
from jaxtrain.models.vocabulary import fit_vocabulary

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """What `run.model` names.

    `directory` is the local Hugging Face directory, or None for a model of sizes of our
    own. `config` is the model as it is trained, and `stored` as the directory has it,
    perhaps with fewer rows in its vocabulary or with a tied head. `tokenizer` is None
    where only sizes were asked.
    """

    directory: str | None
    config: ModelConfig
    stored: ModelConfig
    tokenizer: Any = None
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)


def read_source(run: RunConfig, *, needs_weights: bool = True) -> ModelSource:
    """Read the model that a run names; its files are checked, its weights not loaded.

    Args:
        needs_weights: whether a directory must have weights. They are looked at where
            it has them: whether they fit, and whether the head is the embedding.

    Raises:
        ValueError: the directory or the tokenizer can't be used; a line for each
            problem.
    """
    directory, is_new = _directory(run), run.training_type == "from_scratch"
    if directory is None:
        tokenizer = load_run_tokenizer(run)
        config = _own_sizes(run, tokenizer)
    else:
        looks = not is_new and (needs_weights or hf.has_weights(directory))
        with bucket.named_as_given(directory):
            tokenizer, config = hf.read_directory(
                directory,
                functools.partial(load_run_tokenizer, run, directory),
                own_tokenizer=not run.model.tokenizer_name_or_path,
                weights=looks,
            )
    stored = _stretch(run, config)
    config = fit_vocabulary(run, fit_ends(run, stored), tokenizer)
    config, generation = align_special_tokens(config, read_generation(run), tokenizer)
    return ModelSource(directory, config, stored, tokenizer, generation)


def read_sizes(run: RunConfig) -> ModelSource:
    """Read the sizes of the model that a run names, and nothing of its weights.

    From a directory it reads config.json, and the tokenizer if `model.grow_vocabulary`
    needs its number of tokens.

    Raises:
        ValueError: the directory's config.json or the run's sizes can't be used.
    """
    directory, tokenizer = _directory(run), None
    if directory is None or run.model.grow_vocabulary:
        tokenizer = load_run_tokenizer(run, directory)
    stored = (
        _own_sizes(run, tokenizer) if directory is None else hf.load_config(directory)
    )
    stored = _stretch(run, stored)
    config = fit_ends(run, stored)
    if tokenizer is not None:
        config = fit_vocabulary(run, config, tokenizer)
    return ModelSource(directory, config, stored)


def read_generation(run: RunConfig) -> GenerationConfig:
    """The generation_config.json of the model that a run names; empty without one.

    Raises:
        ValueError: it can't be used.
    """
    # From scratch, a directory gives its sizes and its tokenizer only.
    is_new = run.training_type == "from_scratch"
    return read_generation_config(None if is_new else _directory(run))


def _directory(run: RunConfig) -> str | None:
    """The local directory of the model named; None: one of our own sizes."""
    if named := run.model.name_or_path:
        return str(hf.resolve_model_path(named, revision=run.model.revision))
    scratch = run.training_type == "from_scratch"
    return None if scratch else str(assets.asset_path(assets.MODEL))


def _own_sizes(run: RunConfig, tokenizer: Any) -> ModelConfig:
    """The sizes of `config.model.architecture`."""
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(run.model.architecture).items()
        if value is not None
    }
    family = FAMILIES[run.model.architecture.model_type]
    options[family.norm_eps_key] = options.pop("rms_norm_eps")
    options.setdefault("vocab_size", len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        options[name] = getattr(tokenizer, name)
    try:
        return ModelConfig.from_hf(options)
    except ValueError as error:
        raise ValueError(f"model.architecture: {error}") from error


def _stretch(run: RunConfig, config: ModelConfig) -> ModelConfig:
    """The config with `model.rope_scaling`, if that is set."""
    if run.model.rope_scaling is None:
        return config
    try:
        config = config.with_rope_scaling(run.model.rope_scaling)
    except ValueError as error:
        raise ValueError(f"model.rope_scaling: {error}") from error
    logger.info(
        "model.rope_scaling: rows may have %d tokens. The exported config.json"
        " says how; an adapter needs a base whose config.json says the same",
        config.longest_text,
    )
    return config
