"""Grouped products and both gradients against float64, group by group."""

import functools
import importlib.util
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.kernels.grouped_matmul import api, grouped_matmul, hopper
from jaxtrain.kernels.grouped_matmul.plan import TILE, make_plan
from jaxtrain.models import moe

# The third group meets three tiles of 128 rows, the first two tiles meet three groups
# each, one of which is empty; 58 rows are behind all groups.
SIZES = (100, 0, 61, 150, 3, 20)
ROWS = 392


def make_arrays(rows=ROWS, sizes=SIZES, depth=128, width=192, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    shapes = ((rows, depth), (len(sizes), depth, width), (rows, width))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def expected(rows, weights, d_out, sizes):
    """The product and its gradients by their definition, in float64."""
    rows, weights, d_out = (np.asarray(x, np.float64) for x in (rows, weights, d_out))
    out, d_rows, d_weights = (np.zeros(x.shape) for x in (d_out, rows, weights))
    start = 0
    for group, size in enumerate(sizes):
        own = slice(start, start + size)
        out[own] = rows[own] @ weights[group]
        d_rows[own] = d_out[own] @ weights[group].T
        d_weights[group] = rows[own].T @ d_out[own]
        start += size
    return out, d_rows, d_weights


def run(multiply, rows, weights, d_out, sizes):
    out, transpose = jax.vjp(
        lambda *x: multiply(*x, jnp.asarray(sizes, jnp.int32)), rows, weights
    )
    return (out, *transpose(d_out))


def check(multiply, arrays, sizes=SIZES):
    for name, got, want in zip(
        ("out", "d_rows", "d_weights"),
        run(multiply, *arrays, sizes),
        expected(*arrays, sizes),
        strict=True,
    ):
        # Sums are float32, and only the result is rounded.
        rounding = 2.0**-8 if got.dtype == jnp.bfloat16 else 0
        limit = rounding * np.abs(want) + 1e-5 * np.abs(want).max()
        apart = np.abs(np.asarray(got, np.float64) - want)
        assert (apart <= limit).all(), (name, apart.max())
        np.testing.assert_array_equal(np.asarray(got, np.float64)[want == 0], 0)


def interpreted(columns, **options):
    tiles = hopper.Tiles(columns=columns, leaving=64, interpret=True, **options)
    return alone(hopper.make_kernels(tiles, tiles, tiles))


def alone(kernels):
    """The product with one matrix a group."""
    return lambda rows, weights, sizes: api.multiply_groups(
        kernels, rows, (weights,), sizes
    )[0]


@pytest.fixture
def interpreter():
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("this jax has no interpreter for Mosaic GPU")


@pytest.mark.usefixtures("interpreter")
def test_hopper_kernels_equal_float64():
    check(interpreted(128, stages=3), make_arrays())


@pytest.mark.usefixtures("interpreter")
def test_hopper_kernels_take_sizes_that_tiles_do_not_divide():
    """Widths of low-rank factors, and rows that are no multiple of anything."""
    arrays = make_arrays(rows=131, sizes=(5, 126), depth=24, width=8)
    check(interpreted(64, stages=2), arrays, (5, 126))


@pytest.mark.usefixtures("interpreter")
def test_hopper_kernels_take_two_matrices_of_a_group_together():
    """As gate and up: widths are no multiple of a tile's, and d_rows is one sum."""
    rows, gate, d_gate = make_arrays(width=192)
    up, d_up = jnp.flip(gate, 1), jnp.flip(d_gate, 1)
    tiles = hopper.Tiles(columns=128, stages=3, leaving=64, interpret=True)
    kernels = hopper.make_kernels(tiles, tiles, tiles)
    sizes = jnp.asarray(SIZES, jnp.int32)
    outs, transpose = jax.vjp(
        lambda rows, *both: api.multiply_groups(kernels, rows, both, sizes),
        rows,
        gate,
        up,
    )
    d_rows, *d_weights = transpose((d_gate, d_up))
    wants = [expected(rows, *each, SIZES) for each in ((gate, d_gate), (up, d_up))]
    want_rows = wants[0][1] + wants[1][1]
    pairs = [(d_rows, want_rows)]
    pairs += [(out, want[0]) for out, want in zip(outs, wants, strict=True)]
    pairs += [(x, want[2]) for x, want in zip(d_weights, wants, strict=True)]
    for got, want in pairs:
        limit = 2.0**-8 * np.abs(want) + 1e-5 * np.abs(want).max()
        assert (np.abs(np.asarray(got, np.float64) - want) <= limit).all()


def test_xla_equals_float64():
    multiply = functools.partial(grouped_matmul, implementation="xla")
    check(multiply, make_arrays(depth=24, width=8, dtype=jnp.float32))


def test_tiles_that_a_tpu_leaves_unwritten_are_zeros(monkeypatch):
    """Its kernel of ragged_dot visits tiles with groups only."""
    ragged_dot = jax.lax.ragged_dot

    @jax.custom_vjp
    def careless(rows, weights, sizes):
        return spoil(ragged_dot(rows, weights, sizes), sizes)

    def spoil(out, sizes):
        return jnp.where(jnp.arange(len(out))[:, None] < sizes.sum(), out, jnp.nan)

    def backward(kept, d_out):
        rows, weights, sizes = kept
        _, transpose = jax.vjp(lambda *x: ragged_dot(*x, sizes), rows, weights)
        d_rows, d_weights = transpose(d_out)
        return spoil(d_rows, sizes), d_weights, None

    careless.defvjp(lambda *x: (careless(*x), x), backward)
    monkeypatch.setattr(jax.lax, "ragged_dot", careless)
    tpu = types.SimpleNamespace(platform="tpu")
    multiply = functools.partial(grouped_matmul, device=tpu)
    check(multiply, make_arrays(depth=24, width=8, dtype=jnp.float32))


def memberships(length, plan):
    """Which group each row is in, [M E], as the plan tells it."""
    number = jnp.arange(length)[:, None]
    is_own = (plan.bounds[:-1] <= number) & (number < plan.bounds[1:])
    return is_own.astype(jnp.float32)


def plain(rows, weights, plan):
    """A kernel's contract in plain jax: it is told of groups by the plan alone."""
    own = memberships(len(rows), plan)
    return tuple(jnp.einsum("me,edf,md->mf", own, each, rows) for each in weights)


def plain_transposed(d_outs, weights, plan):
    own = memberships(len(d_outs[0]), plan)
    pairs = zip(d_outs, weights, strict=True)
    return sum(jnp.einsum("me,edf,mf->md", own, each, d_out) for d_out, each in pairs)


def plain_rows(rows, others, plan):
    own = memberships(len(rows), plan)
    return tuple(jnp.einsum("me,md,mf->edf", own, rows, each) for each in others)


PLAIN = api.Kernels(plain, plain_transposed, plain_rows, 8, 64)


def test_gradients_on_a_mesh_are_those_of_one_device():
    """Rows are split, weights are not: what devices find for these is added up."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    sizes = np.array([[40, 24], [10, 50]], np.int32)  # of each device's 64 rows
    rows, weights, d_out = make_arrays(128, (1, 1), 16, 8, jnp.float32)
    split, whole = PartitionSpec("data"), PartitionSpec()
    multiply = jax.shard_map(
        lambda x, w, s: alone(PLAIN)(x, w, s[0]),
        mesh=mesh,
        in_specs=(split, whole, split),
        out_specs=split,
        check_vma=False,  # as in `ShardingPlan.map_shards`
    )
    one_call = jax.jit(lambda *x: run(multiply, *x, sizes))
    out, d_rows, d_weights = one_call(rows, weights, d_out)
    halves = [slice(0, 64), slice(64, 128)]
    wants = [
        expected(rows[half], weights, d_out[half], own)
        for half, own in zip(halves, sizes, strict=True)
    ]
    for half, want in zip(halves, wants, strict=True):
        np.testing.assert_allclose(out[half], want[0], atol=1e-5)
        np.testing.assert_allclose(d_rows[half], want[1], atol=1e-5)
    np.testing.assert_allclose(d_weights, wants[0][2] + wants[1][2], atol=1e-4)


def test_experts_with_gate_and_up_in_one_product_equal_two(monkeypatch):
    """A copy for expert 4, which is none, adds nothing: so others' are left out."""
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 9, 6)), rng.uniform(size=(2, 9, 2))
    experts = rng.integers(0, 5, (2, 9, 2))
    shapes = ((4, 6, 5), (4, 6, 5), (4, 5, 6))
    stacks = [0.5 * rng.normal(size=shape) for shape in shapes]
    floats = [jnp.asarray(each, jnp.float32) for each in (x, weights, *stacks)]

    def outputs_and_gradients():
        def total(x, weights, *stacks):
            combine = lambda gate, up: jax.nn.silu(gate) * up  # noqa: E731
            y = moe.apply_experts(x, weights, experts, *stacks, combine=combine)
            return jnp.sin(y).sum(), y

        found = jax.value_and_grad(total, argnums=range(5), has_aux=True)
        return jax.tree.leaves(jax.jit(found)(*floats))

    two = outputs_and_gradients()
    monkeypatch.setattr(moe, "choose_implementation", lambda *_: "pallas_gpu")
    monkeypatch.setattr(api, "_refusal", lambda *_: None)
    monkeypatch.setattr(api, "_load_kernels", lambda: PLAIN)
    for got, want in zip(outputs_and_gradients(), two, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
        assert np.abs(want).max() > 0.1


@pytest.mark.slow
def test_a_tpu_multiplies_each_row_once():
    """XLA has a kernel there: no product of all rows with each group's matrix."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs jax[tpu]: libtpu compiles for a TPU that is not here")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    description = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    device = description.devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    multiply = functools.partial(grouped_matmul, device=device)
    step = jax.jit(lambda *x: run(multiply, *x[:3], x[3]))
    shapes = ((4096, 512), (16, 512, 256), (4096, 256))
    arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=here) for x in shapes]
    sizes = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=here)
    compiled = step.lower(*arrays, sizes).compile()
    once = 2 * 4096 * 512 * 256
    assert 3 * once <= compiled.cost_analysis()["flops"] < 3.2 * once
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 2 * 4096 * 512


@pytest.mark.parametrize("sizes", [SIZES, (0, 0, 392), (128, 128, 136), (0, 0, 0)])
def test_the_plan_names_all_groups_of_a_tile_and_the_longest_work_first(sizes):
    plan = make_plan(jnp.asarray(sizes, jnp.int32), ROWS)
    own = np.repeat(np.arange(len(sizes)), sizes)
    counts = np.asarray(plan.counts)
    for tile, (first, count) in enumerate(zip(plan.firsts, counts, strict=True)):
        met = own[tile * TILE : (tile + 1) * TILE]
        assert set(met) <= set(range(first, first + count)), tile
        assert not len(met) or (met[0], met[-1]) == (first, first + count - 1)
    assert sorted(plan.tiles.tolist()) == list(range(4))
    assert sorted(plan.groups.tolist()) == list(range(len(sizes)))
    assert (np.diff(counts[plan.tiles]) <= 0).all()
    assert (np.diff(np.asarray(sizes)[plan.groups]) <= 0).all()


def test_hopper_kernels_lower_for_cuda():
    arrays = make_arrays(depth=2048, width=1024)
    step = jax.jit(functools.partial(run, alone(hopper.make_kernels()), sizes=SIZES))
    program = step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @mosaic_gpu") == 3


def test_auto_takes_the_kernel_on_hopper_alone_and_tells_what_else_costs(caplog):
    def choose(capability, dtype=jnp.bfloat16, rows=256):
        gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        rows, weights, _ = make_arrays(rows, (3, 5), 16, 8, dtype)
        return api.choose_implementation(rows, weights, gpu)

    api._log_choice.cache_clear()
    with caplog.at_level("INFO"):
        assert choose("9.0") == "pallas_gpu"
    assert "auto chose pallas_gpu for 2 matrices of 16 x 8, bfloat16" in caplog.text
    assert choose("9.0", rows=255) == "xla"  # as in generation
    assert "WARNING" not in caplog.text
    assert choose("8.0") == "xla"
    assert "it needs a Hopper GPU" in caplog.text
    assert "2 times the work" in caplog.text
    assert choose("9.0", jnp.float32) == "xla"
    cpu = api.choose_implementation(*make_arrays(256, (3, 5), 16, 8)[:2], None)
    assert cpu == "xla"


def test_what_does_not_fit_is_refused_in_words():
    rows, weights, _ = make_arrays(8, (3, 5), 16, 8)
    sizes = jnp.asarray((3, 5), jnp.int32)
    with pytest.raises(ValueError, match=r"rows \(16, 8\).*need to be \[M D\]"):
        grouped_matmul(rows.T, weights, sizes)
    with pytest.raises(ValueError, match="rows of float32 and weights of bfloat16"):
        grouped_matmul(rows.astype(jnp.float32), weights, sizes)
    with pytest.raises(ValueError, match="'triton' is unknown; use one of auto, xla"):
        grouped_matmul(rows, weights, sizes, implementation="triton")
    with pytest.raises(NotImplementedError, match="it needs a Hopper GPU; use 'auto'"):
        grouped_matmul(rows, weights, sizes, implementation="pallas_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "depth", "width"),
    [(SIZES, 2048, 1024), ((392,), 64, 64), ((1, 0, 390), 192, 576), (SIZES, 8, 2048)],
)
def test_on_gpu_products_equal_float64(sizes, depth, width):
    arrays = make_arrays(sizes=sizes, depth=depth, width=width)
    try:
        multiply = functools.partial(grouped_matmul, implementation="pallas_gpu")
        check(multiply, arrays, sizes)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
