"""Where the time of a train step goes, part by part, beside the least it could take.

    PYTHONPATH=. python benchmarks/step_parts.py [--cases sft_0.5b] [--unroll]
    PYTHONPATH=. python benchmarks/step_parts.py --smoke    # tiny shapes, any backend

Profiles some steps of the cases of train_step.py and adds up the device's time by what
the compiled program says of each kernel: its scope in the model, and whether it is a
matrix product, a kernel of ours, a copy or elementwise work. The floor of a part is
that of its products at the GPU's peak and of its least traffic at its bandwidth, the
longer of the two; recomputation is in no floor. The kernels that took longest follow,
those of all layers that are alike as one.
CUDA graphs are off, since a graph hides its kernels' names.
"""

import argparse
import collections
import glob
import os
import re
import tempfile
import time
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
)

import jax
import jax.numpy as jnp
from step_cases import SHAPES, Case, make_parser
from train_step import find_case, make_step, model_config

from jaxtrain.aot.hlo_text import Instruction, parse
from jaxtrain.aot.report import CHIPS, Chip
from jaxtrain.optimizers.moments import MOMENT_DTYPES

PRODUCTS = "products"
NOTHING = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while")


def part_of(instruction: Instruction) -> str:
    """The part of the step that a kernel belongs to."""
    body = list(instruction.body.values())
    text = " ".join([instruction.rest, *(inner.rest for inner in body)])
    opcodes = {instruction.kind, *(inner.kind for inner in body)}
    is_product = "dot" in opcodes or "gemm" in text or "cublas" in text
    kind = PRODUCTS if is_product else "rest"
    if "loss_head" in text:
        return f"head, {kind}"
    if "optimizer/" in text or "clip/" in text:
        return "optimizer and clipping"
    if "experts/" in text:
        is_kernel = instruction.kind == "custom-call" and "sort" not in text
        return f"experts, {PRODUCTS if is_kernel or is_product else 'rest'}"
    if instruction.kind == "custom-call" and not is_product:
        return "attention kernel"
    if opcodes <= {"copy", "fusion", "bitcast", "parameter", "transpose", "convert"}:
        return "copies and casts"
    for scope in ("attention", "mlp"):
        if f"{scope}/" in text or f"{scope})" in text:
            if is_product:
                return f"{scope}, projections"
            gates = "logistic" in opcodes or "silu" in text
            return "gated product" if gates else "norms, rope, residuals"
    sliced = opcodes & {"dynamic-update-slice", "dynamic-slice"}
    return "copies and casts" if sliced else "other"


def scope_of(instruction: Instruction | None) -> str:
    """Where in the model a kernel comes from, its end, without numbers."""
    if instruction is None:
        return ""
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return re.sub(r"\d+", "", found[1])[-60:] if found else ""


def floors(case: Case, chip: Chip, moments: str) -> dict[str, float]:
    """Seconds that each part takes at the least, by its FLOPs and its bytes.

    Products of 2 M N K FLOPs for each of forward and both gradients (one, where the
    weights are frozen); activations are bfloat16, master weights and gradients float32.
    """
    shape: dict[str, Any] = SHAPES[case.shape]
    config = model_config(case.shape)
    sides = 1 + case.pairs
    tokens = case.rows * case.length * sides
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads, kv = shape["num_attention_heads"], shape["num_key_value_heads"]
    wide = shape.get("intermediate_size", 0)
    passes = (2 if case.lora else 3) + (1 if case.pairs else 0)

    def product(columns: float) -> float:
        return 2 * tokens * width * columns * passes / chip.flops

    def stream(numbers: float) -> float:
        """Activations of `numbers` a token and layer, moved once."""
        return tokens * layers * numbers * 2 / chip.memory_rate

    mean_keys = (case.length + 1) / 2
    inside = 2 * 2 * tokens * heads * config.head_dim * mean_keys
    # Backward five products for the forward's two.
    attention = inside * (3.5 + (1 if case.pairs else 0)) * layers / chip.flops
    trained = 0.0 if case.lora else config.num_params()
    of_moment = jnp.dtype(moments).itemsize
    per_layer = config.head_dim * (2 * heads + 2 * kv)
    experts = shape.get("num_experts_per_tok", 0) * shape.get(
        "moe_intermediate_size", 0
    )
    if case.mixture:
        wide = 0
    return {
        f"experts, {PRODUCTS}": layers * product(3 * experts),
        # Beside the gate, each copy of a token is gathered and added up, and so are
        # their gradients: four times read and written.
        "experts, rest": stream(
            8 * experts + 8 * width * shape.get("num_experts_per_tok", 0)
        ),
        f"head, {PRODUCTS}": product(shape["vocab_size"]),
        "head, rest": 0.0,
        "attention, projections": layers * product(per_layer),
        "attention kernel": attention,
        "mlp, projections": layers * product(3 * wide),
        # Forward reads two and writes one, backward reads three and writes two.
        "gated product": stream(8 * wide),
        # Each of two norms: forward reads one and writes one, backward reads three (the
        # residual's gradient too) and writes one. The sums before them are part of
        # products. Rope reads and writes queries and keys, forward and backward.
        "norms, rope, residuals": stream(12 * width + 2 * per_layer),
        # The gradient read twice, for its norm and for the update; the weight and both
        # moments read and written.
        "optimizer and clipping": trained * (16 + 4 * of_moment) / chip.memory_rate,
        "copies and casts": trained * 6 / chip.memory_rate,
    }


def trace_steps(step: Any, state: Any, batch: Any, count: int) -> tuple[str, float]:
    """The folder of a profile of `count` steps, and the seconds of one untraced."""
    for _ in range(3):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    start = time.perf_counter()
    for _ in range(count):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    secs = (time.perf_counter() - start) / count
    folder = tempfile.mkdtemp()
    with jax.profiler.trace(folder):
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
    return folder, secs


def read_times(folder: str) -> dict[str, tuple[float, int]]:
    """Seconds and calls of each instruction in a profile, over all its steps."""
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    data = jax.profiler.ProfileData.from_file(path)
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    for plane in planes[:1] or [p for p in data.planes if "CPU" in p.name]:
        for line in plane.lines:
            if planes and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = next((v for k, v in event.stats if k == "hlo_op"), None)
                if name is not None:
                    entry = found[str(name)]
                    entry[0] += event.duration_ns / 1e9
                    entry[1] += 1
    return {name: (secs, int(calls)) for name, (secs, calls) in found.items()}


def run_case(name: str, options: argparse.Namespace) -> None:
    """Print the table of one case."""
    case = find_case(name, options)
    device = jax.devices()[0]
    chip = CHIPS.get(device.device_kind, CHIPS["NVIDIA H100 80GB HBM3"])
    step, state, batch = make_step(name, options)
    compiled = step.lower(state, batch).compile()
    computations, _ = parse(compiled.as_text())
    instructions = {
        name: instruction
        for scope in computations.values()
        for name, instruction in scope.items()
        if instruction.kind not in NOTHING
    }
    folder, secs = trace_steps(compiled, state, batch, options.steps)
    times = read_times(folder)
    parts: dict[str, float] = collections.defaultdict(float)
    alike: dict[tuple[str, str, str], list[float]] = collections.defaultdict(
        lambda: [0.0, 0.0]
    )
    for op, (total, calls) in times.items():
        known = instructions.get(op)
        if known is None and op.split(".")[0] in NOTHING:
            continue  # a loop's own time, which is that of its kernels again
        part = part_of(known) if known is not None else "other"
        parts[part] += total / options.steps
        entry = alike[part, re.sub(r"[.\d]+$", "", op), scope_of(known)]
        entry[0] += total / options.steps
        entry[1] += calls / options.steps
    least = floors(case, chip, options.moments)
    print(
        f"\n{name} on {device.device_kind}, jax {jax.__version__}: {secs * 1e3:.1f} ms"
    )
    print(f"{'part':26s} {'ms':>8s} {'floor':>8s} {'times':>6s}")
    for part in sorted({*parts, *least}, key=lambda each: -parts.get(each, 0.0)):
        spent, floor = parts.get(part, 0.0) * 1e3, least.get(part, 0.0) * 1e3
        ratio = f"{spent / floor:6.2f}" if floor and spent else ""
        print(f"{part:26s} {spent:8.2f} {floor:8.2f} {ratio}")
    busy, floor = sum(parts.values()) * 1e3, sum(least.values()) * 1e3
    print(f"{'sum':26s} {busy:8.2f} {floor:8.2f}")
    print("largest: ms, calls, part, kernel, scope")
    rows = sorted(alike.items(), key=lambda row: -row[1][0])
    for (part, kernel, scope), (total, calls) in rows[: options.largest]:
        print(f"{total * 1e3:7.2f} {calls:5.0f} {part:22s} {kernel:.34s} {scope}")


def main() -> None:
    parser = make_parser(__doc__, attention="auto")
    parser.set_defaults(cases="sft_0.5b", steps=5)
    parser.add_argument("--chunk", type=int, help="loss_chunk_tokens")
    parser.add_argument("--unroll", action="store_true", help="scan_layers = False")
    parser.add_argument("--moments", choices=MOMENT_DTYPES, default="float32")
    parser.add_argument(
        "--largest", type=int, default=30, help="kinds of kernels to list"
    )
    parser.set_defaults(document=None, response=None)
    options = parser.parse_args()
    for name in options.cases.split(","):
        run_case(name, options)


if __name__ == "__main__":
    main()
