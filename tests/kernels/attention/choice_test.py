"""What `auto` chooses on each kind of NVIDIA GPU, and why others refuse."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.kernels.attention import api, cudnn, skips_blocks
from jaxtrain.kernels.attention.masks import Extras, Mask

T4, A100, A10, L4, H100, B200, RTX_5090 = 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0


@pytest.fixture
def on(monkeypatch):
    """Pretend that this machine has a GPU of a compute capability."""

    def pretend(capability):
        monkeypatch.setattr(cudnn, "compute_capability", lambda device=None: capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    return pretend


def choose(packed=True, width=128, softcap=None, dtype=jnp.bfloat16, length=4096):
    q = jax.ShapeDtypeStruct((1, length, 8, width), dtype)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if packed else None
    return api._choose(q, Mask(ids, None, True, None), Extras(softcap), None)


@pytest.mark.parametrize("capability", [A100, A10, L4, B200, RTX_5090])
def test_packed_rows_leave_out_blocks_on_every_gpu_from_ampere_on(capability, on):
    on(capability)
    for width in (64, 96, 128):
        assert choose(width=width) == "pallas_triton"
    assert choose(softcap=30.0) == "pallas_triton"
    assert choose(dtype=jnp.float16) == "pallas_triton"
    # Plain rows are cuDNN's, but for what it refuses.
    assert choose(packed=False) == "cudnn"
    assert choose(packed=False, softcap=30.0) == "pallas_triton"
    # Not measured, and large tiles.
    assert choose(dtype=jnp.float32) == "xla_blocks"
    assert choose(dtype=jnp.float32, packed=False) == "xla"
    q = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.bfloat16)
    assert skips_blocks(q)


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [(A100, "pallas_triton"), (B200, "pallas_triton"), (A10, "xla_blocks"),
     (L4, "xla_blocks"), (RTX_5090, "xla_blocks")],
)  # fmt: skip
def test_wide_heads_go_by_the_shared_memory(capability, chosen, on):
    on(capability)
    assert choose(width=256) == chosen
    assert choose(width=512) == "xla_blocks"
    assert choose(width=512, packed=False) == "xla"
    if chosen == "xla_blocks":
        q = jax.ShapeDtypeStruct((1, 4096, 8, 256), jnp.bfloat16)
        why = api._refuse_pallas_triton(q, Mask(), Extras(), None)
        assert why is not None and "99 KiB of shared memory" in why


def test_hopper_has_its_own_kernels_and_a_t4_none(on):
    on(H100)
    assert choose() == "pallas_gpu"
    assert choose(width=256) == "pallas_gpu"
    assert choose(packed=False, width=256) == "pallas_gpu"
    assert choose(packed=False, width=256, softcap=30.0) == "pallas_gpu"
    assert choose(width=512) == choose(dtype=jnp.float32) == "xla_blocks"
    on(T4)
    assert choose() == choose(softcap=30.0) == "xla_blocks"
    assert choose(packed=False) == "xla"
    assert skips_blocks(jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.bfloat16))


def test_without_kernels_long_packed_rows_leave_out_blocks_and_short_ones_do_not():
    """On a CPU, where these tests run; `skips_blocks` decides how long rows are."""
    assert choose() == choose(length=512, dtype=jnp.float32) == "xla_blocks"
    assert choose(length=511) == choose(packed=False) == "xla"
    for length, skips in ((512, True), (256, False)):
        q = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)
        assert skips_blocks(q) is skips


def test_a_jax_without_the_lowering_is_served_as_before(on, monkeypatch):
    on(A100)
    found = importlib.import_module

    def import_module(name):
        if name.endswith("pallas_triton"):
            raise ImportError("no such lowering")
        return found(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert choose() == "cudnn"
    assert choose(softcap=30.0) == "xla_blocks"
