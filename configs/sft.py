"""Fine-tune the embedded model on prompts and completions; only completions count.

    jaxtrain train sft --workdir=out/sft

A few minutes on two CPU cores, no network. Another model and other data:

    --model.name_or_path=Qwen/Qwen2.5-0.5B --data.train=train.jsonl
"""

from ml_collections import ConfigDict

from jaxtrain.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    config.data.max_length = 192

    config.training.training_type = "sft"
    config.training.max_steps = 120
    config.training.per_device_train_batch_size = 16
    config.training.per_device_eval_batch_size = 16
    config.training.learning_rate = 1e-3  # for a million parameters
    config.training.lr_scheduler_type = "cosine"
    config.training.warmup_ratio = 0.1
    config.training.bf16 = False  # CPUs compute float32 faster
    config.training.eval_steps = 40
    config.training.save_steps = 40
    config.training.eval_on_start = True
    return config
