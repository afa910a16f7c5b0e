"""Compile the real train step for chips that are not there: what it needs, if it fits.

    python -m jaxtrain.aot --config=configs/dpo.py --topology=v5e:4x4 \\
        --config.model.name_or_path=configs/shapes/qwen2.5-3b

`--search` tries mesh shapes, rematerialization and batch sizes in place of the
config's. Needs `jax[tpu]` (it brings libtpu, the compiler) and no TPU, for `h200:8`
jax's CUDA plugin and no GPU; of a model its config.json is enough. Exits with 3 where
the step does not fit.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from jaxtrain.aot import compile_for, describe_devices, search, search_settings
from jaxtrain.aot.report import CHIPS, describe

DOES_NOT_FIT = 3


def main(argv: list[str]) -> None:
    """Compile, print, and exit with 0, or with 3 where it does not fit."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config: ConfigDict = _CONFIG.value
    topology, num_slices = str(_TOPOLOGY.value), _NUM_SLICES.value
    try:
        devices = describe_devices(topology, num_slices)
        if _SEARCH.value:
            _search_and_exit(config, devices, topology, num_slices)
        report = compile_for(config, devices, topology)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(describe(report))
    sys.exit(0 if report.fits else DOES_NOT_FIT)


def _search_and_exit(
    config: ConfigDict, devices: Sequence[Any], topology: str, num_slices: int
) -> None:
    most = _MAX_COMPILES.value
    outcomes, best = search_settings(
        config, devices, topology, num_slices=num_slices, max_compiles=most
    )
    memory = CHIPS[devices[0].device_kind].memory_bytes
    print(search.format_table(outcomes, memory))
    if best is None:
        print("NOTHING FITS")
        sys.exit(DOES_NOT_FIT)
    flags = search.as_flags(best.candidate)
    print("BEST:", " ".join(f"--config.{key}={value}" for key, value in flags.items()))
    sys.exit(0)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Configuration file.", lock_config=True
    )
    _TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:4x4 or h200:8.")
    _NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of this topology.")
    _SEARCH = flags.DEFINE_bool(
        "search", False, "Try mesh shapes, rematerialization and rows; print the best."
    )
    _MAX_COMPILES = flags.DEFINE_integer("max_compiles", 12, "At most, of --search.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)
