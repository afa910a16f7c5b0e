"""The gated delta rule against its recurrence in float64, and against transformers.

Pallas kernels run in interpret mode here, and are lowered for the devices they are for.
Gradients are compared with differences of the float64 recurrence along random
directions, and with PyTorch's of transformers' own chunks.
"""

import functools
import importlib.util
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.kernels.delta_rule import api, delta_rule, pallas_tpu, pallas_triton
from jaxtrain.kernels.delta_rule.chunks import EXACT
from jaxtrain.kernels.delta_rule.passes import run_rows

NAMES = ("q", "k", "v", "log_decay", "beta")
BATCH, LENGTH, KV_HEADS, HEADS, KEY, VALUE = 2, 150, 1, 2, 16, 32
INTERPRETED = {
    "pallas_triton": pallas_triton.make_passes(
        pallas_triton.Settings(
            walk=pallas_triton.Tiles(values=16),
            gradients=pallas_triton.Tiles(values=16),
        ),
        interpret=True,
    ),
    "pallas_tpu": pallas_tpu.make_passes(interpret=True),
}
CHUNKED = ("xla", *INTERPRETED)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Pallas kernels by name run here, interpreted."""
    compiled = api._load_passes
    monkeypatch.setattr(
        api, "_load_passes", lambda name: INTERPRETED.get(name) or compiled(name)
    )
    monkeypatch.setattr(api, "compute_capability", lambda device: 9.0)


def make_inputs(seed=0, length=LENGTH, dtype=np.float64):
    """Arguments, among them keys that repeat, strong decays and none, full updates."""
    rng = np.random.default_rng(seed)
    row = (BATCH, length)
    q, k = rng.normal(size=(2, *row, KV_HEADS, KEY))
    k[:, length // 2 : length // 2 + 30] = k[:, length // 2, None]
    v = rng.normal(size=(*row, HEADS, VALUE))
    strength = rng.choice([0.01, 1, 30], (*row, 1), p=[0.6, 0.35, 0.05])
    log_decay = -strength * rng.exponential(size=(*row, HEADS))
    beta = rng.uniform(size=(*row, HEADS)) ** rng.choice([0.01, 1], (*row, 1))
    return {
        n: x.astype(dtype)
        for n, x in zip(NAMES, (q, k, v, log_decay, beta), strict=True)
    }


def make_state(seed=1):
    return np.random.default_rng(seed).normal(size=(BATCH, HEADS, KEY, VALUE))


def make_ids(rng, length=LENGTH):
    """Documents packed at random, padding behind them."""
    rows = []
    for _ in range(BATCH):
        ends = np.sort(rng.choice(np.arange(1, length), rng.integers(0, 6)))
        row = np.searchsorted(ends, np.arange(length), side="right") + 1
        rows.append(np.where(np.arange(length) < length - rng.integers(0, 9), row, 0))
    return np.stack(rows)


def recurrence(inputs, ids=None, state=None):
    """The definition, token by token in float64: what tokens read, the last state."""
    q, k, v, log_decay, beta = (inputs[name].astype(np.float64) for name in NAMES)
    ids = np.ones(q.shape[:2], int) if ids is None else ids
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (
        np.repeat(x, v.shape[2] // k.shape[2], axis=2)
        for x in (q * q.shape[3] ** -0.5, k)
    )
    last = np.zeros((BATCH, HEADS, KEY, VALUE)) if state is None else state.copy()
    out = np.zeros(v.shape)
    for b, n in np.ndindex(*last.shape[:2]):
        S, document = last[b, n], None
        for t in np.flatnonzero(ids[b]):
            if document not in (None, ids[b, t]):
                S = np.zeros_like(S)
            document = ids[b, t]
            S = S * np.exp(log_decay[b, t, n])
            missing = v[b, t, n] - k[b, t, n] @ S
            S = S + beta[b, t, n] * np.outer(k[b, t, n], missing)
            out[b, t, n] = q[b, t, n] @ S
        last[b, n] = S
    return out, last


def single(inputs):
    return {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}


@functools.cache
def compiled(name, with_state=True):
    def loss(inputs, state, ids, weights):
        got = delta_rule(
            **inputs,
            segment_ids=ids,
            initial_state=state if with_state else None,
            implementation=name,
        )
        return sum((x * w).sum() for x, w in zip(got, weights, strict=True)), got

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def largest_error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", ["recurrent", *CHUNKED])
def test_values_and_gradients_are_those_of_the_recurrence(name):
    rng = np.random.default_rng(0)
    inputs, state, ids = make_inputs(), make_state(), make_ids(rng)
    want = recurrence(inputs, ids, state)
    weights = [rng.normal(size=x.shape) for x in want]
    (_, got), (d_inputs, d_state) = compiled(name)(
        single(inputs), jnp.asarray(state, jnp.float32), ids, weights
    )
    for a, b in zip(got, want, strict=True):
        assert largest_error(a, b) < 1e-5
    gradients = {**d_inputs, "state": d_state}
    at = {**inputs, "state": state}
    for argument, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        step = 1e-6
        values = []
        for sign in (1, -1):
            moved = {**at, argument: at[argument] + sign * step * direction}
            ends = recurrence(moved, ids, moved["state"])
            values.append(
                sum((x * w).sum() for x, w in zip(ends, weights, strict=True))
            )
        slope = (values[0] - values[1]) / (2 * step)
        along = (np.asarray(gradient, np.float64) * direction).sum()
        size = np.sqrt((np.asarray(gradient, np.float64) ** 2).sum())
        assert abs(along - slope) < 2e-5 * size, argument


@pytest.mark.parametrize(
    "seed",
    [0, *(pytest.param(n, marks=pytest.mark.on_request) for n in range(1, 6))],
)
def test_a_packed_row_is_its_documents_alone(seed):
    rng = np.random.default_rng(seed)
    inputs, ids = make_inputs(seed), make_ids(rng)
    weights = [rng.normal(size=(BATCH, LENGTH, HEADS, VALUE)), 0.0]
    weights[0] *= (ids != 0)[:, :, None, None]
    packed = compiled("xla", False)(single(inputs), None, ids, weights)
    (_, (out, _)), (gradients, _) = packed
    for b in range(BATCH):
        for document in set(ids[b]) - {0}:
            own = ids[b] == document
            where = np.flatnonzero(own)
            moved = {name: np.zeros_like(x) for name, x in inputs.items()}
            alone = [np.zeros_like(weights[0]), 0.0]
            for name, x in inputs.items():
                moved[name][b, : len(where)] = x[b, where]
            alone[0][b, : len(where)] = weights[0][b, where]
            own_ids = np.zeros_like(ids)
            own_ids[b, : len(where)] = 1
            (_, (want, _)), (d_want, _) = compiled("xla", False)(
                single(moved), None, own_ids, alone
            )
            np.testing.assert_allclose(
                out[b, where], want[b, : len(where)], rtol=0, atol=1e-5
            )
            for name, gradient in gradients.items():
                a, c = np.asarray(gradient)[b, where], d_want[name][b, : len(where)]
                scale = max(1.0, np.abs(c).max())
                np.testing.assert_allclose(a, c, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", CHUNKED)
def test_padding_holds_anything_and_gets_no_gradient(name):
    rng = np.random.default_rng(3)
    inputs, ids, state = make_inputs(), make_ids(rng), make_state()
    ids[0, :5] = ids[1, 70:75] = 0
    want = recurrence(inputs, ids, state)
    for x in inputs.values():
        x[ids == 0] = np.nan
    weights = [rng.normal(size=x.shape) for x in want]
    (_, got), (d_inputs, _) = compiled(name)(
        single(inputs), jnp.asarray(state, jnp.float32), ids, weights
    )
    for a, b in zip(got, want, strict=True):
        assert largest_error(a, b) < 1e-5
    for gradient in d_inputs.values():
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient)[ids == 0].any()


def test_a_row_may_be_run_in_pieces():
    inputs = make_inputs()
    want = recurrence(inputs)
    state, pieces = jnp.zeros((BATCH, HEADS, KEY, VALUE)), []
    run = jax.jit(lambda piece, state: delta_rule(**piece, initial_state=state))
    for start, stop in ((0, 67), (67, 68), (68, LENGTH)):
        piece = {n: x[:, start:stop] for n, x in single(inputs).items()}
        out, state = run(piece, state)
        pieces.append(out)
    assert largest_error(np.concatenate(pieces, axis=1), want[0]) < 1e-5
    assert largest_error(state, want[1]) < 1e-5


@pytest.mark.parametrize("name", CHUNKED)
def test_bfloat16_loses_no_more_than_its_own_digits(name):
    inputs = {n: jnp.asarray(x, jnp.bfloat16) for n, x in make_inputs(2).items()}
    rounded = {n: np.asarray(x, np.float64) for n, x in inputs.items()}
    want, last = recurrence(rounded)
    out, state = jax.jit(functools.partial(delta_rule, implementation=name))(**inputs)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert largest_error(out.astype(jnp.float32), want) < 0.02
    assert largest_error(state, last) < 0.02


def test_the_inverse_is_exact_where_powers_grow():
    """All ones below the diagonal: powers reach 1e18, the inverse has 1 and -1."""
    length = 64
    strict = np.tril(np.ones((length, length)), -1)
    want = np.eye(length) - np.eye(length, k=-1)
    got = EXACT.invert_unit_lower(jnp.asarray(strict, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-6)
    cotangent = np.random.default_rng(0).normal(size=strict.shape)
    slope = -want.T @ cotangent @ want.T
    _, transpose = jax.vjp(EXACT.invert_unit_lower, jnp.asarray(strict, jnp.float32))
    (gradient,) = transpose(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_allclose(gradient, slope, atol=1e-5)


def test_values_and_gradients_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    rng = np.random.default_rng(4)
    inputs, state = make_inputs(4), make_state()
    tensors = {
        n: torch.tensor(x, dtype=torch.float32, requires_grad=True)
        for n, x in inputs.items()
    }
    first = torch.tensor(state, dtype=torch.float32, requires_grad=True)
    want = modeling.torch_chunk_gated_delta_rule(
        *(tensors[name] for name in NAMES[:3]),
        g=tensors["log_decay"],
        beta=tensors["beta"],
        initial_state=first,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    weights = [rng.normal(size=x.shape) for x in want]
    sum(
        (x * torch.tensor(w)).sum() for x, w in zip(want, weights, strict=True)
    ).backward()
    (_, got), (d_inputs, d_state) = compiled("xla")(
        single(inputs),
        jnp.asarray(state, jnp.float32),
        np.ones((BATCH, LENGTH), int),
        weights,
    )
    for a, b in zip(got, want, strict=True):
        assert largest_error(a, b.detach().numpy()) < 1e-4
    for name, tensor in (*tensors.items(), ("state", first)):
        gradient = {**d_inputs, "state": d_state}[name]
        assert largest_error(gradient, tensor.grad.numpy()) < 1e-4, name


def mesh_of(shape, names):
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)


def test_a_mesh_changes_no_number():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    rng = np.random.default_rng(5)
    inputs, ids = single(make_inputs()), make_ids(rng)
    inputs["q"], inputs["k"] = (jnp.repeat(inputs[n], 2, axis=2) for n in "qk")
    layout = Layout(mesh_of((2, 2), ("data", "model")), ("data",), ("model",))
    run = functools.partial(delta_rule, segment_ids=ids)

    def gradient(layout):
        def loss(inputs):
            out, state = run(**inputs, layout=layout)
            return (out**2).sum() + (state**3).sum()

        return jax.jit(jax.value_and_grad(loss))(inputs)

    for a, b in zip(*map(jax.tree.leaves, map(gradient, (layout, None))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_mesh_may_not_cut_rows():
    layout = Layout(
        mesh_of((1, 2), ("data", "context")), ("data",), tokens=("context",)
    )
    with pytest.raises(ValueError, match=r"depends on every.*mesh\.context = 1"):
        delta_rule(**single(make_inputs()), layout=layout)


@pytest.mark.parametrize(
    ("name", "platform", "call"),
    [("pallas_triton", "cuda", "triton"), ("pallas_tpu", "tpu", "tpu_custom_call")],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kernels_lower_for_their_device(name, platform, call, dtype):
    module = {"pallas_triton": pallas_triton, "pallas_tpu": pallas_tpu}[name]

    def loss(features, gates, restarts, state):
        rows = api._rows(features, gates, restarts)
        out, last = run_rows(module.make_passes(), rows, state)
        return out.astype(jnp.float32).sum() + last.sum()

    row = (2, 190)
    key, value = (jax.ShapeDtypeStruct((*row, n, 128), dtype) for n in (2, 4))
    gate = jax.ShapeDtypeStruct((*row, 4), jnp.float32)
    state = jax.ShapeDtypeStruct((2, 4, 128, 128), jnp.float32)
    restarts = jax.ShapeDtypeStruct(row, bool)
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 3)))
    traced = step.trace((key, key, value), (gate, gate), restarts, state)
    try:
        program = traced.lower(lowering_platforms=(platform,)).as_text()
    except RuntimeError as error:
        if "No supported GPU devices" not in str(error):
            raise
        pytest.skip("this jax lowers Triton kernels only where a GPU is")
    assert program.count(call) >= 3


@pytest.mark.parametrize(
    ("platform", "width", "length", "chosen"),
    [
        ("gpu", 128, 64, "pallas_triton"),
        ("gpu", 96, 64, "xla"),
        ("gpu", 128, 1, "recurrent"),
        ("tpu", 96, 64, "pallas_tpu"),
        ("cpu", 128, 64, "xla"),
    ],
)
def test_the_choice_is_logged(monkeypatch, caplog, platform, width, length, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    api._log_choice.cache_clear()
    k = v = jax.ShapeDtypeStruct((1, length, 4, width), jnp.bfloat16)
    with caplog.at_level(logging.INFO):
        assert api._choose(k, v, None) == chosen
    assert f"auto chose {chosen} for 4 heads of {width}" in caplog.text
    refuses = (platform, chosen) == ("gpu", "xla")
    assert ("width is 96, not a power of 2" in caplog.text) == refuses


def test_what_cannot_be_is_refused(monkeypatch):
    inputs = single(make_inputs(length=4))
    with pytest.raises(ValueError, match="'fast' is unknown; use one of auto"):
        delta_rule(**inputs, implementation="fast")
    with pytest.raises(ValueError, match="do not fit: q and k need one shape"):
        delta_rule(**inputs | {"q": inputs["q"][:, :2]})
    monkeypatch.setattr(api, "compute_capability", lambda device: None)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        delta_rule(**inputs, implementation="pallas_triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "widths", "dtype"),
    [
        ("v5e:2x2", (128, 128), jnp.bfloat16),
        ("v5p:2x2x1", (128, 128), jnp.float32),
        ("v6e:2x2", (64, 96), jnp.bfloat16),
    ],
)
def test_tpu_kernels_compile_for_a_mesh(monkeypatch, topology, widths, dtype):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs jax[tpu]: libtpu compiles for a TPU that is not here")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(description.devices).reshape(2, 2), ("data", "tensor"))
    layout = Layout(mesh, ("data",), ("tensor",))
    monkeypatch.setattr(api, "_load_passes", lambda name: pallas_tpu.make_passes())

    def loss(inputs, ids):
        out, state = delta_rule(
            **inputs, segment_ids=ids, implementation="pallas_tpu", layout=layout
        )
        return out.astype(jnp.float32).sum() + state.sum()

    rows, split = PartitionSpec("data"), PartitionSpec("data", None, "tensor")

    def shape_of(*tail, dtype=dtype):
        sharding = NamedSharding(mesh, split if tail else rows)
        return jax.ShapeDtypeStruct((4, 300, *tail), dtype, sharding=sharding)

    features = (shape_of(2, widths[0]), shape_of(2, widths[0]), shape_of(4, widths[1]))
    gates = (shape_of(4, dtype=jnp.float32),) * 2
    inputs = dict(zip(NAMES, (*features, *gates), strict=True))
    step = jax.jit(jax.value_and_grad(loss))
    program = step.lower(inputs, shape_of(dtype=jnp.int32)).compile().as_text()
    assert program.count("tpu_custom_call") >= 3
    assert "all-gather" not in program
