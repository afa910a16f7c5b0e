"""Kernels that compile beside their program are the ones that the program has."""

import threading
import types

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.kernels.attention.blocked import attention_blocked
from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.pallas_gpu import KERNELS
from jaxtrain.run import mosaic_programs, step_programs


@pytest.fixture(scope="module")
def lowered():
    """A step of two layers with the kernels for Hopper, lowered for a GPU."""

    def loss(q, k, v, ids):
        mask = Mask(ids, None)
        for _ in range(2):
            q = attention_blocked(
                KERNELS, q, k, v, mask, softcap=None, scale=0.1, schedule=None
            )
        return (q.astype(jnp.float32) ** 2).sum()

    shapes = [(2, 256, 4, 64), (2, 256, 2, 64), (2, 256, 2, 64)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    inputs.append(jax.ShapeDtypeStruct((2, 256), jnp.int32))
    step = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*inputs)
    return step.lower(lowering_platforms=("cuda",))


def test_a_kernel_alone_has_the_text_that_it_has_in_its_program(lowered):
    """By the text's hash XLA finds it again: another text would be compiled twice."""
    kernels = mosaic_programs._find_kernels(lowered)
    assert len(kernels) == 3  # forward, dq, dk with dv: each once for both layers
    for kernel in kernels:
        (again,) = mosaic_programs._find_kernels(kernel.lower())
        assert again == kernel
        assert kernel.attributes["module"] and kernel.attributes["kernel_hash"]


def fake(kernels, monkeypatch, compile_):
    """A program with these kernels that waits for `compile_`, without patience."""
    monkeypatch.setattr(mosaic_programs, "_find_kernels", lambda _: kernels)
    monkeypatch.setattr(mosaic_programs, "_PATIENCE_SECS", 0.0)
    return types.SimpleNamespace(compile=compile_, compiler_ir=None)


def test_kernels_compile_while_their_program_does(monkeypatch):
    compiled = threading.Event()
    kernel = types.SimpleNamespace(
        lower=lambda: types.SimpleNamespace(compile=compiled.set)
    )
    # The program is done once its kernel is: one after the other this would not end.
    program = fake([kernel], monkeypatch, lambda: compiled.wait(60))
    assert mosaic_programs.compile_program(program) is True


def test_a_kernel_that_does_not_compile_is_left_to_the_program(monkeypatch):
    tried = threading.Event()

    def fail():
        tried.set()
        raise RuntimeError("no device")

    program = fake(
        [types.SimpleNamespace(lower=fail)] * 2, monkeypatch, lambda: tried.wait(60)
    )
    assert mosaic_programs.compile_program(program) is True


def test_kernels_of_a_program_from_the_cache_are_not_compiled(monkeypatch):
    tried = threading.Event()
    program = fake(
        [types.SimpleNamespace(lower=tried.set)], monkeypatch, lambda: "program"
    )
    monkeypatch.setattr(mosaic_programs, "_PATIENCE_SECS", 60.0)
    before = set(threading.enumerate())
    assert mosaic_programs.compile_program(program) == "program"
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # it has been told, and need not wait for a minute
        assert not thread.is_alive()
    assert not tried.is_set()


def test_one_of_several_processes_compiles_its_program_alone(monkeypatch):
    """Kernels of its own would be waited for by the others, or wait for them."""
    tried = threading.Event()
    kernel = types.SimpleNamespace(lower=tried.set)
    program = fake([kernel], monkeypatch, lambda: tried.wait(0.5))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert mosaic_programs.compile_program(program) is False


def test_a_program_without_kernels_is_compiled_alone():
    before = set(threading.enumerate())
    program = mosaic_programs.compile_program(jax.jit(lambda x: x + 1).lower(1.0))
    assert float(program(1.0)) == 2.0
    assert not set(threading.enumerate()) - before


def test_an_error_of_the_program_is_raised(monkeypatch):
    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    program = fake([], monkeypatch, fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        mosaic_programs.compile_program(program)


@pytest.mark.parametrize(("platform", "ahead"), [("gpu", True), ("cpu", False)])
def test_a_single_shape_is_left_to_the_first_step_where_nothing_is_gained(
    platform, ahead, monkeypatch
):
    monkeypatch.setattr(step_programs, "keep_programs", lambda _: None)
    step = jax.jit(lambda state, batch: (state + batch, {}))
    plan = types.SimpleNamespace(platform=platform)
    programs = step_programs.make_programs(step, plan)
    state, batch = jnp.ones(3), jnp.ones((1, 3))
    programs.compile(state, [batch])
    assert programs.compiles(batch) is not ahead
    assert programs(state, batch)[0].shape == (1, 3)
