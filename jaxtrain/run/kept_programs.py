"""Train steps that were traced before, on disk: a later start need not trace them anew.

jax's cache of compiled programs is asked by a program's text, and to get that text jax
traces the step and lowers it: two to four seconds of Python for each shape of rows with
the kernels for Hopper. So the text itself is kept beside those programs, as
`jax.export` writes it: no pickles. It is found by all that it depends on: what the step
closes over (closures.py), the arguments' shapes, the package's sources, the versions of
the libraries, jax's settings and the device. Where any of that cannot be told, or a
file cannot be read, the step is traced as if nothing had been kept.

The kernels for Hopper call functions of Mosaic's runtime, a shared library that XLA
looks for where an environment variable says. Importing Mosaic sets that variable, and a
process that traces no kernel would never import it: XLA then ends the run with "Symbols
not found: mosaic_gpu_init_tma_desc".
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from jaxtrain import sharding
from jaxtrain.run import closures, compilation_cache, durable, mosaic_programs
from jaxtrain.types import TrainState, WeightedSum

logger = logging.getLogger(__name__)

_FOLDER, _SUFFIX = "traced", ".step"
_MOST_FILES = 256  # of half a MB; those that were not used for longest are removed
_DIGEST_BYTES = 32
_MOSAIC = "jax.experimental.pallas.mosaic_gpu"
# Calls that jax would not export since they may change with its version, which is a
# part of the key. Not the one by which jax 0.12 calls Triton's kernels: its runtime is
# loaded by nothing that is public.
_CALLS = (
    *mosaic_programs.CALLS, "__gpu$xla.gpu.triton", "__cudnn$fmhaSoftmax",
    "__cudnn$fmhaSoftmaxBackward", "__cudnn$fmhaScaleBiasSoftmax",
    "__cudnn$fmhaScaleBiasSoftmaxBackward",
)  # fmt: skip
# Settings of jax's that say where things are kept or what is logged, but not what a
# program is.
_NOT_OF_PROGRAMS = ("cache", "log", "dump", "debug_dir", "traceback", "profiler")
_LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "numpy", "jax-cuda12-plugin", "jax-cuda13-plugin",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
_NOT_KEPT = "the traced train step is not kept for a next start: %s"
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class KeptPrograms:
    """Lowers a train step for one device, from what an earlier run traced if it can.

    `folder`: where programs are kept. `plan`: the mesh of the step, of one device.
    `found`: the files of steps that need not be traced, as they are lowered.
    `refused`: why steps could not be kept; each reason is logged once.
    """

    folder: pathlib.Path
    plan: sharding.ShardingPlan
    found: list[pathlib.Path] = dataclasses.field(default_factory=list)
    refused: list[str] = dataclasses.field(default_factory=list)

    def lower(self, train_step: Any, state: TrainState, batch: Any) -> Any:
        """`train_step.lower(state, batch)`, in less time at a second start.

        The program has another name than the one of `train_step`, and so another place
        in jax's cache of compiled programs. A step that is made of jitted ones
        (fp8_step.py, fitted_step.py) has `lower_by`, which lowers these by this method.
        """
        if hasattr(train_step, "lower_by"):
            return train_step.lower_by(self.lower, state, batch)
        try:
            path = self.folder / f"{_key(train_step, self.plan, state, batch)}{_SUFFIX}"
            kept = _read(path)
            if kept is None:
                kept = self._keep(path, train_step, state, batch)
            else:
                self.found.append(path)
                if self.plan.platform == "gpu":
                    importlib.import_module(_MOSAIC)
            return self._as_step(kept, state).lower(state, batch)
        except Exception as error:
            # Of jax, of flatbuffers, of the disk: a file that saves seconds is not
            # worth a run.
            self._say_once(error)
            return train_step.lower(state, batch)

    def _say_once(self, error: Exception) -> None:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        if why not in self.refused:
            self.refused.append(why)
            logger.info(_NOT_KEPT, why)

    def _keep(
        self, path: pathlib.Path, train_step: Any, state: TrainState, batch: Any
    ) -> export.Exported:
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in _CALLS]
        flat = jax.jit(_with_plain_trees(train_step.__wrapped__, state, batch))
        with _heard() as told:
            traced = export.export(flat, disabled_checks=checks)(*_leaves(state, batch))
        program = traced.serialize()
        _write(path, json.dumps(told).encode(), bytes(program))
        # As the next start will read it: the text that jax makes of what it has just
        # traced is another, and so would be its place in the cache of programs.
        return export.deserialize(program)

    def _as_step(self, kept: export.Exported, state: TrainState) -> Any:
        """The kept program as a jitted step, with the donation of the first one."""
        tree = jax.tree.structure(state)

        def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
            leaves, metrics = kept.call(*_leaves(state, batch))
            return (
                jax.tree.unflatten(tree, leaves),
                {name: WeightedSum(*pair) for name, pair in metrics.items()},
            )

        layouts = sharding.layouts_of(state)
        return self.plan.jit(
            train_step,
            in_shardings=(layouts, self.plan.batch(1)),
            out_shardings=(layouts, self.plan.replicated),
            donate_argnums=0,
        )


def keep_programs(plan: sharding.ShardingPlan) -> KeptPrograms | None:
    """What keeps traced steps on this mesh; None where nothing is kept.

    Only steps for one device are, whose state is in its memory: others were not tried.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        return None  # jax.export writes its files with it
    folder = compilation_cache.folder_in_use()
    if folder is None:
        return None  # no compiled program is either
    if plan.mesh.size > 1 or jax.process_count() > 1:
        logger.info(_NOT_KEPT, "it is for several devices")
        return None
    if plan.offload_optimizer or plan.offload_params:
        logger.info(_NOT_KEPT, "its state is offloaded")
        return None
    return KeptPrograms(folder / _FOLDER, plan)


def _leaves(state: TrainState, batch: Any) -> tuple[list[Any], list[Any]]:
    return jax.tree.leaves(state), jax.tree.leaves(batch)


def _with_plain_trees(
    train_step: Callable[..., Any], state: TrainState, batch: Any
) -> Callable[..., Any]:
    """The step on lists, since a file cannot hold trees of our own classes."""
    trees = jax.tree.structure(state), jax.tree.structure(batch)

    def flat(state: list[Any], batch: list[Any]) -> tuple[list[Any], Any]:
        given = map(jax.tree.unflatten, trees, (state, batch))
        new_state, metrics = train_step(*given)
        pairs = {name: (sums.total, sums.weight) for name, sums in metrics.items()}
        return jax.tree.leaves(new_state), pairs

    return flat


def _key(
    train_step: Any, plan: sharding.ShardingPlan, state: TrainState, batch: Any
) -> str:
    """A digest of all that the step's program depends on.

    Raises:
        closures.UnknownCode: the step reaches code that no digest can tell.
    """
    device = plan.mesh.devices.flat[0]
    arguments = [
        f"{jax.tree_util.keystr(path)} {jax.typeof(leaf).str_short()}"
        f" {getattr(leaf, 'weak_type', False)} {leaf.sharding.memory_kind}"
        for path, leaf in jax.tree.leaves_with_path((state, batch))
    ]
    facts = [
        closures.describe(train_step.__wrapped__),
        arguments,
        str(plan.compiler_options),
        [device.platform, device.device_kind, device.client.platform_version],
        _settings(),
        _sources(),
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=20).hexdigest()


def _settings() -> list[Any]:
    """jax's settings, and what XLA is told.

    `jax.config` does not show what a context manager has set, such as
    `jax.default_matmul_precision`, but a small program does.
    """
    of_jax = {
        name: str(value)
        for name, value in jax.config.values.items()
        if not any(word in name for word in _NOT_OF_PROGRAMS)
    }
    named = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    of_xla = {name: os.environ.get(name, "") for name in named}
    shown = jax.jit(lambda x: x @ x + jax.random.uniform(jax.random.key(0), x.shape))
    return [of_jax, of_xla, shown.lower(jnp.zeros((2, 2))).as_text()]


@functools.cache
def _sources() -> list[Any]:
    """The code that traces: this package's, and which versions of the libraries."""
    digest = hashlib.blake2b(digest_size=20)
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(_PACKAGE)).encode())
        digest.update(file.read_bytes())
    versions = {name: _version_of(name) for name in _LIBRARIES}
    return [digest.hexdigest(), versions, platform.python_version()]


def _version_of(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def _heard() -> Iterator[list[Any]]:
    """What this package logs meanwhile: a list of name, level and line, which grows."""
    told: list[Any] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append([record.name, record.levelno, record.getMessage()])

    ear, package = Ear(), logging.getLogger(_PACKAGE.name)
    package.addHandler(ear)
    try:
        yield told
    finally:
        package.removeHandler(ear)


def _read(path: pathlib.Path) -> export.Exported | None:
    """A kept program; None where there is none, or only a damaged one.

    What was logged as it was traced, such as which attention was chosen, is logged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, rest = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.blake2b(rest, digest_size=_DIGEST_BYTES).digest() != digest:
        logger.info("%s is damaged: the step is traced again", path)
        return None
    told, _, program = rest.partition(b"\n")
    kept = export.deserialize(bytearray(program))
    os.utime(path)  # it was used: the oldest are removed
    for name, level, line in json.loads(told):
        logging.getLogger(name).log(level, "%s", line)
    return kept


def _write(path: pathlib.Path, told: bytes, program: bytes) -> None:
    """Keep a program whole or not at all; remove what was not used for longest.

    Args:
        told: what was logged as it was traced, a line of JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = told + b"\n" + program
    digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
    durable.write_whole(path, digest + content)
    files = sorted(path.parent.glob(f"*{_SUFFIX}"), key=os.path.getmtime)
    for old in files[:-_MOST_FILES]:
        old.unlink(missing_ok=True)
