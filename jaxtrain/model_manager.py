"""ModelManager: the documented way to load the model that a configuration names."""

from typing import Any

import jax

from jaxtrain.config import RunConfig, resolve
from jaxtrain.models.load import LoadedModel, load_model
from jaxtrain.run import compilation_cache

__all__ = ["LoadedModel", "ModelManager"]


class ModelManager:
    """Load the model and the tokenizer that a configuration names.

    `config` is a `ConfigManager`, a `ConfigDict` or a `RunConfig`.
    """

    def __init__(self, config: Any) -> None:
        self.run: RunConfig = resolve(config, device_count=jax.device_count())
        self.model: LoadedModel | None = None
        self.tokenizer: Any = None

    def load_model(self) -> LoadedModel:
        """Load `config.model` onto the mesh; afterwards `model` and `tokenizer` serve.

        Raises:
            ValueError: no such model or tokenizer, or one that can't be trained here.
        """
        compilation_cache.set_up(self.run.compilation_cache)
        self.model = load_model(self.run)
        self.tokenizer = self.model.tokenizer
        return self.model
