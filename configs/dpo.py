"""Teach the embedded model to prefer true continuations (DPO, arXiv:2305.18290).

    jaxtrain train dpo --workdir=out/dpo

A few minutes on two CPU cores, no network. `eval_rewards/accuracies` rises above 0.8;
chance is 0.5. Another tie to the reference: `--training.dpo.beta=0.2`.
"""

from ml_collections import ConfigDict

from jaxtrain.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    config.training.training_type = "dpo"
    config.training.dpo.max_length = 128
    config.training.dpo.max_prompt_length = 96
    config.training.max_steps = 80
    config.training.per_device_train_batch_size = 16
    config.training.per_device_eval_batch_size = 32
    config.training.learning_rate = 1e-3  # for a million parameters
    config.training.warmup_steps = 8
    config.training.bf16 = False  # CPUs compute float32 faster
    config.training.logging_steps = 5
    config.training.eval_steps = 20
    config.training.save_steps = 40
    config.training.eval_on_start = True
    config.training.metric_for_best_model = "eval_rewards/accuracies"
    return config
