"""The step programs of nine kinds of run, as hashes: a refactoring must keep them all.

    python tests/step_programs.py               # compare with the record, exit 1 on any
    python tests/step_programs.py --write       # make the record of the installed jax
    python tests/step_programs.py --dump DIR    # write the texts, to diff two trees
    python tests/step_programs.py --quick       # half of them: see `lower_all`

The jitted train and eval steps are lowered, never compiled, on one device and on eight
of a CPU. What is hashed is the program's StableHLO without the names of Python's
functions, and with the main function's arguments and results named by their leaves'
paths in the state and the batch, in place of their numbers. So functions may be renamed
and moved, and the state's fields reordered (not the batch's: the train step takes its
micro-batch field by field). An operation or the order of two, a layout, a donated
buffer, a constant or a name in the state, the batch or the metrics may not change.
jax's own versions write programs differently: `step_programs.json` has a record for
each.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Before jax is imported: eight CPU devices, and nobody is asked for a model.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# This tree's package is judged, whichever one is installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from jaxtrain import build
from jaxtrain.config import default_config, resolve
from jaxtrain.data.batches.shared_prompt import share_prompts
from jaxtrain.models.load import load_abstract_model
from jaxtrain.models.state import abstract_state
from jaxtrain.optimizers.configured import make_optimizer
from jaxtrain.types import Batch, LabeledBatch, PairBatch

RECORD = pathlib.Path(__file__).with_suffix(".json")
ROWS, LENGTH, PAIRS = 8, 64, 3  # of a micro-batch; tokens; pairs of a packed row


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: keys of its config, its mesh of eight devices, and how its batch looks."""

    keys: Mapping[str, Any]
    mesh: Mapping[str, int]
    make_batch: "Callable[[MakeArray], Any]"
    accumulation_steps: int = 1


@dataclasses.dataclass(frozen=True)
class Parts:
    """The jitted steps, and what their arguments look like.

    `batch_layouts` are those of a batch for training [A, B, T] and evaluation [B, T].
    """

    train_step: Any
    eval_step: Any
    state: Any
    batch_layouts: tuple[Any, Any]


def parts_of(case: Case, devices: Sequence[jax.Device]) -> Parts:
    """From a config to its steps. All that touches the product's insides is here."""
    config = default_config()
    config.data.max_length = LENGTH
    config.training.gradient_accumulation_steps = case.accumulation_steps
    keys = dict(case.keys)
    if len(devices) > 1:
        keys |= {f"mesh.{axis}": size for axis, size in case.mesh.items()}
    for key, value in keys.items():
        *path, last = key.split(".")
        section = config
        for name in path:
            section = section[name]
        section[last] = value
    run = resolve(config, device_count=len(devices))
    model = load_abstract_model(run, devices)
    # As `build` does where rows of the prepared data hold several documents.
    # The batches made here are padded, but for the cases that say otherwise.
    model = model.for_training(packed=run.data.packing is True)
    schedule, optimizer = make_optimizer(run, total_steps=100)
    state = abstract_state(model, run, optimizer)
    layouts = jax.tree.map(lambda leaf: leaf.sharding, state)
    scored = build.bind_loss(run, model, build.Loss(build.make_objective(run)))
    train_step, eval_step = build.make_steps(
        run, model.plan, scored, schedule, optimizer, layouts
    )
    batch_layouts = (model.plan.batch(1), model.plan.batch())
    return Parts(train_step, eval_step, state, batch_layouts)


# --- batches: what data/dataset.py gives, and what the trainer makes of it -----------

# (sizes behind the rows' axis, dtype) -> an abstract array
MakeArray = Callable[..., Any]


def _side(
    array: MakeArray, length: int = LENGTH, *, with_prompts: bool = False
) -> Batch:
    fields: dict[str, Any] = {
        name: array(length, dtype=jnp.int32)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }
    if with_prompts:
        fields["prompt_ids"] = array(length, dtype=jnp.int32)
    return Batch(loss_mask=array(length, dtype=jnp.float32), **fields)


def _pairs(array: MakeArray) -> PairBatch:
    return PairBatch(chosen=_side(array), rejected=_side(array))


def _packed_pairs(array: MakeArray) -> Any:
    """Rows that hold each prompt once and both its completions; several pairs a row."""
    rows = _side(array, 2 * LENGTH, with_prompts=True)
    pair_ids = array(PAIRS, dtype=jnp.int32)

    def lay_out(rows: Batch, pair_ids: Any) -> PairBatch:
        return share_prompts(rows, pair_ids=pair_ids)

    layout = pair_ids.sharding
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        jax.eval_shape(lay_out, rows, pair_ids),
    )


def _labeled(array: MakeArray) -> LabeledBatch:
    return LabeledBatch(
        completions=_side(array),
        desirable=array(dtype=jnp.float32),
        mismatched=_side(array),
    )


# --- the cases -----------------------------------------------------------------------

_CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
_TYPE, _DROPOUT = "training.training_type", "training.lora.lora_dropout"
_SIZES = {
    f"model.architecture.{name}": size
    for name, size in {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
    }.items()
}
# Of all but the first the model is the embedded one.
CASES = {
    "from_scratch": Case({_TYPE: "from_scratch", **_SIZES}, _CUBE, _side),
    "sft": Case({_TYPE: "sft"}, {"data": 2, "context": 2, "tensor": 2}, _side),
    "lora": Case({_TYPE: "lora", _DROPOUT: 0.1}, _CUBE, _side),
    "dpo": Case({_TYPE: "dpo"}, _CUBE, _pairs),
    "lora_dpo": Case(
        {_TYPE: "dpo", "training.lora.enabled": True}, {"data": 2, "fsdp": 4}, _pairs
    ),
    "packed_dpo": Case(
        {_TYPE: "dpo", "data.packing": True, "data.share_prompts": True},
        _CUBE,
        _packed_pairs,
    ),
    "kto": Case({_TYPE: "dpo", "training.objective": "kto"}, {"data": 8}, _labeled),
    "sft_accumulation": Case({_TYPE: "sft"}, {"fsdp": 8}, _side, accumulation_steps=2),
    "sft_fp16": Case(
        {_TYPE: "sft", "training.bf16": False, "training.fp16": True},
        {"data": 4, "tensor": 2},
        _side,
    ),
}


def lower_all(quick: bool = False) -> Iterator[tuple[str, str]]:
    """Each program's name, "<case>/<train|eval>/<devices>", and canonical text.

    Args:
        quick: only train steps on eight devices and eval steps on one, which between
            them have all that differs.
    """
    for name, case in CASES.items():
        for count in (1, 8):
            parts = parts_of(case, jax.devices()[:count])
            train_layout, eval_layout = parts.batch_layouts
            leading = (case.accumulation_steps, ROWS)
            train_batch = case.make_batch(_array_maker(leading, train_layout))
            eval_batch = case.make_batch(_array_maker((ROWS,), eval_layout))
            for kind, step, batch, roots in (
                ("train", parts.train_step, train_batch, ("state", "metrics")),
                ("eval", parts.eval_step, eval_batch, ("metrics",)),
            ):
                if quick and (kind == "train") != (count == 8):
                    continue
                lowered = step.lower(parts.state, batch)
                arguments = {"state": parts.state, "batch": batch}
                yield f"{name}/{kind}/{count}", canonical(lowered, arguments, roots)


def _array_maker(leading: tuple[int, ...], layout: Any) -> MakeArray:
    def array(*sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *sizes), dtype, sharding=layout)

    return array


# --- the canonical text --------------------------------------------------------------


def canonical(
    lowered: Any, arguments: Mapping[str, Any], result_roots: Sequence[str]
) -> str:
    """The program's text, without numbers of arguments and names of functions.

    Args:
        lowered: a `jax.stages.Lowered` of a step.
        arguments: the step's arguments in order, by the names to give them here.
        result_roots: names of the step's results; several are a tuple.
    """
    text = re.sub(r"^module @\S+", "module @step", lowered.as_text())
    before, opening, rest = text.partition("func.func public @main(")
    assert opening, "the program has no main function"
    declared, rest = _up_to_closing(rest)
    rest = rest.removeprefix(" -> (")
    returned, rest = _up_to_closing(rest)
    body, closing, others = rest.partition("\n  }\n")
    body, final, values = body.rpartition("\n    return ")
    assert closing and final, "the main function does not end as expected"

    results = _split(returned)
    infos = [re.search(_RESULT_INFO, result) for result in results]
    known = _names({"": lowered.out_info}, result_roots)
    result_names = [known[_without_root(info[1])] for info in infos if info]
    assert len(result_names) == len(results), "a result has no jax.result_info"
    results = [_drop_empty(re.sub(_RESULT_INFO, "", result)) for result in results]
    operands, types = (_split(part) for part in values.split(" : ", 1))
    names = _argument_names(lowered, arguments)

    def by_path(match: re.Match[str]) -> str:
        # Blocks inside main have arguments too; these keep their numbers.
        number = int(match[1])
        return f"%{names[number]}" if number < len(names) else match[0]

    def aliased(match: re.Match[str]) -> str:
        return f'tf.aliasing_output = "{result_names[int(match[1])]}"'

    declarations = sorted(
        re.sub(r"tf\.aliasing_output = (\d+) : i32", aliased, declaration)
        for declaration in _split(re.sub(r"%arg(\d+)\b", by_path, declared))
    )
    body, operands = (
        re.sub(r"%arg(\d+)\b", by_path, part) for part in (body, "\n".join(operands))
    )
    ends = sorted(
        f"{name} = {operand} : {kind} <- {result}"
        for name, operand, kind, result in zip(
            result_names, operands.split("\n"), types, results, strict=True
        )
    )
    lines = [
        before + opening.rstrip("("),
        *(f"    argument {declaration}" for declaration in declarations),
        body,
        *(f"    return {end}" for end in ends),
    ]
    return _number_functions("\n".join(lines) + closing + others)


_RESULT_INFO = r'jax\.result_info = "((?:[^"\\]|\\.)*)"(?:, )?'


def _argument_names(lowered: Any, arguments: Mapping[str, Any]) -> list[str]:
    """The leaf path of each argument that the program has.

    jit drops arguments that nothing reads, and the indices of those it keeps are not
    public. But it names each argument's location by its leaf, `state.rng`, so the kept
    ones are read from there.
    """
    module = lowered.compiler_ir("stablehlo")
    functions = {op.attributes["sym_name"].value: op for op in module.body.operations}
    block = functions["main"].regions[0].blocks[0]
    locations = [re.search(r'"(.*)"', str(a.location)) for a in block.arguments]
    known = _names(arguments, tuple(arguments))
    names = [known[_without_root(found[1])] for found in locations if found]
    assert len(names) == len(locations), "an argument's location has no name"
    assert len(set(names)) == len(names), "two arguments have the same name"
    return names


def _names(trees: Mapping[str, Any], roots: Sequence[str]) -> dict[str, str]:
    """Leaf paths as jax writes them, less the root's own name, to how they are here."""
    names: dict[str, str] = {}
    for root, tree in trees.items():
        for path, _ in jax.tree.leaves_with_path(tree):
            written = jax.tree_util.keystr(path)
            parts = path
            name = root or roots[0]
            if not root and len(roots) > 1:
                name, parts = roots[path[0].idx], path[1:]
            simple = jax.tree_util.keystr(parts, simple=True, separator=".")
            assert written not in names, f"two leaves are called {written}"
            names[written] = f"{name}.{simple}"
    return names


def _without_root(written: str) -> str:
    """`state.rng` is `.rng`: a parameter's or a result's own name may change."""
    return re.sub(r"^\w*", "", written)


def _number_functions(text: str) -> str:
    """Private functions numbered as they first appear."""
    symbol = r'@("(?:[^"\\]|\\.)*"|[\w$.\-]+)'
    private = set(re.findall(rf"func\.func private {symbol}", text))
    numbers: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        if match[1] not in private:
            return match[0]
        return f"@function{numbers.setdefault(match[1], len(numbers))}"

    return re.sub(symbol, number, text)


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|->|[(<\[{]|[)>\]}]|,')


def _up_to_closing(text: str) -> tuple[str, str]:
    """What stands before the bracket that closes one opened before `text`; the rest."""
    depth = 0
    for match in _TOKEN.finditer(text):
        if match[0] in ("(", "<", "[", "{"):
            depth += 1
        elif match[0] in (")", ">", "]", "}"):
            depth -= 1
            if depth < 0:
                return text[: match.start()], text[match.end() :]
    raise ValueError("the program's text has an unclosed bracket")


def _split(text: str) -> list[str]:
    """The parts between commas that no bracket or string encloses."""
    parts, depth, start = [], 0, 0
    for match in _TOKEN.finditer(text):
        if match[0] in ("(", "<", "[", "{"):
            depth += 1
        elif match[0] in (")", ">", "]", "}"):
            depth -= 1
        elif match[0] == "," and depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def _drop_empty(declaration: str) -> str:
    """Without the end of a list of attributes that lost its last one, or only one."""
    return re.sub(r", \}$", "}", declaration).removesuffix(" {}")


# --- the record ----------------------------------------------------------------------


def read_record() -> dict[str, dict[str, str]]:
    """The hash of each program by its name, for each version of jax."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def main(argv: Sequence[str]) -> int:
    """Lower everything and compare, or write. 1 where anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the record")
    parser.add_argument("--quick", action="store_true", help="compare half of them")
    parser.add_argument("--dump", type=pathlib.Path, help="folder for the texts")
    options = parser.parse_args(argv)
    if options.write and options.quick:
        parser.error("--write takes all programs: leave out --quick")
    record = read_record()
    hashes = {}
    for name, text in lower_all(options.quick):
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        if options.dump:
            options.dump.mkdir(parents=True, exist_ok=True)
            (options.dump / f"{name.replace('/', '-')}.mlir").write_text(text)
    if options.write:
        versions = sorted({**record, jax.__version__: hashes}.items())
        RECORD.write_text(json.dumps(dict(versions), indent=1) + "\n")
        print(f"{RECORD.name}: {len(hashes)} programs of jax {jax.__version__}")
        return 0
    known = record.get(jax.__version__)
    if known is None:
        print(f"no record of jax {jax.__version__}: --write makes one on a good tree")
        return 1
    expected = hashes if options.quick else known | hashes
    differing = [name for name in expected if known.get(name) != hashes.get(name)]
    for name in differing:
        old, new = known.get(name, "absent")[:12], hashes.get(name, "absent")[:12]
        print(f"{name}: recorded {old}, now {new}")
    print(f"{len(differing)} of {len(hashes)} programs differ (jax {jax.__version__})")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
