"""Fine-tune adapters of the embedded model on prompts and completions.

    jaxtrain train lora --workdir=out/lora

A few minutes on two CPU cores, no network. `training.lora.enabled = True` does the
same to sft.py and dpo.py.
"""

from ml_collections import ConfigDict

from jaxtrain.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    config.data.max_length = 192

    config.training.training_type = "lora"
    config.training.lora.target_modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    config.training.max_steps = 120
    config.training.per_device_train_batch_size = 16
    config.training.per_device_eval_batch_size = 16
    config.training.learning_rate = 5e-3  # for a million parameters
    config.training.lr_scheduler_type = "cosine"
    config.training.warmup_ratio = 0.1
    config.training.bf16 = False  # CPUs compute float32 faster
    config.training.eval_steps = 40
    config.training.save_steps = 40
    config.training.eval_on_start = True
    return config
