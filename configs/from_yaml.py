"""Train as a YAML file says, over the defaults of base.py.

    python -m jaxtrain.main --config=configs/from_yaml.py:run.yaml --workdir=out/run

The same as `jaxtrain train run.yaml --workdir=out/run`.

The file has a section `training`, and `model`, `data` and `mesh` if it likes, with the
keys of base.py. A flag always wins over it: `--training.learning_rate=1e-4`.
"""

from ml_collections import ConfigDict

from jaxtrain.config import load_yaml


def get_config(path: str) -> ConfigDict:
    return load_yaml(path)
