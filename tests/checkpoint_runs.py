"""The runs behind `tests/checkpoints`: one tiny run of each training type.

Only what users may rely on is imported here, `default_config` and
`TrainingOrchestrator`, so the same file drives any version of the package. The configs
and rows are part of the stored checkpoints: whoever changes them makes those again
(`make_checkpoints.py`).
"""

import pathlib
from typing import Any

from jaxtrain.config import default_config
from jaxtrain.trainer import TrainingOrchestrator

TYPES = ("from_scratch", "sft", "lora", "dpo")
STEPS = 9
# Saved here, the runs are stored unfinished: in their second epoch, and after float16's
# loss scale has come down far enough for the first updates.
SAVED_STEP = 6
FOLDER = pathlib.Path(__file__).resolve().parent / "checkpoints"
MODEL = FOLDER / "tiny_model"

_SUBJECTS = ("the cat", "a small dog", "my old friend", "the red bird", "one fish")
_VERBS = ("sees", "likes", "does not find", "runs to")
_OBJECTS = ("the house", "a tree", "rain", "the long river", "bread", "you", "it all")


def make_config(training_type: str, model: str | pathlib.Path = MODEL) -> Any:
    """The config of a run of `STEPS` steps; all together use every part of the state.

    Args:
        model: the folder of the tiny model, from which fine-tuning starts.
    """
    config = default_config()
    training = config.training
    training.training_type = training_type
    training.num_gpus = 1
    training.bf16 = False
    training.learning_rate = 1e-2
    training.per_device_train_batch_size = 2
    training.per_device_eval_batch_size = 2
    training.gradient_accumulation_steps = 2
    training.max_steps = STEPS
    training.save_steps = SAVED_STEP
    training.logging_steps = 1
    training.eval_steps = 2
    training.report_to = ("jsonl",)
    config.data.max_length = 32
    config.data.cache = False
    if training_type == "from_scratch":
        config.model.tokenizer_name_or_path = str(model)
        sizes = config.model.architecture
        sizes.vocab_size = 40
        sizes.hidden_size, sizes.intermediate_size = 4, 8
        sizes.num_hidden_layers = 2
        sizes.num_attention_heads, sizes.num_key_value_heads = 2, 1
        training.spike_threshold, training.spike_window = 50.0, 4
    else:
        config.model.name_or_path = str(model)
    if training_type == "sft":
        training.fp16 = True
    if training_type == "lora":
        training.lora.r, training.lora.lora_alpha = 2, 4
        training.lora.lora_dropout = 0.1
        training.lora.target_modules = ("q_proj", "down_proj")
        training.lora.modules_to_save = ("lm_head",)
    if training_type == "dpo":
        training.bf16 = True  # of which the reference's weights are
        training.dpo.sync_ref_model = True
        training.dpo.ref_model_sync_steps = 2
    return config


def make_rows(training_type: str, number: int, start: int = 0) -> list[dict[str, str]]:
    """So many rows of the kind that a training type takes; no two are alike."""

    def sentence(i: int) -> tuple[str, str]:
        subject = _SUBJECTS[i % len(_SUBJECTS)]
        return subject, f" {_VERBS[i % len(_VERBS)]} {_OBJECTS[i % len(_OBJECTS)]}."

    rows = []
    for i in range(start, start + number):
        prompt, completion = sentence(i)
        if training_type == "from_scratch":
            rows.append({"text": prompt + completion})
        elif training_type == "dpo":
            worse = sentence(i + 1)[1]
            rows.append({"prompt": prompt, "chosen": completion, "rejected": worse})
        else:
            rows.append({"prompt": prompt, "completion": completion})
    return rows


def make_datasets(training_type: str) -> dict[str, list[dict[str, str]]]:
    """The arguments of `TrainingOrchestrator.train`; more than one epoch is trained."""
    return {
        "train_dataset": make_rows(training_type, 18),
        "eval_dataset": make_rows(training_type, 4, start=100),
    }


def train(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Prepare and train, or train on, by the public interface; the results."""
    orchestrator = TrainingOrchestrator(config, workdir=workdir)
    orchestrator.prepare()
    return orchestrator.train(**make_datasets(config.training.training_type))
