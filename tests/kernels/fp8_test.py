"""Products in eight bits against numpy's float64 and ml_dtypes' own rounding."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.kernels import fp8
from jaxtrain.kernels.fp8 import api

TYPES = {api.INPUT: ml_dtypes.float8_e4m3fn, api.GRADIENT: ml_dtypes.float8_e5m2}
LARGEST = {api.INPUT: 448.0, api.GRADIENT: 57344.0}


def draw(shape, seed, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("f4")


def reference(x, dtype):
    """The values that codes of x stand for, in float64: scale, clip, round, unscale."""
    x = np.asarray(x, np.float64)
    # The largest power of two that keeps the largest entry within the range.
    scale = 2.0 ** np.floor(np.log2(LARGEST[dtype] / np.abs(x).max()))
    clipped = np.clip(x * scale, -LARGEST[dtype], LARGEST[dtype])
    return clipped.astype(TYPES[dtype]).astype(np.float64) / scale


def values(codes, unit):
    return np.asarray(codes.astype(jnp.float32), np.float64) * float(unit)


@pytest.mark.parametrize("dtype", TYPES)
@given(seed=st.integers(0, 2**16), power=st.integers(-60, 60))
def test_codes_are_the_nearest_values_of_a_scale_that_is_a_power_of_two(
    dtype, seed, power
):
    x = draw((8, 16), seed, 2.0**power)
    made = api.quantize(jnp.asarray(x), dtype)
    np.testing.assert_array_equal(values(made.codes, made.unit), reference(x, dtype))
    np.testing.assert_array_equal(made.transposed, made.codes.T)
    assert np.log2(float(made.unit)) == np.round(np.log2(float(made.unit)))
    # The range is used: the largest code is in its upper half.
    top = np.abs(np.asarray(made.codes, np.float64)).max()
    assert LARGEST[dtype] / 2 < top * (1 + 2.0**-3) and top <= LARGEST[dtype]


def test_zeros_stay_zeros_and_what_is_not_finite_shows():
    zeros = api.quantize(jnp.zeros((4, 4)), api.INPUT)
    assert float(zeros.unit) == 1 and not np.asarray(zeros.codes, np.float32).any()
    tiny = api.quantize(jnp.full((4, 4), 1e-38), api.INPUT)
    assert np.isfinite(values(tiny.codes, tiny.unit)).all()
    for bad in (np.nan, np.inf):
        x = jnp.ones((4, 4)).at[1, 2].set(bad)
        made = api.quantize(x, api.GRADIENT)
        assert np.isnan(values(made.codes, made.unit)).any()


def test_each_layer_has_a_scale_of_its_own():
    kernels = np.stack([draw((8, 4), 0), draw((8, 4), 1, 1e-3)])
    made = fp8.quantize_kernel(jnp.asarray(kernels))
    assert made.master is None and made.unit.shape == (2,)
    for layer in range(2):
        np.testing.assert_array_equal(
            values(made.codes[layer], made.unit[layer]),
            reference(kernels[layer], api.INPUT),
        )


@pytest.mark.parametrize("of_codes", [False, True])
def test_products_are_those_of_the_rounded_values_forward_and_backward(of_codes):
    """Against float64: x and W are rounded to e4m3 once, and dy to e5m2."""
    x, w, dy = draw((2, 8, 32), 0), draw((32, 16), 1), draw((2, 8, 16), 2, 1e-3)

    def run(x, w):
        found = fp8.quantize_kernel(jax.lax.stop_gradient(w))._replace(master=w)
        return fp8.project(fp8.Site(of_codes=of_codes), fp8.share(x), found)

    y, pull = jax.vjp(run, jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(dy))
    x8, w8 = reference(x, api.INPUT), reference(w, api.INPUT)
    dy8 = reference(dy, api.GRADIENT)
    near = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(y, x8 @ w8, **near)
    np.testing.assert_allclose(dx, dy8 @ w8.T, **near)
    np.testing.assert_allclose(dw, np.einsum("bti,bto->io", x8, dy8), **near)


def test_an_input_is_shared_and_its_gradients_add_up():
    x, first, second = draw((4, 32), 0), draw((32, 16), 1), draw((32, 48), 2)
    kernels = [fp8.quantize_kernel(jnp.asarray(w)) for w in (first, second)]

    def apart(x):
        return sum(
            jnp.sum(fp8.project(fp8.Site(), fp8.share(x), kernel) ** 2)
            for kernel in kernels
        )

    def together(x):
        shared = fp8.share(x)
        return sum(
            jnp.sum(fp8.project(fp8.Site(), shared, kernel) ** 2) for kernel in kernels
        )

    np.testing.assert_allclose(jax.grad(together)(x), jax.grad(apart)(x), rtol=1e-6)
    text = str(jax.make_jaxpr(together)(x))
    cast = r"(?<!bitcast_)convert_element_type\[\s*new_dtype=float8_e4m3fn"
    assert len(re.findall(cast, text)) == 1
