"""The Triton kernels compiled by XLA for GPUs that are not here.

Shared memory is what a tile may not exceed, and only the compiler tells what it takes.
Needs jax's CUDA plugin and jax 0.12, no GPU.
"""

import importlib.util

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.aot.gpus import _Kind, _target
from jaxtrain.aot.report import CHIPS
from jaxtrain.kernels.attention.pallas_triton import KERNELS
from tests.kernels.attention.lowering_test import abstract_inputs, make_step

if importlib.util.find_spec("jax_cuda13_plugin") is None:
    reason = "needs jax's CUDA plugin: pip install jax-cuda13-plugin jax-cuda13-pjrt"
    pytest.skip(reason, allow_module_level=True)

# Name, compute capability, multiprocessors, their shared memory, L2 cache, clock.
A100 = _Kind("NVIDIA A100-SXM4-40GB", "8.0", 108, 167_936, 41_943_040, 1.41)
A10 = _Kind("NVIDIA A10", "8.6", 72, 102_400, 6_291_456, 1.7, threads=1536)
L4 = _Kind("NVIDIA L4", "8.9", 58, 102_400, 50_331_648, 2.04, threads=1536)
B200 = _Kind("NVIDIA B200", "10.0", 148, 233_472, 132_120_576, 1.97)
RTX = _Kind(
    "NVIDIA RTX PRO 6000 Blackwell Server Edition", "12.0", 170, 102_400, 100_663_296,
    2.41, threads=1536,
)  # fmt: skip


def compile_for(kind: _Kind, width: int, softcap: float | None) -> None:
    """Compile both passes over a packed row with shared prompts."""
    (device,) = topologies.get_topology_desc(
        platform="cuda",
        topology="1x1x1",
        target_config=_target(kind, CHIPS["NVIDIA H200"]),
    ).devices
    mesh = Mesh(np.array([device]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    step = make_step(KERNELS, softcap=softcap)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        inputs = abstract_inputs((1, 1024, 4, 2, width), (whole, whole))
        lowered = step.trace(*inputs).lower()
    lowered.compile()


@pytest.mark.on_request
@pytest.mark.parametrize("kind", [A100, A10, L4, B200, RTX], ids=lambda kind: kind.name)
def test_heads_of_128_fit_on_every_gpu_from_ampere_on(kind):
    compile_for(kind, 128, softcap=30.0)


@pytest.mark.on_request
@pytest.mark.parametrize("kind", [A100, B200], ids=lambda kind: kind.name)
def test_heads_of_256_fit_where_there_is_more_shared_memory(kind):
    compile_for(kind, 256, softcap=None)


@pytest.mark.on_request
def test_they_do_not_on_a_gpu_with_99_kib():
    """As `api._SMALL_SHARED_MEMORY` has it; should this pass, it can go."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit"):
        compile_for(L4, 256, softcap=None)
