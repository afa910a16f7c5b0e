"""Kernels on a mesh: the same values, and nothing gathered along rows and heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.kernels.attention.blocked import attention_blocked
from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.pallas_tpu import KERNELS


def test_a_kernel_runs_where_its_rows_and_heads_are():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))
    rng = np.random.default_rng(0)
    shapes = [(4, 130, 4, 16), (4, 130, 2, 16), (4, 130, 2, 16)]
    inputs = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (4, 130)), axis=1), jnp.int32)

    def loss(q, k, v, segments):
        call = functools.partial(attention_blocked, KERNELS, interpret=True)
        out = call(q, k, v, Mask(segments), softcap=None, scale=0.25)
        return (out * jnp.cos(out)).sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    want_value, want = step(*inputs, segments)

    heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = [jax.device_put(x, heads) for x in inputs]
    arguments = (*sharded, jax.device_put(segments, rows))
    value, gradients = step(*arguments)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    for got, expected in zip(gradients, want, strict=True):
        assert got.sharding.is_equivalent_to(heads, 4)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert "all-gather" not in step.lower(*arguments).compile().as_text()
