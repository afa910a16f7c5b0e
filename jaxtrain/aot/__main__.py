"""Compile the real train step for chips that are not there: what it needs, if it fits.

    jaxtrain aot dpo --topology=v5e:4x4 --model=configs/shapes/qwen2.5-3b

`--search` tries mesh shapes, rematerialization and batch sizes in place of the
config's. Needs `jax[tpu]` (it brings libtpu, the compiler) and no TPU, for `h200:8`
jax's CUDA plugin and no GPU; of a model its config.json is enough. Exits with 3 where
the step does not fit. `python -m jaxtrain.aot --config=...` is the same.
"""

import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxtrain.cli.command import ConfigParser
from jaxtrain.cli.ending import run_command

DOES_NOT_FIT = 3
_MOST_COMPILES = 12


def main(arguments: Sequence[str]) -> int:
    """Compile, print, and return 0, or 3 where it does not fit.

    Raises:
        ValueError: the configuration, the model, or the topology.
    """
    assert __doc__ is not None
    parser = ConfigParser("aot", __doc__)
    parser.add_argument("--topology", required=True, help="such as v5e:4x4 or h200:8")
    parser.add_argument(
        "--num_slices", type=int, default=1, help="slices of this topology"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try mesh shapes, rematerialization and rows; print the best",
    )
    parser.add_argument(
        "--max_compiles",
        type=int,
        help=f"at most, of --search (default: {_MOST_COMPILES})",
    )
    options, config, _ = parser.read(arguments)
    most = options.max_compiles
    if most is not None and not options.search:
        parser.error("--max_compiles: only --search has such a limit; add --search")
    if most is not None and most < 1:
        parser.error(f"--max_compiles={most}: give 1 or more")
    # Only now: what is wrong with a flag need not wait for jax.
    from jaxtrain.aot import compile_for, describe_devices
    from jaxtrain.aot.report import describe

    topology = options.topology
    devices = describe_devices(topology, options.num_slices)
    if options.search:
        limits = (options.num_slices, most or _MOST_COMPILES)
        return _search(config, devices, topology, limits)
    report = compile_for(config, devices, topology)
    print(describe(report))
    return 0 if report.fits else DOES_NOT_FIT


def _search(
    config: ConfigDict, devices: Sequence[Any], topology: str, limits: tuple[int, int]
) -> int:
    """Print what was tried and the best; `limits` are num_slices and max_compiles."""
    from jaxtrain.aot import search, search_settings
    from jaxtrain.aot.report import CHIPS

    num_slices, most = limits
    outcomes, best = search_settings(
        config, devices, topology, num_slices=num_slices, max_compiles=most
    )
    memory = CHIPS[devices[0].device_kind].memory_bytes
    print(search.format_table(outcomes, memory))
    if best is None:
        print("NOTHING FITS")
        return DOES_NOT_FIT
    flags = search.as_flags(best.candidate)
    print("BEST:", " ".join(f"--{key}={value}" for key, value in flags.items()))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
