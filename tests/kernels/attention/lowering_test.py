"""Kernels compiled for machines that are not here: CUDA code, TPU executables."""

import importlib
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
from jaxtrain.kernels.attention.partition import Layout, attend_on_shards


def make_step(kernels, window=None, softcap=None, layout=None, first=0):
    """Gradients of attention over packed rows with a shared prompt.

    `first`: the query from which on these are a part of their row.
    """

    def call(q, k, v, mask, schedule, sinks):
        options = {"softcap": softcap, "scale": q.shape[-1] ** -0.5, "sinks": sinks}
        return attention_blocked(kernels, q, k, v, mask, schedule=schedule, **options)

    def loss(q, k, v, segment_ids, prompt_ids, sinks=None):
        mask = Mask(segment_ids, prompt_ids, True, window)
        if first:
            of_part = (segment_ids[:, first:], prompt_ids[:, first:], True, window)
            q, mask = q[:, first:], Mask(*of_part, key_ids=segment_ids, offset=first)
        out = attend_on_shards(call, layout or Layout(), q, k, v, mask, sinks=sinks)
        return (out.astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def abstract_inputs(shapes, shardings=(None, None)):
    """`shapes` ends with the width of keys and, where it is another, that of values."""
    batch, length, heads, kv_heads, width, *value_width = shapes
    of_heads, of_rows = shardings
    row = (batch, length)
    sizes = ((heads, width), (kv_heads, width), (kv_heads, *(value_width or (width,))))
    arrays = [
        jax.ShapeDtypeStruct((*row, *size), jnp.bfloat16, sharding=of_heads)
        for size in sizes
    ]
    ids = jax.ShapeDtypeStruct(row, jnp.int32, sharding=of_rows)
    return (*arrays, ids, ids)


WIDTHS = [((64,), 0), ((96,), 0), ((96,), 310), ((256,), 0), ((192, 128), 0)]


@pytest.mark.parametrize(("widths", "first"), WIDTHS)
def test_hopper_kernels_lower_for_cuda(widths, first):
    from jaxtrain.kernels.attention.pallas_gpu import KERNELS

    step = make_step(KERNELS, window=100, softcap=30.0, first=first)
    inputs = abstract_inputs((2, 500, 4, 2, *widths))
    program = step.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    # Forward, dq, and dk with dv: apart where both do not fit in registers.
    assert program.count("custom_call @mosaic_gpu") == (4 if widths[0] > 128 else 3)


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_layers_apart_share_their_kernels(name):
    """Lowering and compiling one takes a second, and a model has many layers."""
    module = importlib.import_module(f"jaxtrain.kernels.attention.{name}")
    options = {"softcap": None, "scale": 0.1, "schedule": None}

    def loss(q, k, v, segment_ids, prompt_ids):
        mask = Mask(segment_ids, prompt_ids)
        for _ in range(2):
            q = attention_blocked(module.KERNELS, q, k, v, mask, **options)
        return (q.astype(jnp.float32) ** 2).sum()

    inputs = abstract_inputs((2, 500, 4, 2, 64))
    step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*inputs)
    platform, call = {
        "pallas_gpu": ("cuda", "custom_call @mosaic_gpu"),
        "pallas_tpu": ("tpu", "custom_call @tpu_custom_call"),
    }[name]
    program = step.lower(lowering_platforms=(platform,)).as_text()
    assert program.count(call) == 3


@pytest.mark.parametrize(("widths", "first"), WIDTHS)
def test_triton_kernels_lower_for_cuda(widths, first):
    from jaxtrain.kernels.attention.pallas_triton import KERNELS

    step = make_step(KERNELS, window=100, softcap=30.0, first=first)
    inputs = abstract_inputs((2, 500, 4, 2, *widths))
    try:
        program = step.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if "No supported GPU devices" not in str(error):
            raise
        pytest.skip("this jax lowers Triton kernels only where a GPU is")
    assert program.count("attention_query_gradient") >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "shapes", "window", "softcap"),
    [
        ("v5e:2x2", (4, 1024, 8, 2, 128), None, None),
        ("v5e:2x2", (4, 300, 2, 2, 80), None, None),
        ("v5p:2x2x1", (4, 1024, 8, 2, 128), None, None),
        ("v6e:2x2", (4, 1024, 4, 2, 256), 512, 50.0),
        ("v5e:2x2", (4, 1024, 4, 4, 192, 128), None, None),
        ("v5e:2x2", (4, 1024, 4, 2, 512), None, None),
    ],
    ids=[
        "v5e_gqa",
        "v5e_odd_length",
        "v5p_gqa",
        "v6e_gemma",
        "v5e_latent",
        "v5e_gemma4",
    ],
)
def test_tpu_kernels_compile_for_a_mesh(topology, shapes, window, softcap):
    from jaxtrain.kernels.attention.pallas_tpu import KERNELS

    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs jax[tpu]: libtpu compiles for a TPU that is not here")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = np.array(description.devices).reshape(2, 2)
    mesh = Mesh(devices, ("data", "tensor"))
    heads, rows = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
    step = make_step(KERNELS, window, softcap, Layout(mesh, ("data",), ("tensor",)))
    shardings = (NamedSharding(mesh, heads), NamedSharding(mesh, rows))
    sinks = jax.ShapeDtypeStruct(
        (shapes[2],), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor"))
    )
    inputs = abstract_inputs(shapes, shardings)
    program = step.lower(*inputs, sinks).compile().as_text()
    assert program.count("tpu_custom_call") >= 3
    assert "all-gather" not in program
