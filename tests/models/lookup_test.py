"""Looking tokens up on a mesh: the table's gradient, and what travels for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.aot.hlo_cost import analyze
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.models.lookup import look_up

ROWS, LENGTH, WIDTH = 8, 8, 16


def make_layout(data, fsdp):
    mesh = Mesh(np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp), ("d", "f"))
    return Layout(mesh, rows=("d", "f"), weights=("f",))


def differentiate(layout, vocab, dtype="float32"):
    """The table's gradient on the mesh, in numpy's float64, and the program."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(vocab, WIDTH)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, vocab, (ROWS, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype)

    def loss(table, tokens, weights):
        return (look_up(layout, table, tokens, dtype) * weights).sum()

    def place(x, *axes):
        return jax.device_put(x, NamedSharding(layout.mesh, PartitionSpec(*axes)))

    own = (place(table, None, "f"), *(place(x, ("d", "f")) for x in (tokens, weights)))
    step = jax.jit(jax.grad(loss), out_shardings=own[0].sharding)
    wanted = np.zeros((vocab, WIDTH))
    np.add.at(wanted, np.asarray(tokens), np.asarray(weights, np.float64))
    return step(*own), wanted, step.lower(*own).compile().as_text()


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (1, 8), (2, 1)])
def test_the_tables_gradient_is_the_sum_of_its_tokens_gradients(sizes):
    found, wanted, _ = differentiate(make_layout(*sizes), 96)
    # Sums of a few float32 numbers, in another order than numpy's.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_vectors_travel_in_place_of_a_table_that_is_larger():
    *_, program = differentiate(make_layout(4, 1), 512, "bfloat16")
    moved = analyze(program).collectives
    assert "all-reduce" not in moved
    # A device gets all vectors, as XLA for a CPU has it in float32, and all tokens.
    assert moved["all-gather"][1] <= 4 * ROWS * LENGTH * (WIDTH + 1)

    *_, program = differentiate(make_layout(4, 1), 16, "bfloat16")
    assert analyze(program).collectives == {"all-reduce": (1, 4 * 16 * WIDTH)}
