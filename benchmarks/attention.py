"""Attention on one GPU: checks first, then times against the peers, in one run.

From the root of the repository:

    export PYTHONPATH=.
    python benchmarks/attention.py               # everything
    python benchmarks/attention.py --only check  # errors against float64 alone
    python benchmarks/attention.py --smoke       # tiny shapes, any backend

Ours are given the schedule of blocks, as layers of a model are that share it, but for
the variant `unplanned`. Peers run where they are installed: cuDNN through jax.nn,
tokamax, and in torch (with CUDA) flex_attention and scaled_dot_product_attention. What
one implementation cannot do shows as its reason. Writes attention.json under $OUT,
where that is set.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.kernels.attention.blocked import Kernels, attention_blocked, plan
from jaxtrain.kernels.attention.cudnn import attention_cudnn
from jaxtrain.kernels.attention.hopper import Tiles
from jaxtrain.kernels.attention.masks import Mask, whole_mask
from jaxtrain.kernels.attention.pallas_gpu import KERNELS as HOPPER
from jaxtrain.kernels.attention.pallas_gpu import with_tiles
from jaxtrain.kernels.attention.xla import attention_xla

ROUNDS, CALLS = 5, 20
HOPPER_NAME = "ours hopper"


@dataclasses.dataclass(frozen=True)
class Shape:
    """One workload; `documents` are packed into each row, one after the other."""

    name: str
    batch: int
    length: int
    heads: int = 16
    kv_heads: int = 2
    width: int = 128
    documents: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()  # of each document: the number of its prompt, or 0
    window: int | None = None

    def mask(self) -> Mask:
        if not self.documents:
            return Mask(window=self.window)
        numbers = np.arange(1, len(self.documents) + 1)
        row = np.repeat(numbers, self.documents)
        segments = jnp.asarray(np.tile(row, (self.batch, 1)), jnp.int32)
        if not self.prompts:
            return Mask(segments)
        row = np.repeat(self.prompts, self.documents)
        return Mask(segments, jnp.asarray(np.tile(row, (self.batch, 1)), jnp.int32))

    def inputs(self, dtype: Any = jnp.bfloat16, seed: int = 0) -> list[jax.Array]:
        """q, k, v and a cotangent, normal."""
        keys = jax.random.split(jax.random.key(seed), 4)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        row = (self.batch, self.length)
        return [
            jax.random.normal(key, (*row, n, self.width), dtype)
            for key, n in zip(keys, heads, strict=True)
        ]


def pair_rows(pairs: int) -> tuple[Shape, Shape]:
    """Pairs with a shared prompt of 512 and responses of 384; the same, apart."""
    shared = Shape(
        "shared prompt, one row a pair",
        pairs,
        1280,
        documents=(512, 384, 384),
        prompts=(0, 1, 1),
    )
    return shared, Shape("the same pairs, two rows each", 2 * pairs, 896)


SHAPES = [
    Shape("packed documents of 512", 2, 8192, documents=(512,) * 16),
    Shape("causal 2x8192", 2, 8192),
    Shape("causal 4x4096", 4, 4096),
    Shape("causal 8x2048", 8, 2048),
    Shape("causal 8x2048, 14 heads of 64", 8, 2048, heads=14, width=64),
    *pair_rows(32),
    Shape("causal 2x8192, window 1024", 2, 8192, window=1024),
    Shape("causal 1x32768", 1, 32768),
]
SMOKE = [
    Shape("packed", 1, 256, 4, 2, 64, documents=(128, 100, 28)),
    Shape("causal", 1, 256, 4, 2, 64),
]
# As chosen ("") and otherwise.
TILES = {
    "": None,
    " no turns": Tiles(take_turns=False),
    " one tile a program": Tiles(forward_programs=sys.maxsize, dq_programs=sys.maxsize),
    " dq 128": Tiles(),
    " dq 64": Tiles(dq_step=64, dq_stages=4),
    " dkv 3 stages": Tiles(dkv_stages=3),
    " dk, dv apart": Tiles(joint_dkv=False),
}


@dataclasses.dataclass(frozen=True)
class Blocked:
    """One of our kernels, with a schedule or without."""

    kernels: Kernels
    planned: bool = True

    def __call__(
        self, q: Any, k: Any, v: Any, mask: Mask, plan: Any = None, *, scale: float
    ) -> jax.Array:
        return attention_blocked(
            self.kernels, q, k, v, mask, softcap=None, scale=scale, schedule=plan
        )

    def plan(self, q: jax.Array, mask: Mask) -> Any:
        return plan(self.kernels, mask, *q.shape[:2]) if self.planned else None


def jax_candidates() -> Iterator[tuple[str, Callable[..., jax.Array]]]:
    """(name, call(q, k, v, mask, scale=)) of everything in JAX that imports here."""
    yield "xla", functools.partial(attention_xla, softcap=None)
    yield "jax cudnn", attention_cudnn
    for suffix, tiles in TILES.items():
        kernels = HOPPER if tiles is None else with_tiles(tiles)
        yield HOPPER_NAME + suffix, Blocked(kernels)
    yield HOPPER_NAME + " unplanned", Blocked(HOPPER, planned=False)
    try:
        from jaxtrain.kernels.attention.pallas_triton import KERNELS as TRITON

        yield "ours triton", Blocked(TRITON)
    except ImportError as error:
        print(f"ours triton: {error}")
    try:
        import tokamax
    except ImportError:
        print("tokamax: not installed")
        return

    def run_tokamax(q: Any, k: Any, v: Any, mask: Mask, *, scale: float) -> jax.Array:
        allowed = None
        if mask.segment_ids is not None:
            whole = whole_mask(mask, q.shape[1], k.shape[1])
            allowed = None if whole is None else whole[:, None]
        return tokamax.dot_product_attention(
            q, k, v, mask=allowed, is_causal=allowed is None, scale=scale
        )

    yield "tokamax", run_tokamax


def hopper_hangs(limit_secs: int = 150) -> bool:
    """Whether the Hopper kernels fail to answer: a wrong barrier waits for ever."""
    command = [sys.executable, __file__, "--only", "check", "--match", HOPPER_NAME]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment.pop("OUT", None)
    try:
        subprocess.run(command, timeout=limit_secs, env=environment, check=False)
    except subprocess.TimeoutExpired:
        print(f"{HOPPER_NAME}: no answer within {limit_secs} s, left out")
        return True
    return False


def make_steps(call: Callable[..., jax.Array], scale: float) -> dict[str, Callable]:
    """The jitted forward pass, and the forward and backward pass together."""

    def forward(q: Any, k: Any, v: Any, d_out: Any, *masks: Any) -> jax.Array:
        return call(q, k, v, *masks, scale=scale)

    def both(q: Any, k: Any, v: Any, d_out: Any, *masks: Any) -> tuple:
        out, pull = jax.vjp(lambda q, k, v: call(q, k, v, *masks, scale=scale), q, k, v)
        return (out, *pull(d_out))

    return {"fwd": jax.jit(forward), "fwd+bwd": jax.jit(both)}


def time_ms(step: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Median over rounds of the mean time of calls queued one behind the other."""
    wait(step())
    wait(step())
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = step()
        wait(result)
        rounds.append((time.perf_counter() - start) / CALLS * 1e3)
    return statistics.median(rounds)


def check(candidates: list[tuple[str, Callable]], smoke: bool) -> list[dict]:
    """Errors |x - float64| / |float64| of each output, on a small packed row."""
    documents = (300, 17, 411, 296) if not smoke else (100, 17, 11)
    shape = Shape(
        "check", 2, sum(documents), 4, 2, 128, documents, (0, 1, 1, 0)[: len(documents)]
    )
    inputs, mask = shape.inputs(), shape.mask()
    want = attend_in_float64([np.asarray(x, np.float64) for x in inputs], mask)
    rows = []
    for name, call in candidates:
        row: dict[str, Any] = {"name": name}
        try:
            got = make_steps(call, shape.width**-0.5)["fwd+bwd"](*inputs, mask)
            for label, have, expected in zip(
                ("out", "dq", "dk", "dv"), got, want, strict=True
            ):
                error = np.linalg.norm(np.asarray(have, np.float64) - expected)
                row[label] = float(error / np.linalg.norm(expected))
        except Exception as error:  # one broken candidate must not stop the run
            row["reason"] = _short(error)
        rows.append(row)
        print("check", json.dumps(row), flush=True)
    return rows


def attend_in_float64(inputs: list[np.ndarray], mask: Mask) -> list[np.ndarray]:
    """(out, dq, dk, dv) by the textbook."""
    q, k, v, d_out = inputs
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (np.repeat(x, group, axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    segments = np.asarray(mask.segment_ids)
    allowed = segments[:, :, None] == segments[:, None]
    if mask.prompt_ids is not None:
        allowed |= np.asarray(mask.prompt_ids)[:, :, None] == segments[:, None]
    allowed &= np.tri(q.shape[1], dtype=bool)
    logits = np.einsum("btnh,bsnh->bnts", q, wide_k) * scale
    p = np.where(allowed[:, None], np.exp(logits), 0.0)
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("btnh,bsnh->bnts", d_out, wide_v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    shape = (*k.shape[:3], group, k.shape[3])
    return [
        np.einsum("bnts,bsnh->btnh", p, wide_v),
        np.einsum("bnts,bsnh->btnh", ds, wide_k),
        np.einsum("bnts,btnh->bsnh", ds, q).reshape(shape).sum(3),
        np.einsum("bnts,btnh->bsnh", p, d_out).reshape(shape).sum(3),
    ]


def time_jax(candidates: list[tuple[str, Callable]], shape: Shape) -> list[dict]:
    inputs, mask = shape.inputs(), shape.mask()
    rows = []
    for name, call in candidates:
        row: dict[str, Any] = {"shape": shape.name, "name": name}
        masks = [mask]
        if isinstance(call, Blocked):
            masks.append(jax.jit(call.plan)(inputs[0], mask))
        for label, step in make_steps(call, shape.width**-0.5).items():
            try:
                run = functools.partial(step, *inputs, *masks)
                row[label] = time_ms(run, jax.block_until_ready)
            except Exception as error:  # one broken candidate must not stop the run
                row["reason"] = _short(error)
        rows.append(row)
        print("time", json.dumps(row), flush=True)
    return rows


def time_torch(shape: Shape) -> list[dict]:
    """flex_attention with a block mask, and SDPA where the mask is plain causal."""
    try:
        import torch
        from torch.nn.attention import flex_attention as flex
    except ImportError as error:
        return [{"shape": shape.name, "name": "torch", "reason": _short(error)}]
    if not torch.cuda.is_available():
        return [{"shape": shape.name, "name": "torch", "reason": "no CUDA"}]
    torch.manual_seed(0)

    def draw(heads: int, grad: bool = True) -> Any:
        size = (shape.batch, heads, shape.length, shape.width)
        x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_(grad)

    q, k, v = draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)
    d_out = draw(shape.heads, grad=False)
    mask = shape.mask()
    ids = None
    if mask.segment_ids is not None:
        ids = torch.tensor(np.asarray(mask.segment_ids)[0], device="cuda")
        prompts = ids
        if mask.prompt_ids is not None:
            prompts = torch.tensor(np.asarray(mask.prompt_ids)[0], device="cuda")

    def rule(b: Any, h: Any, t: Any, s: Any) -> Any:
        causal = t >= s
        if shape.window is not None:
            causal = causal & (t - s < shape.window)
        if ids is None:
            return causal
        return causal & ((ids[t] == ids[s]) | (prompts[t] == ids[s]))

    blocks = flex.create_block_mask(rule, None, None, shape.length, shape.length)
    compiled = torch.compile(flex.flex_attention)
    calls: dict[str, Callable] = {}
    if ids is not None or shape.window is not None:  # what flex_attention is for
        calls["torch flex"] = lambda: compiled(
            q, k, v, block_mask=blocks, enable_gqa=True
        )
    else:
        calls["torch sdpa"] = functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            q,
            k,
            v,
            is_causal=True,
            enable_gqa=True,
        )
    rows = []
    for name, call in calls.items():
        row: dict[str, Any] = {"shape": shape.name, "name": name}

        def both(call: Callable = call) -> Any:
            q.grad = k.grad = v.grad = None
            call().backward(d_out)

        try:
            with torch.no_grad():
                row["fwd"] = time_ms(call, lambda _: torch.cuda.synchronize())
            row["fwd+bwd"] = time_ms(both, lambda _: torch.cuda.synchronize())
        except Exception as error:
            row["reason"] = _short(error)
        rows.append(row)
        print("time", json.dumps(row), flush=True)
    return rows


def print_table(rows: list[dict], checks: list[dict]) -> None:
    print("\n| shape | implementation | fwd ms | fwd+bwd ms | note |")
    print("|---|---|---|---|---|")
    for row in rows:
        times = [f"{row[x]:.3f}" if x in row else "" for x in ("fwd", "fwd+bwd")]
        note = row.get("reason", "")
        print(f"| {row['shape']} | {row['name']} | {' | '.join(times)} | {note} |")
    print("\n| implementation | out | dq | dk | dv | note |")
    print("|---|---|---|---|---|---|")
    for row in checks:
        errors = [
            f"{row[x]:.2e}" if x in row else "" for x in ("out", "dq", "dk", "dv")
        ]
        print(f"| {row['name']} | {' | '.join(errors)} | {row.get('reason', '')} |")


def _short(error: Exception) -> str:
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return lines[0][:160].replace("|", "/")


def versions() -> dict[str, str]:
    """Machine and packages, for RESULTS.md."""
    found = {"device": jax.devices()[0].device_kind, "backend": jax.default_backend()}
    for package in ("jax", "jaxlib", "torch", "triton", "tokamax"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--only", choices=["check", "time"], help="one half")
    parser.add_argument("--match", default="", help="regular expression of names")
    parser.add_argument("--shapes", default="", help="regular expression of shapes")
    arguments = parser.parse_args()
    print(json.dumps(versions()))
    candidates = [x for x in jax_candidates() if re.search(arguments.match, x[0])]
    if arguments.only is None and jax.default_backend() == "gpu" and hopper_hangs():
        candidates = [x for x in candidates if HOPPER_NAME not in x[0]]
    checks = [] if arguments.only == "time" else check(candidates, arguments.smoke)
    broken = {row["name"] for row in checks if "reason" in row}
    candidates = [x for x in candidates if x[0] not in broken]
    rows: list[dict] = []
    if arguments.only != "check":
        for index, shape in enumerate(SMOKE if arguments.smoke else SHAPES):
            if not re.search(arguments.shapes, shape.name):
                continue
            # Variants of ours compete on the first two shapes only.
            names = {HOPPER_NAME + suffix for suffix in TILES if suffix}
            chosen = [x for x in candidates if index < 2 or x[0] not in names]
            rows += time_jax(chosen, shape)
            if re.search(arguments.match, "torch"):
                rows += time_torch(shape)
    print_table(rows, checks)
    if "OUT" in os.environ:
        report = {"versions": versions(), "times": rows, "checks": checks}
        path = pathlib.Path(os.environ["OUT"]) / "attention.json"
        path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
