"""`training.reduce_dtype`: in which type gradients of matrices meet on a mesh."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config

from jaxtrain.aot.compile import _abstract_batch, describe_step
from jaxtrain.config import resolve
from jaxtrain.kernels.linear_cross_entropy import fused, hopper
from jaxtrain.models.layers import _project
from jaxtrain.models.load import load_abstract_model
from tests.plain_kernels import weigh_plainly


def test_a_gradient_in_float32_is_that_of_exact_products_of_rounded_factors():
    draw = np.random.default_rng(0).normal
    x, gradient = (jnp.asarray(draw(size=(4, 16, n)), jnp.bfloat16) for n in (8, 12))
    kernel = jnp.asarray(draw(size=(8, 12)), jnp.float32)
    y, pull = jax.vjp(_project, x, kernel)
    assert y.dtype == jnp.bfloat16
    of_x, of_kernel = pull(gradient)
    exact = np.einsum("btd,btf->df", *(np.float64(z) for z in (x, gradient)))
    # Seven digits, where bfloat16 has less than three.
    np.testing.assert_allclose(of_kernel, exact, rtol=1e-5, atol=1e-5)
    plain = jax.vjp(lambda x, k: x @ k.astype(x.dtype), x, kernel)
    np.testing.assert_array_equal(np.float32(y), np.float32(plain[0]))
    np.testing.assert_array_equal(np.float32(of_x), np.float32(plain[1](gradient)[0]))
    rounded = plain[1](gradient)[1]
    assert np.abs(rounded - exact).max() > 100 * np.abs(of_kernel - exact).max()


def traced_step(dtype, axis, param_dtype="float32"):
    """The text of a step whose mesh has eight devices along this axis."""
    config = tiny_config("from_scratch", num_gpus=8, bf16=True, reduce_dtype=dtype)
    config.mesh[axis], config.model.param_dtype = 8, param_dtype
    run = resolve(config, device_count=8)
    model = load_abstract_model(run, jax.devices()[:8])
    step, state = describe_step(run, model.for_training(packed=False))
    return step.lower(state, _abstract_batch(model, run)).as_text()


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("axis", "collective", "part"),
    [("data", "all_reduce", "2048x64"), ("fsdp", "reduce_scatter", "2048x8")],
)
def test_devices_add_up_the_gradient_of_the_head_in_that_type(
    dtype, axis, collective, part, param_dtype, monkeypatch
):
    """Where kernels score each device's own tokens; plain jax stands in for them."""
    monkeypatch.setattr(fused, "choose_tiles", lambda *_: hopper.Tiles())
    monkeypatch.setattr(fused, "weigh_logits", weigh_plainly)
    program = traced_step(dtype, axis, param_dtype)
    pattern = rf"stablehlo.{collective}\"(?:.*\n){{4}}.* -> tensor<{part}x(\w+)>"
    assert re.findall(pattern, program) == ["f32" if dtype else "bf16"]


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_step_of_a_mesh_multiplies_into_that_type(dtype):
    """By the traced program: the partitioner adds up what a product gives.

    The kernels of the MLP are 64 x 96 and 96 x 64.
    """
    program = traced_step(dtype, "fsdp")
    found = re.findall(r"dot_general.*-> tensor<(64x96|96x64)x(\w+)>", program)
    types = {kind for _, kind in found}
    assert types == {"f32" if dtype else "bf16"}, found
