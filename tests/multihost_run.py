"""One process of a tiny run over several processes, for multihost_test.

    python tests/multihost_run.py TYPE WORKDIR [EVENT RANK STEP | "split rows"]

EVENT is what happens to a process. With "split rows" all devices share each row.

The environment says which process of how many this is, as on a real cluster.
"""

import os
import pathlib
import signal
import sys
import time

import jax

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from runs import act_at_log, tiny_config, train  # noqa: E402

from jaxtrain.run import distributed  # noqa: E402
from jaxtrain.run.step_log import StepLog  # noqa: E402


def happen(event: str, rank: int, step: int) -> None:
    """Let `event` strike process `rank` as it logs `step`."""

    def suffer() -> None:
        if jax.process_index() == rank:
            if event == "hang":
                time.sleep(600)
            os.kill(os.getpid(), signal.Signals[event])

    StepLog.ask = act_at_log(step, suffer)  # type: ignore[method-assign]


def main(training_type: str, workdir: str, *event: str) -> None:
    jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    distributed.initialize()
    expected = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    assert jax.process_count() == expected
    splits_rows = event == ("split rows",)
    if event and not splits_rows:
        happen(event[0], int(event[1]), int(event[2]))
    # Four devices in all, whatever the number of processes: the same global batch.
    config = tiny_config(
        training_type,
        num_gpus=None,
        per_device_train_batch_size=4 if splits_rows else 1,
        step_timeout_secs=60.0 if event and event[0] == "hang" else 300.0,
        deepspeed__zero_stage=None if splits_rows else 3,
    )
    if splits_rows:
        config.mesh.context = 4
    train(config, pathlib.Path(workdir))


if __name__ == "__main__":
    main(*sys.argv[1:])
