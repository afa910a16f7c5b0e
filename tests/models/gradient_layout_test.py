"""Gradients of weights that GPUs share are as before, but laid out as weights are."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.models.gradient_layout import updated_in_place
from tests.equations import equations

CONSTRAINED = "layout_constraint"


class OnGpus(Layout):
    """As on GPUs, though its devices are CPUs."""

    platform = "gpu"


def options_of(kind, weights, fp8=False):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("fsdp",))
    return types.SimpleNamespace(
        layout=kind(mesh, rows=("fsdp",), weights=weights), fp8=fp8
    )


def gradients(options, weights, x):
    def loss(weights):
        weights = updated_in_place(options, weights)
        return jnp.sin(x @ weights["kernel"] * weights["scale"]).sum()

    return jax.grad(loss)(weights)


WEIGHTS = {
    "kernel": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6),
    "scale": np.linspace(1, 2, 6, dtype=np.float32),
    "codes": np.arange(4, dtype=np.int8).reshape(2, 2),
}
X = np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4)


def trained():
    return {name: WEIGHTS[name] for name in ("kernel", "scale")}


def constraints(options):
    found = equations(
        jax.make_jaxpr(lambda *args: gradients(options, *args))(trained(), X)
    )
    return [e.outvars[0].aval.shape for e in found if e.primitive.name == CONSTRAINED]


def test_only_matrices_that_gpus_share_are_laid_out():
    assert constraints(options_of(OnGpus, ("fsdp",))) == [(4, 6)]
    assert not constraints(options_of(OnGpus, ()))  # whole on each device
    assert not constraints(options_of(OnGpus, ("fsdp",), fp8=True))
    assert not constraints(options_of(Layout, ("fsdp",)))  # CPUs
    assert not constraints(types.SimpleNamespace(layout=None, fp8=False))


def test_weights_of_no_gradient_are_left_alone():
    found = updated_in_place(options_of(OnGpus, ("fsdp",)), WEIGHTS)
    assert found["codes"] is WEIGHTS["codes"]


@pytest.mark.parametrize("split", [PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")])
def test_gradients_of_parts_are_those_of_the_whole(split):
    options = options_of(OnGpus, ("fsdp",))
    mesh = options.layout.mesh
    whole = {
        "kernel": NamedSharding(mesh, split),
        "scale": NamedSharding(mesh, PartitionSpec()),
    }
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    step = jax.jit(
        lambda weights, x: gradients(options, weights, x),
        in_shardings=(whole, rows),
        out_shardings=whole,
    )
    found = step(trained(), X)
    slope = np.cos(X @ WEIGHTS["kernel"] * WEIGHTS["scale"], dtype=np.float64)
    expected = X.T @ (slope * WEIGHTS["scale"])
    # Sums of two products in float32.
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-5, atol=1e-6)
