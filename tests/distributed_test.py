"""What each launcher's environment is taken for; no process is started."""

import math
import os
import threading

import jax
import pytest

from jaxtrain.run import distributed
from jaxtrain.run.distributed import Launch, detect

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "host0:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"PATH": "/bin", "TPU_WORKER_HOSTNAMES": "only-me"}, None),
        ({"JAXTRAIN_DISTRIBUTED": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (EXPLICIT, Launch("environment", "host0:1234", 4, 3)),
        ({"SLURM_STEP_NODELIST": "node[01-04]"}, Launch("Slurm")),
        # Given in full, the explicit variables win.
        (
            EXPLICIT | {"SLURM_STEP_NODELIST": "n1"},
            Launch("environment", "host0:1234", 4, 3),
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Launch("GKE")),
        ({"JAXTRAIN_DISTRIBUTED": "1"}, Launch("TPU pod")),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, Launch("TPU slices")),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"},
            Launch("Open MPI"),
        ),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
                "JAX_COORDINATOR_ADDRESS": "h:1",
            },
            Launch("Open MPI", "h:1", 2, 1),
        ),
    ],
)
def test_each_launcher_is_recognised(environ, expected):
    assert detect(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "set JAX_NUM_PROCESSES"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "must be below JAX_NUM_PROCESSES = 4"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "'two' is not a number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun -x"),
    ],
)
def test_half_an_environment_is_refused(environ, message):
    with pytest.raises(ValueError, match=message):
        detect(environ)


def test_a_gpus_process_may_pin_most_of_the_host_memory():
    limit, pages = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", os.sysconf("SC_PHYS_PAGES")
    gib = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    environ = {}
    distributed.allow_pinned_memory(environ)
    assert int(environ[limit]) == max(64, math.floor(0.9 * gib))
    chosen = {limit: "20"}
    distributed.allow_pinned_memory(chosen)
    assert chosen == {limit: "20"}


def test_the_launch_and_its_timeouts_reach_jax(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **k: calls.append(k))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    distributed.initialize(EXPLICIT | {"JAXTRAIN_INIT_TIMEOUT_SECS": "7"})
    assert calls == [
        {
            "coordinator_address": "host0:1234",
            "num_processes": 4,
            "process_id": 3,
            "initialization_timeout": 7,
            "heartbeat_timeout_seconds": 100,
        }
    ]
    distributed.initialize({})
    assert len(calls) == 1


def test_a_timeout_names_what_to_look_at(monkeypatch):
    def never(**_):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", never)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"host0:1234.*firewall.*DEADLINE"):
        distributed.initialize(EXPLICIT)


@pytest.mark.parametrize("environ", [{}, EXPLICIT])
def test_devices_are_opened_beside_imports_but_others_are_joined_before(
    environ, monkeypatch
):
    imported, order = threading.Event(), []

    def initialize(given):
        assert given is environ
        if not environ:  # beside the block, for it waits for its end
            assert imported.wait(20)
        order.append("initialized")

    monkeypatch.setattr(distributed, "initialize", initialize)
    with distributed.initializing(environ):
        order.append("imported")
        imported.set()
    expected = ["imported", "initialized"]
    assert order == (expected[::-1] if environ else expected)


@pytest.mark.parametrize("full", [False, True])
def test_memory_is_reserved_beside_the_imports_on_the_first_device(monkeypatch, full):
    """Where there is none, that is not told here."""
    placed = []

    def put(value, device):
        placed.append(device)
        if full:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")
        return value

    monkeypatch.setattr(jax, "device_put", put)
    with distributed.initializing({}):
        pass
    assert placed == jax.local_devices()[:1]


def test_a_device_that_is_not_there_is_told_behind_the_imports(monkeypatch):
    def refuse(environ):
        raise ValueError("no such device")

    monkeypatch.setattr(distributed, "initialize", refuse)
    with pytest.raises(ValueError, match="no such device"):  # noqa: SIM117
        with distributed.initializing({}):
            pass
