"""DPOTrainer: the orchestrator with the preference objective and a model at hand."""

import os
from typing import Any

from jaxtrain.config import eval_sets
from jaxtrain.data.loading import AnyRows as Rows
from jaxtrain.models.load import LoadedModel
from jaxtrain.models.special_tokens import with_tokenizer
from jaxtrain.run.feed import Prepared
from jaxtrain.trainer import EvalRows, TrainingOrchestrator


class DPOTrainer(TrainingOrchestrator):
    """Direct preference optimization (arXiv:2305.18290) of a loaded model."""

    def __init__(
        self,
        model: LoadedModel | str | os.PathLike[str],
        tokenizer: Any = None,
        config: Any = None,
        *,
        workdir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Prepare to train `model` on preferences.

        Args:
            model: a `ModelManager`'s model, a local directory or a hub name. Its
                weights become the policy; the reference is a copy of them, or under
                LoRA they themselves.
            tokenizer: in place of the model's own.
            config: see `TrainingOrchestrator`; `training_type` is dpo whatever it says.

        Raises:
            ValueError: the configuration or the model cannot be trained.
        """
        super().__init__(config, workdir=workdir)
        if isinstance(model, LoadedModel):
            self.prepare("dpo", model=model)
        else:
            self.prepare("dpo", os.fspath(model))
        if tokenizer is not None:
            assert self.model is not None  # `prepare` has set it
            self.model = with_tokenizer(self.model, tokenizer)

    def prepare_dataset(
        self, preference_data: Rows | str | os.PathLike[str]
    ) -> Prepared:
        """Check and tokenize preference rows: `{"prompt", "chosen", "rejected"}`.

        Args:
            preference_data: rows, a `datasets.Dataset`, or a path.

        Raises:
            ValueError: bad rows, each by its number and reason.
        """
        if isinstance(preference_data, str | os.PathLike):
            preference_data = self.load_training_data(preference_data)
        return self.prepare_rows(preference_data)

    def train(
        self,
        train_dataset: Rows | Prepared | None = None,
        eval_dataset: EvalRows | None = None,
    ) -> dict[str, Any]:
        """As the orchestrator's; the results have `reward_margin` and `accuracy` too.

        Both are those of the last evaluation, of its first set where there are several,
        or of the last steps if there was none.
        """
        results = super().train(train_dataset, eval_dataset)
        evaluated = eval_sets.prefix_of(eval_sets.names_in(results)[0])
        for name, metric in (
            ("reward_margin", "rewards/margins"),
            ("accuracy", "rewards/accuracies"),
        ):
            results[name] = results.get(f"{evaluated}{metric}", results.get(metric))
        return results
