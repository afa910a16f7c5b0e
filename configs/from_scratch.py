"""Train a small model from random weights on the embedded text.

    jaxtrain train from_scratch --workdir=out/from_scratch

The sizes are those of `model.architecture` in base.py: about a million parameters, a
few minutes on two CPU cores, no network. Your own text: `--data.train=FILE`.

`--model=NAME` gives the sizes and the tokenizer of another model, not its weights: to
go on from these, train `sft`, on plain text too.
"""

from ml_collections import ConfigDict

from jaxtrain.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    config.model.architecture.model_type = "qwen3"
    config.model.architecture.head_dim = 32
    config.data.max_length = 256

    config.training.training_type = "from_scratch"
    config.training.max_steps = 300
    config.training.per_device_train_batch_size = 8
    config.training.per_device_eval_batch_size = 16
    config.training.learning_rate = 6e-3  # small models bear large steps
    config.training.warmup_ratio = 0.1
    config.training.bf16 = False  # CPUs compute float32 faster
    config.training.eval_steps = 100
    config.training.save_steps = 100
    config.training.eval_on_start = True
    return config
