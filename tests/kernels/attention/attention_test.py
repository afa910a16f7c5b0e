"""One suite for every attention implementation; flags say what each one can do.

The yardstick is float64 numpy. Pallas kernels run in interpret mode here; on a GPU
machine (JAXTRAIN_TEST_PLATFORM=cuda) the `gpu` cases run the compiled ones.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxtrain.kernels.attention import IMPLEMENTATIONS, api, attention, plan_attention
from jaxtrain.kernels.attention.blocked import attention_blocked, plan
from jaxtrain.kernels.attention.cudnn import attention_cudnn, compute_capability
from jaxtrain.kernels.attention.hopper import Tiles
from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.pallas_gpu import KERNELS as HOPPER
from jaxtrain.kernels.attention.pallas_gpu import with_tiles
from jaxtrain.kernels.attention.pallas_tpu import KERNELS as TPU
from jaxtrain.kernels.attention.pallas_triton import KERNELS as TRITON
from jaxtrain.kernels.attention.reference import attention_reference
from jaxtrain.kernels.attention.xla import attention_xla
from jaxtrain.kernels.attention.xla_blocks import with_blocks


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How to call one implementation here, and what it can do."""

    call: Callable[..., jax.Array]
    dtype: jnp.dtype = jnp.float32
    softcap: bool = True
    not_causal: bool = True
    sinks: bool = True
    uneven: bool = True  # values of another width than keys
    slow: bool = False
    # Cases that run by default; of those left out random masks show the same.
    chosen: tuple[str, ...] | None = None
    width: int = 256  # of a head, at most


def interpreted(kernels):
    return functools.partial(attention_blocked, kernels, interpret=True)


def through_api(name):
    def call(q, k, v, mask, *, softcap, scale, sinks=None):
        return attention(
            q,
            k,
            v,
            segment_ids=mask.segment_ids,
            prompt_ids=mask.prompt_ids,
            causal=mask.causal,
            window=mask.window,
            softcap=softcap,
            scale=scale,
            sinks=sinks,
            implementation=name,
        )

    return call


def cudnn_directly(q, k, v, mask, *, softcap, scale, sinks):
    assert softcap is None and sinks is None
    return attention_cudnn(q, k, v, mask, scale=scale)


BLOCKS = with_blocks(32)
CPU = {
    "reference": Implementation(attention_reference),
    "xla": Implementation(attention_xla),
    "xla_chunked": Implementation(
        functools.partial(attention_xla, chunk=11),
        chosen=("shared_prompt", "part", "part_all_to_all", "sinks_part", "wide_keys"),
    ),
    "xla_blocks": Implementation(
        functools.partial(attention_blocked, BLOCKS),
        chosen=("all_to_all", "packed_softcap", "shared_prompt", "wide_keys"),
    ),
    "pallas_tpu": Implementation(interpreted(TPU)),
    "pallas_triton": Implementation(interpreted(TRITON)),
    "pallas_gpu": Implementation(interpreted(HOPPER), dtype=jnp.bfloat16, slow=True),
}
GPU = {
    "cudnn": Implementation(
        through_api("cudnn"), jnp.bfloat16, softcap=False, sinks=False, uneven=False
    ),
    "pallas_triton": Implementation(through_api("pallas_triton"), jnp.bfloat16),
    "pallas_gpu": Implementation(through_api("pallas_gpu"), jnp.bfloat16),
    "xla_blocks": Implementation(through_api("xla_blocks"), jnp.bfloat16),
    "auto": Implementation(through_api("auto"), jnp.bfloat16),
}
# Below the API, which takes whole rows and cuts them itself.
GPU_PARTS = {
    "cudnn": Implementation(
        cudnn_directly,
        jnp.bfloat16,
        softcap=False,
        sinks=False,
        uneven=False,
        width=128,
    ),
    "pallas_triton": Implementation(
        functools.partial(attention_blocked, TRITON), jnp.bfloat16
    ),
    "pallas_gpu": Implementation(
        functools.partial(attention_blocked, HOPPER), jnp.bfloat16
    ),
    "xla_blocks": Implementation(
        functools.partial(attention_blocked, BLOCKS), jnp.bfloat16
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one call; `lengths` are documents, `padding` follows."""

    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    lengths: tuple[int, ...] | None = None
    padding: int = 0
    length: int = 200
    shared_prompt: bool = False
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    value_width: int | None = None  # that of keys by default
    part: tuple[int, int] | None = None  # first query of the row, and past the last

    def mask(self):
        mask = self._mask_of_row()
        return mask if self.part is None else part_of(mask, *self.part)

    def _mask_of_row(self):
        if self.lengths is None:
            return Mask(None, None, self.causal, self.window)
        numbers = np.repeat(np.arange(1, len(self.lengths) + 1), self.lengths)
        row = np.pad(numbers, (0, self.padding))
        other = row.copy()
        other[: self.lengths[0] // 2] = 0  # padding in front as well
        segments = jnp.asarray(np.stack([row, other]), jnp.int32)
        prompts = None
        if self.shared_prompt:  # documents 1, 2, 3: a prompt and its two responses
            prompts = jnp.where((segments == 2) | (segments == 3), 1, 0)
        return Mask(segments, prompts, self.causal, self.window)

    def counts(self):
        """Queries and keys."""
        length = self.length
        if self.lengths is not None:
            length = sum(self.lengths) + self.padding
        if self.part is None:
            return length, length
        start, stop = self.part
        return stop - start, stop if self.causal else length


def part_of(mask, start, stop):
    """Of these queries, and of the keys they may read."""

    def cut(ids, start, stop):
        return None if ids is None else ids[:, start:stop]

    return dataclasses.replace(
        mask,
        segment_ids=cut(mask.segment_ids, start, stop),
        prompt_ids=cut(mask.prompt_ids, start, stop),
        key_ids=cut(mask.segment_ids, 0, stop if mask.causal else None),
        offset=start,
    )


CASES = {
    "causal": Case(),
    "all_to_all": Case(causal=False, heads=2, kv_heads=1, length=130),
    "window": Case(window=37, kv_heads=4),
    "packed_softcap": Case(lengths=(70, 3, 90), padding=30, softcap=4.0, width=24),
    "shared_prompt": Case(lengths=(64, 50, 40, 20), padding=5, shared_prompt=True),
    "packed_window": Case(lengths=(100, 60), window=20, heads=3, kv_heads=1),
    # Documents go on over both ends; keys fill more blocks than queries, and the
    # window leaves the first of them out.
    "part": Case(
        lengths=(140, 90, 60), window=70, shared_prompt=True, heads=2, part=(200, 270)
    ),
    "part_all_to_all": Case(causal=False, softcap=4.0, heads=2, part=(30, 130)),
    "sinks": Case(
        lengths=(70, 40, 60), padding=30, shared_prompt=True, window=50, sinks=True
    ),
    "sinks_part": Case(
        lengths=(140, 90, 60), softcap=4.0, heads=2, part=(200, 270), sinks=True
    ),
    "wide_keys": Case(lengths=(100, 60), padding=9, width=24, value_width=16, heads=6),
    "wide_values": Case(length=130, width=8, value_width=40, heads=2, kv_heads=1),
}


def make_inputs(case, dtype, seed=0):
    """(q, k, v, cotangent) of two rows."""
    rng = np.random.default_rng(seed)
    queries, keys = case.counts()

    def draw(length, heads, width):
        return jnp.asarray(rng.normal(size=(2, length, heads, width)), dtype)

    value_width = case.value_width or case.width
    return (
        draw(queries, case.heads, case.width),
        draw(keys, case.kv_heads, case.width),
        draw(keys, case.kv_heads, value_width),
        draw(queries, case.heads, value_width),
    )


def make_sinks(case):
    """None, or a logit a head, some of which outweigh all others."""
    if not case.sinks:
        return None
    return jnp.asarray(np.linspace(-2.0, 6.0, case.heads), jnp.float32)


def allowed_pairs(mask, queries, keys):
    """The rule of masks.py once more, in numpy."""
    t, s = np.ogrid[mask.offset : mask.offset + queries, :keys]
    allowed = np.ones((2, queries, keys), bool)
    if mask.causal:
        allowed &= s <= t
    if mask.window is not None:
        allowed &= t - s < mask.window
    if mask.segment_ids is not None:
        key_ids = mask.keys[:, None, :]
        query_ids = mask.segment_ids[:, :, None]
        same = query_ids == key_ids
        if mask.prompt_ids is not None:
            same |= mask.prompt_ids[:, :, None] == key_ids
        allowed &= same & (query_ids > 0) & (key_ids > 0)
    return allowed


def attend_in_float64(q, k, v, d_out, mask, softcap, scale, sinks=None):
    """(out, dq, dk, dv) by the textbook, in float64, and d_sinks with sinks."""
    mask = jax.tree.map(np.asarray, mask)
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (np.repeat(x, group, axis=2) for x in (k, v))
    raw = np.einsum("btnh,bsnh->bnts", q, wide_k) * scale
    chain = np.full_like(raw, scale)
    logits = raw
    if softcap is not None:
        logits = softcap * np.tanh(raw / softcap)
        chain *= 1 - np.tanh(raw / softcap) ** 2
    allowed = allowed_pairs(mask, q.shape[1], k.shape[1])[:, None]
    p = np.where(allowed, np.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        sinks = np.asarray(sinks, np.float64)[:, None, None]
        of_sink = np.exp(sinks - logits.max(-1, keepdims=True))
        total += of_sink
    p /= np.where(total == 0, 1.0, total)
    out = np.einsum("bnts,bsnh->btnh", p, wide_v)
    dp = np.einsum("btnh,bsnh->bnts", d_out, wide_v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * chain
    dq = np.einsum("bnts,bsnh->btnh", ds, wide_k)
    dk = np.einsum("bnts,btnh->bsnh", ds, q)
    dv = np.einsum("bnts,btnh->bsnh", p, d_out)
    gradients = [x.reshape(*k.shape[:3], group, -1).sum(3) for x in (dk, dv)]
    if sinks is not None:
        # The derivative of a softmax by its last logit, whose value is nothing.
        gradients.append(-(of_sink / total * (p * dp).sum(-1, keepdims=True)))
        gradients[-1] = gradients[-1].sum((0, 2, 3))
    return out, dq, *gradients


def run_with_gradients(implementation, case, inputs):
    """(out, dq, dk, dv) in float32 numpy, and d_sinks where the case has sinks."""
    mask = case.mask()
    call = functools.partial(
        implementation.call, softcap=case.softcap, scale=case.width**-0.5
    )

    @jax.jit
    def run(q, k, v, d_out, mask, sinks):
        def attend(q, k, v, sinks):
            return call(q, k, v, mask, sinks=sinks)

        out, pull = jax.vjp(attend, q, k, v, sinks)
        return out, *(x for x in pull(d_out) if x is not None)

    outputs = run(*inputs, mask, make_sinks(case))
    return [np.asarray(x, np.float32) for x in outputs]


def compare_with_float64(implementation, case, inputs):
    want = attend_in_float64(
        *inputs, case.mask(), case.softcap, case.width**-0.5, make_sinks(case)
    )
    names = ("out", "dq", "dk", "dv", "d_sinks")[: len(want)]
    got = run_with_gradients(implementation, case, inputs)
    # Rounding to bfloat16 (8 bits) of values up to a few units.
    tolerance = 2e-5 if implementation.dtype == jnp.float32 else 2e-2
    for name, have, expected in zip(names, got, want, strict=True):
        bound = tolerance * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(have, expected, rtol=0, atol=bound, err_msg=name)


def serves(implementation, case):
    if case.softcap is not None and not implementation.softcap:
        return False
    if max(case.width, case.value_width or 0) > implementation.width:
        return False
    if case.sinks and not implementation.sinks:
        return False
    if case.value_width is not None and not implementation.uneven:
        return False
    return case.causal or implementation.not_causal


def cases_of(implementations):
    for name, implementation in implementations.items():
        for case_name, case in CASES.items():
            if not serves(implementation, case):
                continue
            quick = not implementation.slow or case_name in ("sinks", "part")
            marks = [] if quick else [pytest.mark.slow]
            if case_name not in (implementation.chosen or CASES):
                marks.append(pytest.mark.on_request)
            yield pytest.param(
                implementation, case, id=f"{name}-{case_name}", marks=marks
            )


def skip_without_interpreter(implementation):
    if implementation is CPU["pallas_gpu"] and not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("this jax has no interpreter for Mosaic GPU")


def skip_without_hopper():
    if int(compute_capability() or 0) != 9:
        pytest.skip("needs a Hopper GPU")


@pytest.mark.parametrize(("implementation", "case"), list(cases_of(CPU)))
def test_output_and_gradients_equal_float64(implementation, case):
    skip_without_interpreter(implementation)
    compare_with_float64(implementation, case, make_inputs(case, implementation.dtype))


@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(take_turns=False),
        Tiles(forward_step=64, forward_stages=3),
        Tiles(forward_programs=1),
    ],
    ids=["no_turns", "three_stages", "one_program"],
)
def test_hopper_tiles_change_no_output(tiles):
    """Four blocks of the rows are padding, of which no key is read."""
    skip_without_interpreter(CPU["pallas_gpu"])
    case = dataclasses.replace(CASES["shared_prompt"], padding=500, heads=2, kv_heads=1)
    q, k, v, _ = make_inputs(case, jnp.bfloat16)
    options = {"softcap": None, "scale": 0.25}
    got = interpreted(with_tiles(tiles))(q, k, v, case.mask(), **options)
    want = attention_reference(q, k, v, case.mask(), **options)
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), rtol=0, atol=3e-2
    )


GPU_WIDTHS = [(name, 128) for name, case in CASES.items() if case.part is None]
GPU_WIDTHS += [("shared_prompt", width) for width in (64, 80, 96, 192, 256)]
GPU_WIDTHS += [("wide_keys", 192), ("sinks", 64)]


@pytest.mark.gpu
@pytest.mark.parametrize(("case_name", "width"), GPU_WIDTHS)
@pytest.mark.parametrize("name", list(GPU))
def test_on_gpu_output_and_gradients_equal_float64(name, case_name, width):
    implementation = GPU[name]
    case = dataclasses.replace(CASES[case_name], width=width)
    if case.value_width is not None:
        case = dataclasses.replace(case, value_width=128 if width == 192 else 256)
    if not serves(implementation, case):
        pytest.skip(f"{name} does not serve this")
    inputs = make_inputs(case, implementation.dtype)
    try:
        compare_with_float64(implementation, case, inputs)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))


PART_CASES = {name: case for name, case in CASES.items() if case.part is not None}
PART_CASES["part_of_many_blocks"] = Case(
    lengths=(350, 6, 400, 144),
    padding=40,
    shared_prompt=True,
    heads=8,
    part=(470, 770),
)
PART_CASES["part_window"] = Case(length=900, window=300, part=(334, 700))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("case_name", PART_CASES)
@pytest.mark.parametrize("name", GPU_PARTS)
def test_on_gpu_a_part_of_a_row_equals_float64(name, case_name, width):
    implementation = GPU_PARTS[name]
    case = dataclasses.replace(PART_CASES[case_name], width=width)
    if not serves(implementation, case):
        pytest.skip(f"{name} does not serve this")
    if name == "pallas_gpu":
        skip_without_hopper()
    inputs = make_inputs(case, implementation.dtype)
    compare_with_float64(implementation, case, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 3, 500])
def test_on_gpu_tiles_of_few_programs_equal_float64(programs):
    """Each takes many tiles in turn; rows of padding have no keys at all."""
    skip_without_hopper()
    case = dataclasses.replace(CASES["shared_prompt"], width=128, padding=400, heads=8)
    kernels = with_tiles(Tiles(forward_programs=programs, dq_programs=programs))
    call = functools.partial(attention_blocked, kernels)
    inputs = make_inputs(case, jnp.bfloat16)
    compare_with_float64(Implementation(call, jnp.bfloat16), case, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pallas_triton", "pallas_gpu", "xla_blocks"])
def test_on_gpu_two_runs_agree_to_the_bit(name):
    case = dataclasses.replace(CASES["shared_prompt"], width=128)
    inputs = make_inputs(case, jnp.bfloat16)
    try:
        once = run_with_gradients(GPU[name], case, inputs)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    again = run_with_gradients(GPU[name], case, inputs)
    for first, second in zip(once, again, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", CPU)
def test_nan_in_padding_reaches_no_output_and_no_gradient(name):
    case = Case(lengths=(70, 30), padding=60, heads=2, kv_heads=1)
    skip_without_interpreter(CPU[name])
    inputs = make_inputs(case, CPU[name].dtype)
    padding = (case.mask().segment_ids == 0)[:, :, None, None]
    clean = [jnp.where(padding, 0.0, x) for x in inputs]
    poisoned = [jnp.where(padding, jnp.nan, x) for x in inputs]
    want = run_with_gradients(CPU[name], case, clean)
    got = run_with_gradients(CPU[name], case, poisoned)
    for have, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(have, expected)
        assert not have[np.broadcast_to(padding, have.shape)].any()


@functools.cache
def compiled_xla(window):
    """Chunks of 16 in a row of 70, jitted once for all examples."""

    def run(q, k, v, d_out, segments, prompts):
        mask = Mask(segments, prompts, True, window)
        call = functools.partial(attention_xla, softcap=None, scale=0.5, chunk=16)
        out, pull = jax.vjp(lambda q, k, v: call(q, k, v, mask), q, k, v)
        return out, *pull(d_out)

    return jax.jit(run)


@given(st.data(), st.sampled_from([None, 1, 20]))
def test_xla_agrees_with_float64_for_any_ids(data, window):
    """Ids in no order, segments of one token, rows that are all padding."""
    ids = st.lists(st.integers(0, 3), min_size=70, max_size=70)
    segments = jnp.asarray([data.draw(ids), [0] * 70], jnp.int32)
    prompts = jnp.asarray([data.draw(ids), data.draw(ids)], jnp.int32)
    inputs = make_inputs(Case(length=70, heads=2, kv_heads=1, width=4), jnp.float32)
    mask = Mask(segments, prompts, True, window)
    want = attend_in_float64(*inputs, mask, None, 0.5)
    got = compiled_xla(window)(*inputs, segments, prompts)
    for have, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(have, expected, rtol=0, atol=2e-5)


RANDOM_LENGTH = 150


RANDOM_CASES = {
    "whole": Case(length=RANDOM_LENGTH, heads=2, kv_heads=1),
    "part": Case(length=RANDOM_LENGTH, heads=2, kv_heads=1, part=(31, 141)),
    "sinks": Case(
        length=RANDOM_LENGTH,
        heads=2,
        kv_heads=1,
        window=40,
        value_width=8,
        sinks=True,
    ),
}


@functools.cache
def compiled_kernel(name):
    """Jitted once: only ids differ between examples."""

    def run(q, k, v, d_out, mask, sinks):
        def call(q, k, v, sinks):
            options = {"softcap": None, "scale": 0.25, "sinks": sinks}
            return CPU[name].call(q, k, v, mask, **options)

        out, pull = jax.vjp(call, q, k, v, sinks)
        return out, *(x for x in pull(d_out) if x is not None)

    return jax.jit(run)


@pytest.mark.parametrize("case", RANDOM_CASES.values(), ids=list(RANDOM_CASES))
@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_triton", "xla_blocks"])
@settings(max_examples=8)
@given(st.integers(0, 2**31))
def test_kernels_agree_with_float64_for_random_masks(name, case, seed):
    rng = np.random.default_rng(seed)
    inputs = make_inputs(case, jnp.float32, seed)
    cuts = rng.integers(1, 40, size=(2, RANDOM_LENGTH))
    segments = _random_segments(rng, cuts)
    prompts = np.where(rng.random(segments.shape) < 0.5, segments - 1, 0).clip(0)
    mask = Mask(jnp.asarray(segments), jnp.asarray(prompts), window=case.window)
    if case.part is not None:
        mask = part_of(mask, *case.part)
    sinks = make_sinks(case)
    want = attend_in_float64(*inputs, mask, None, 0.25, sinks)
    got = compiled_kernel(name)(*inputs, mask, sinks)
    for have, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(have, expected, rtol=0, atol=5e-5)


def _random_segments(rng, cuts):
    """Documents of random lengths, some of them padding."""
    rows = []
    for row in cuts:
        ids = np.repeat(np.arange(1, len(row) + 1), row)[:RANDOM_LENGTH]
        rows.append(np.where(rng.random(len(row) + 1)[ids] < 0.2, 0, ids))
    return np.stack(rows).astype(np.int32)


def test_a_packed_row_equals_its_documents_alone():
    case = Case(lengths=(30, 50), padding=10)
    q, k, v, _ = make_inputs(case, jnp.float32)
    packed = attention(q, k, v, segment_ids=case.mask().segment_ids)
    for start, stop in ((0, 30), (30, 80)):
        alone = attention(q[:1, start:stop], k[:1, start:stop], v[:1, start:stop])
        np.testing.assert_allclose(packed[:1, start:stop], alone, atol=1e-6)


def test_a_shared_prompt_equals_two_rows_that_repeat_it():
    prompt, chosen, rejected = 20, 14, 9
    case = Case(lengths=(prompt, chosen, rejected), shared_prompt=True)
    q, k, v, _ = make_inputs(case, jnp.float32)
    q, k, v = q[:1], k[:1], v[:1]
    segments = jnp.asarray(np.repeat([[1, 2, 3]], [20, 14, 9], axis=1), jnp.int32)
    prompts = jnp.where(segments > 1, 1, 0)
    shared = attention(q, k, v, segment_ids=segments, prompt_ids=prompts)
    first = attention(*(x[:, : prompt + chosen] for x in (q, k, v)))
    np.testing.assert_allclose(shared[:, : prompt + chosen], first, atol=1e-6)
    keep = np.r_[0:prompt, prompt + chosen : prompt + chosen + rejected]
    second = attention(*(x[:, keep] for x in (q, k, v)))
    np.testing.assert_allclose(shared[:, 34:], second[:, prompt:], atol=1e-6)


def test_one_token_attends_to_itself():
    q, k, v, _ = make_inputs(Case(length=1), jnp.float32)
    np.testing.assert_allclose(attention(q, k, v), jnp.repeat(v, 2, axis=2))


def test_xla_memory_grows_with_the_chunk_not_with_the_row_squared():
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)
    loss = lambda q, k, v: attention(q, k, v, implementation="xla").sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    scores = 2 * 4096 * 4096 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_triton"])
def test_a_schedule_made_once_gives_the_same_output(name):
    kernels = {"pallas_tpu": TPU, "pallas_triton": TRITON}[name]
    case = CASES["shared_prompt"]
    q, k, v, _ = make_inputs(case, jnp.float32)
    mask = case.mask()
    call = functools.partial(
        attention_blocked, kernels, q, k, v, mask, softcap=None, scale=0.25
    )
    schedule = plan(kernels, mask, *mask.segment_ids.shape)
    once = call(schedule=schedule, interpret=True)
    np.testing.assert_array_equal(once, call(interpret=True))
    ids = {"segment_ids": mask.segment_ids, "prompt_ids": mask.prompt_ids}
    planned = plan_attention(q, **ids, implementation=name)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, schedule, planned))
    assert plan_attention(q, **ids, implementation="xla") is None


def test_auto_logs_its_choice_once(caplog, monkeypatch):
    monkeypatch.setattr(api, "_logged", set())  # what other tests' calls told
    q, k, v, _ = make_inputs(Case(length=7, width=6), jnp.float32)
    with caplog.at_level(logging.INFO):
        attention(q, k, v)
        attention(q, k, v)
    lines = [r.message for r in caplog.records if "auto chose" in r.message]
    assert len(lines) == 1 and "xla" in lines[0]


@pytest.mark.parametrize("name", ["cudnn", "pallas_gpu", "pallas_triton"])
def test_a_gpu_implementation_refuses_the_cpu(name):
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU is here")
    q, k, v, _ = make_inputs(Case(), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=name):
        attention(q, k, v, implementation=name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"implementation": "flash"}, "'flash' is unknown"),
        ({"window": 0}, "window=0"),
        ({"window": 3, "causal": False}, "window=3"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"segment_ids": jnp.ones((2, 3), jnp.int32)}, "segment_ids"),
        ({"prompt_ids": jnp.ones((2, 200), jnp.int32)}, "need segment_ids"),
        ({"sinks": jnp.zeros(2)}, r"sinks \(2,\) must have shape \(4,\)"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    q, k, v, _ = make_inputs(Case(), jnp.float32)
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, **options)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, _ = make_inputs(Case(), jnp.float32)
    with pytest.raises(ValueError, match="not a multiple"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, v[:, :, :1])
    with pytest.raises(ValueError, match="as many keys"):
        attention(q[:, :5], k, v)
    assert attention(q[:, :5], k, v, causal=False).shape == q[:, :5].shape
    assert set(IMPLEMENTATIONS) >= {"auto", "xla", "pallas_gpu", "pallas_tpu"}
