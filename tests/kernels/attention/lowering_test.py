"""Kernels compiled for machines that are not here: CUDA code, TPU executables."""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.kernels.attention.blocked import attention_blocked
from jaxtrain.kernels.attention.masks import Mask


def make_step(kernels, window=None, softcap=None):
    """Gradients of attention over packed rows with a shared prompt."""

    def loss(q, k, v, segment_ids, prompt_ids):
        mask = Mask(segment_ids, prompt_ids, True, window)
        call = functools.partial(attention_blocked, kernels)
        out = call(q, k, v, mask, softcap=softcap, scale=q.shape[-1] ** -0.5)
        return (out.astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def abstract_inputs(shapes, shardings=(None, None)):
    batch, length, heads, kv_heads, width = shapes
    of_heads, of_rows = shardings
    row = (batch, length)
    arrays = [
        jax.ShapeDtypeStruct((*row, n, width), jnp.bfloat16, sharding=of_heads)
        for n in (heads, kv_heads, kv_heads)
    ]
    ids = jax.ShapeDtypeStruct(row, jnp.int32, sharding=of_rows)
    return (*arrays, ids, ids)


@pytest.mark.parametrize("width", [64, 96, 256])
def test_hopper_kernels_lower_for_cuda(width):
    from jaxtrain.kernels.attention.pallas_gpu import KERNELS

    step = make_step(KERNELS, window=100, softcap=30.0)
    inputs = abstract_inputs((2, 500, 4, 2, width))
    program = step.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    # Forward, dq, and dk with dv: apart where both do not fit in registers.
    assert program.count("custom_call @mosaic_gpu") == (4 if width == 256 else 3)


@pytest.mark.parametrize("width", [64, 96, 256])
def test_triton_kernels_lower_for_cuda(width):
    from jaxtrain.kernels.attention.pallas_triton import KERNELS

    step = make_step(KERNELS, window=100, softcap=30.0)
    inputs = abstract_inputs((2, 500, 4, 2, width))
    try:
        program = step.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if "No supported GPU devices" not in str(error):
            raise
        pytest.skip("this jax lowers Triton kernels only where a GPU is")
    assert program.count("attention_query_gradient") >= 1


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def tpu_devices(request):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs jax[tpu]: libtpu compiles for a TPU that is not here")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=request.param)
    return np.array(topology.devices)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "window", "softcap"),
    [
        ((4, 1024, 8, 2, 128), None, None),
        ((4, 1024, 4, 2, 256), 512, 50.0),
        ((4, 300, 2, 2, 80), None, None),
    ],
    ids=["gqa", "gemma", "odd_length"],
)
def test_tpu_kernels_compile_for_a_mesh(tpu_devices, shapes, window, softcap):
    from jaxtrain.kernels.attention.pallas_tpu import KERNELS

    # In a program for devices that are not here, only shard_map places a kernel.
    mesh = Mesh(tpu_devices.reshape(2, 2), ("data", "tensor"))
    heads, rows = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
    step = jax.jit(
        jax.shard_map(
            make_step(KERNELS, window, softcap),
            mesh=mesh,
            in_specs=(heads, heads, heads, rows, rows),
            out_specs=(heads, heads, heads),
            check_vma=False,
        )
    )
    shardings = (NamedSharding(mesh, heads), NamedSharding(mesh, rows))
    program = step.lower(*abstract_inputs(shapes, shardings)).compile().as_text()
    assert program.count("tpu_custom_call") >= 3
    assert "all-gather" not in program
