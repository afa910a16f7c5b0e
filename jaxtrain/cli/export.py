"""`jaxtrain export`: any checkpoint of a run as a Hugging Face or PEFT directory."""

import dataclasses
import pathlib
from collections.abc import Sequence

from jaxtrain.cli.command import path_argument
from jaxtrain.cli.source import (
    COMPUTING,
    Source,
    SourceParser,
    check_acting,
    configure,
    prepare_devices,
)
from jaxtrain.config import RunConfig, resolve
from jaxtrain.config.flags import Flag, override
from jaxtrain.run.preflight import owner_of

_EXAMPLES = """\
Write a checkpoint of a run as a directory that transformers and PEFT load:

  jaxtrain export out/dpo                       its last step
  jaxtrain export out/dpo --step=20 --output=dpo-20 --dtype=bfloat16
  jaxtrain export out/lora --step=best --adapter

Neither training data nor the optimizer's state is read, and the run may go on training
meanwhile. Adapters are merged into their base, or written alone by --adapter."""


def main(arguments: Sequence[str]) -> None:
    """Write the directory, and print its path.

    Raises:
        ValueError: a flag, the run, or a directory that holds something already.
    """
    parser = SourceParser("export", _EXAMPLES, only_runs=True)
    add = parser.add_argument
    add(
        "--output",
        type=path_argument,
        metavar="DIR",
        help="default: export/step_N in the run, for an adapter export/step_N_adapter",
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--merged", action="store_true", help="the whole model (the default)"
    )
    kinds.add_argument(
        "--adapter", action="store_true", help="the adapter of a LoRA run, for PEFT"
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as model.export_dtype says, or as they are)",
    )
    add("--force", action="store_true", help="write into a directory that is not empty")
    options, source, flags = parser.read(arguments)
    saved = source.run()
    if options.adapter and saved.lora is None:
        parser.error(f"--adapter: {source.name} trained all weights; it has no adapter")
    if options.adapter and options.dtype:
        parser.error("--dtype: an adapter is kept in float32; leave out one of the two")
    prepare_devices()
    from jaxtrain.run.weights import choose_checkpoint

    point = choose_checkpoint(saved, source.checkpoints, options.step)
    name = f"step_{point.step}" + ("_adapter" if options.adapter else "")
    target = options.output or source.path / "export" / name
    check_target(target, force=options.force)
    run = _resolve(source, options.model, flags)
    if options.dtype:
        section = dataclasses.replace(run.model, export_dtype=options.dtype)
        run = dataclasses.replace(run, model=section)

    import jax

    from jaxtrain.run.export import export_adapter, export_merged
    from jaxtrain.run.weights import load_state, without_reference

    model, state = load_state(without_reference(run), point)
    write = export_adapter if options.adapter else export_merged
    path = write(target, model, run, state)
    if jax.process_index() == 0:
        print(f"step {point.step} of {source.name}: {path}")


def check_target(target: pathlib.Path, *, force: bool) -> None:
    """Refuse a file, a run's directory and, unless `force`, any that is not empty.

    Raises:
        ValueError: says so.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"--output={target} is a file; name a directory")
    if owner_of(target) == "run":
        raise ValueError(
            f"--output={target} is the work directory of a run, whose config.json would"
            " be written over; name another"
        )
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ValueError(
            f"{target} is not empty: name another --output, or add --force to write"
            " over what it holds"
        )


def _resolve(source: Source, base: str | None, flags: Sequence[Flag]) -> RunConfig:
    import jax

    config = configure(source, base=base, flags=flags)
    keys = override(config, flags)
    check_acting(keys, (*COMPUTING, "data.chat_template"), "an export")
    return resolve(config, device_count=jax.device_count(), flags=keys)
