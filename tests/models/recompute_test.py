"""Which layers compute what again: the numbers stay, and memory is what was allowed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.config import resolve
from jaxtrain.models import Decoder
from jaxtrain.models.gradient_layout import shares_weights
from jaxtrain.models.load import make_decoder, make_plan
from jaxtrain.models.recompute import LATER, Recompute, fit_layers
from tests.equations import equations
from tests.models.unrolled_test import config_of, over_two_devices, unrolled_decoder

LENGTH = 40  # no size of a weight
ROWS = np.arange(1, 1 + LENGTH, dtype=np.int32)[None] % 16
PLACES = np.arange(LENGTH, dtype=np.int32)[None]


def gradients(decoder, params):
    def loss(params):
        hidden = decoder.hidden_states(params, ROWS, PLACES, np.ones_like(ROWS))
        return (hidden.astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(loss))(params)


def assert_near(found, expected):
    """But for float32's rounding of sums: XLA joins other operations."""
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)


def residuals(decoder, params):
    """The arrays that the layers keep for the backward pass, by type and shape."""

    def pullback(params):
        def hidden(params):
            return decoder.hidden_states(params, ROWS, PLACES, np.ones_like(ROWS))

        return jax.vjp(hidden, params)[1]

    kept = jax.make_jaxpr(pullback)(params).jaxpr.outvars
    return [v.aval for v in dict.fromkeys(v for v in kept if not hasattr(v, "val"))]


def count_kept(decoder, params):
    """The bytes of those that are of tokens."""
    kept = residuals(decoder, params)
    return sum(x.size * x.dtype.itemsize for x in kept if LENGTH in x.shape)


@pytest.mark.parametrize("family", ["qwen3", "gemma4", "qwen3_next"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_however_many_layers_it_acts_on_gradients_are_the_same(
    make_model, family, scan_layers
):
    """Layers that are alike, that hand on keys and values, and two kinds in turn."""
    model, params = make_model(family, scan_layers=scan_layers)
    expected = gradients(model, params)
    for layers in (0, 1) if family == "qwen3" else (4,):
        chosen = dataclasses.replace(model, remat="full", remat_layers=layers)
        found = gradients(chosen, params)
        jax.tree.map(assert_near, found, expected)


def test_each_later_layer_keeps_as_much_as_under_that_policy(make_model):
    model, params = make_model("llama", scan_layers=False)
    layers = model.config.num_hidden_layers

    def kept(**options):
        return count_kept(dataclasses.replace(model, **options), params)

    none, every = kept(remat="full", remat_layers=layers), kept(remat=LATER)
    some = [kept(remat="full", remat_layers=n) for n in range(layers + 1)]
    assert some[0] == every and some[-1] == none == kept(remat="full")
    # What all layers share, such as rotary tables, counts once.
    np.testing.assert_allclose(np.diff(some), (none - every) / layers, rtol=0.05)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0, 7.0])
def test_the_last_layers_keep_what_they_may_and_no_less(share):
    """Of six layers; what is allowed is a share of what all would keep."""
    decoder = Decoder(config_of(6), scan_layers=False, remat="full")
    params = jax.eval_shape(decoder.init, jax.random.key(0))
    least = count_kept(decoder, params)
    most = count_kept(dataclasses.replace(decoder, remat=LATER), params) - least
    allowed = int(share * most) + 64  # what rounding of shares leaves open
    chosen = dataclasses.replace(decoder, kept_bytes=allowed)
    kept = count_kept(chosen, params) - least
    assert kept <= allowed
    assert kept + most / 6 > min(allowed, most)
    # In a loop a part of the layers would be copied.
    scanned = dataclasses.replace(chosen, scan_layers=True)
    assert count_kept(scanned, params) == count_kept(
        dataclasses.replace(decoder, scan_layers=True), params
    )


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 9)), max_size=4
    ),
    st.integers(0, 99),
)
def test_layers_are_left_out_from_the_last_as_many_as_fit(shapes, allowed):
    costs, of_layer = [], []
    for period, repeats, cost in shapes:
        costs.append((len(of_layer), period, repeats, cost))
        of_layer += ([0] * (period - 1) + [cost]) * repeats  # a pattern's, together
    again = fit_layers(costs, allowed)
    assert sum(of_layer[again:]) <= allowed
    assert again == 0 or sum(of_layer[again - 1 :]) > allowed or not of_layer[again - 1]
    recompute = Recompute("full", again)
    for first, period, repeats, _ in costs:
        parts = recompute.cut(first, period, repeats)
        covered = [n for part, _ in parts for n in range(part.start, part.stop)]
        assert covered == list(range(repeats))
        for part, policy in parts:
            early = policy == "full"
            assert all(
                (first + n * period < again) == early
                for n in range(part.start, part.stop)
            )


def test_no_copy_of_weights_in_the_compute_type_is_kept():
    """Read again in the backward pass, they need not wait for it in memory."""
    decoder = unrolled_decoder(3, remat="full")
    params = jax.eval_shape(decoder.init, jax.random.key(0))
    kept = [(x.dtype.name, x.shape[-2:]) for x in residuals(decoder, params)]
    assert ("float32", (64, 192)) in kept  # the stack itself
    assert ("bfloat16", (64, 192)) not in kept

    def loss(params):
        hidden = decoder.hidden_states(params, ROWS, PLACES, np.ones_like(ROWS))
        return hidden.sum()

    found = equations(jax.make_jaxpr(jax.grad(loss))(params))
    read = [
        equation.outvars[0].aval.shape
        for equation in found
        if equation.primitive.name == "dynamic_slice"
    ]
    assert read.count((1, 64, 192)) == 2 * 2  # gate and up, forward and backward


def decoder_of_run(layers=4, devices=1, **sections):
    run = resolve(
        {"training": {"training_type": "sft", "gradient_checkpointing": True}}
        | sections,
        device_count=devices,
    )
    config = config_of(layers)
    return make_decoder(run, config, make_plan(run, config, jax.devices()[:devices]))


def test_a_run_may_keep_three_quarters_of_trained_weights_and_none_of_frozen_ones():
    trained = decoder_of_run()
    weights = trained.config.num_params() * 4
    assert trained.kept_bytes == int(0.75 * weights)
    lora = {"training_type": "lora", "gradient_checkpointing": True}
    assert decoder_of_run(training=lora).kept_bytes == 0
    layers = {"training_type": "sft", "gradient_checkpointing": True, "remat_layers": 3}
    assert decoder_of_run(training=layers).remat_layers == 3


@pytest.mark.parametrize(
    ("mesh", "share"),
    [
        ({"data": 4}, 4 * 0.75),
        ({"fsdp": 4}, 1.5),
        ({"data": 2, "fsdp": 2}, 2 * 1.5),
        ({"data": 2, "tensor": 2}, 2 * 1.5),
    ],
)
def test_devices_with_parts_of_weights_keep_twice_as_much_of_each_copy(mesh, share):
    decoder = decoder_of_run(devices=4, mesh=mesh)
    assert decoder.kept_bytes == int(share * decoder.config.num_params() * 4)


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [({"data": 1, "context": 2}, ()), ({"fsdp": 2}, ("fsdp", "expert", "context"))],
)
def test_weights_that_devices_of_a_row_have_whole_are_not_shared(mesh, axes):
    """Taken for shared, they would be gathered, and made again layer by layer."""
    decoder = decoder_of_run(devices=2, mesh=mesh)
    assert decoder.layout.weights == axes
    assert shares_weights(decoder) == bool(axes)


@pytest.mark.parametrize("reshards", [True, False])
def test_shared_weights_are_gathered_again_unless_they_stay(reshards):
    """What is behind a barrier in the backward pass is made again there."""
    decoder = unrolled_decoder(
        3, remat="full", layout=over_two_devices(), reshards=reshards
    )
    params = jax.eval_shape(decoder.init, jax.random.key(0))

    def loss(params):
        hidden = decoder.hidden_states(params, ROWS, PLACES, np.ones_like(ROWS))
        return hidden.sum()

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    barriers = [line for line in text.splitlines() if "optimization_barrier" in line]
    assert any("tensor<1x40x64x" in line for line in barriers)  # a layer's input
    assert any("tensor<64x192x" in line for line in barriers) == reshards
