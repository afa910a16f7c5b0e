"""Training on 1, 2, 4 and 8 GPUs of one host, by the real command line.

    PYTHONPATH=. python benchmarks/host_scaling.py make DIR --cases sft_3b,lora_8b
    PYTHONPATH=. python benchmarks/host_scaling.py run DIR --cases sft_3b --gpus 1,2
    PYTHONPATH=. python benchmarks/host_scaling.py trl DIR --cases sft_3b --gpus 1,2
    PYTHONPATH=. python benchmarks/host_scaling.py predict --cases sft_3b --gpus 4,8
    PYTHONPATH=. python benchmarks/host_scaling.py table DIR
    PYTHONPATH=. python benchmarks/host_scaling.py kill DIR --gpus 2

`make` writes models of random weights and rows into DIR. `run` starts `jaxtrain train`
for each case on each number of GPUs (the first ones of CUDA_VISIBLE_DEVICES), with a
profile of five of its last steps, or of a third of all, and notes in DIR/results.jsonl
what it found; `trl` does so with TRL under torchrun. `table` prints all that is noted:
tokens/s a GPU over the steps behind the warm-up, their ratio to the fewest GPUs of the
same case, MFU, peak memory, the share of the profiled steps in which nothing but
collectives ran on a GPU, and in which nothing ran (the worst GPU's), and what `jaxtrain
aot` predicted.

`predict` compiles the steps for GPUs that need not be there (jax 0.12 with CUDA's
plugin), layers scanned, and writes host_scaling.json beside this script. `kill` is
kill_and_resume.py.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import kill_and_resume
import random_model
import trace_share
import whole_run
from step_cases import SHAPES

HERE = pathlib.Path(__file__).resolve().parent
PREDICTIONS = HERE / "host_scaling.json"
_PROFILED = 5  # steps, before the last ones; of short runs a third
_TOKENS = 2_600_000  # of the rows that are made, but at least 24 rows
_SHIPPED = {"8b": "llama-3.1-8b", "30b_a3b": "qwen3-30b-a3b"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, how the mesh grows with the GPUs, and a GPU's examples a step.

    `full`: every row is `length` tokens long; else lengths are those of real texts, cut
    there, and packed.
    """

    shape: str
    task: str
    mesh: str
    batch: int
    length: int
    full: bool = True
    lora: bool = False
    checkpointing: bool = True
    steps: int = 18
    flags: tuple[str, ...] = ()

    def mesh_on(self, gpus: int) -> dict[str, int]:
        """The sizes of the mesh's axes on so many GPUs.

        Raises:
            ValueError: this mesh cannot be laid out on them.
        """
        if gpus == 1:
            return {}
        if self.mesh == "fsdp_tensor":
            found = {"fsdp": gpus // 2, "tensor": 2}
        elif self.mesh == "context":
            along = min(4, gpus)
            found = {"context": along, "fsdp": gpus // along}
        else:
            found = {self.mesh: gpus}
        if gpus % 2:
            raise ValueError(f"--gpus {gpus}: choose 1 or an even number")
        return {axis: size for axis, size in found.items() if size > 1}

    def examples(self, gpus: int) -> int:
        """Examples of each group of GPUs that share rows: `batch` times their number.

        Long rows are as many as there are groups: what fits one GPU is a part of a row.
        """
        return self.batch * (2 if self.mesh == "fsdp_tensor" and gpus > 1 else 1)

    def keys(self, gpus: int) -> list[str]:
        """The configuration's keys, as key=value, but for files and batch size."""
        sizes = self.mesh_on(gpus)
        keys = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
        if "expert" in sizes:
            keys.append("training.deepspeed.zero_stage=3")
        if self.lora:
            keys += whole_run.LORA_FLAGS
        elif self.checkpointing:
            keys.append("training.gradient_checkpointing=true")
        return [*keys, *self.flags]


_SHARED = ("data.packing=true", "data.share_prompts=true")
_DPO: Any = {"task": "dpo", "length": 1024, "flags": _SHARED}
CASES = {
    "sft_0.5b": Case("0.5b", "sft", "data", 8, 2048, checkpointing=False, steps=80),
    "dpo_0.5b": Case(
        "0.5b", mesh="data", batch=8, checkpointing=False, steps=80, **_DPO
    ),
    "sft_0.5b_fsdp": Case(
        "0.5b", "sft", "fsdp", 8, 2048, checkpointing=False, steps=80
    ),
    "dpo_0.5b_fsdp": Case(
        "0.5b", mesh="fsdp", batch=8, checkpointing=False, steps=80, **_DPO
    ),
    # Texts of real lengths, packed: a step is short, and several shapes are compiled.
    "sft_0.5b_texts": Case(
        "0.5b", "sft", "data", 8, 1024, full=False, checkpointing=False, steps=80
    ),
    "sft_3b": Case("3b", "sft", "fsdp", 8, 2048),
    "sft_3b_data": Case("3b", "sft", "data", 8, 2048),
    "sft_3b_tensor": Case("3b", "sft", "fsdp_tensor", 8, 2048),
    "sft_3b_auto": Case(
        "3b", "sft", "fsdp", 8, 2048, flags=("training.remat_policy=auto",)
    ),
    "lora_3b": Case("3b", "sft", "data", 8, 2048, lora=True),
    "dpo_3b": Case("3b", mesh="fsdp", batch=8, **_DPO),
    "sft_8b": Case("8b", "sft", "fsdp", 2, 4096, steps=16),
    "sft_8b_fp8": Case(
        "8b", "sft", "fsdp", 2, 4096, steps=16, flags=("training.fp8=true",)
    ),
    "sft_8b_tensor": Case("8b", "sft", "fsdp_tensor", 2, 4096, steps=16),
    "lora_8b": Case("8b", "sft", "data", 4, 4096, lora=True, steps=16),
    "dpo_8b": Case("8b", mesh="fsdp", batch=4, steps=16, **_DPO),
    "lora_8b_128k": Case("8b", "sft", "context", 1, 131072, lora=True, steps=6),
    "lora_30b_a3b": Case("30b_a3b", "sft", "expert", 4, 4096, lora=True, steps=16),
    "smoke": Case("smoke", "sft", "fsdp", 2, 128, full=False, steps=12),
    "smoke_dpo": Case(
        "smoke", mesh="data", batch=2, steps=12, **_DPO | {"length": 128}
    ),
    "smoke_moe": Case("moe_smoke", "sft", "expert", 2, 128, lora=True, steps=12),
}  # fmt: skip


def model_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a shape's model."""
    if shape in _SHIPPED:
        source: Any = HERE.parent / "configs" / "shapes" / _SHIPPED[shape]
        return random_model.make_config(source, layers)
    ends = {"eos_token_id": SHAPES[shape]["vocab_size"] - 1}
    plain = {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6}
    plain |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
    return random_model.make_config({**plain, **SHAPES[shape], **ends}, layers)


def make(folder: pathlib.Path, cases: Iterable[str], layers: int | None) -> None:
    """Write what the cases need and is not there: DIR/CASE has links to the models."""
    for name in cases:
        case, own = CASES[name], folder / name
        model = folder / f"model-{case.shape}"
        config = model_config(case.shape, layers)
        if not (model / "weights" / "config.json").exists():
            whole_run.make_tokenizer(model / "tokenizer", config["vocab_size"])
            random_model.write(config, model / "weights")
        own.mkdir(parents=True, exist_ok=True)
        links = {"model": model / "weights", "tokenizer": model / "tokenizer"}
        for link, target in links.items():
            if not (own / link).exists():
                (own / link).symlink_to(target.resolve())
        # Enough for the steps on 8 GPUs, or for some epochs of fewer.
        rows = min(case.batch * 8 * case.steps, max(24, _TOKENS // case.length))
        form = (rows, case.length, case.full, (case.task,))
        whole_run.make_rows(own, config["vocab_size"], *form)


def run(folder: pathlib.Path, name: str, gpus: int) -> dict[str, Any]:
    """One case by our command line, and the shares of its profiled steps."""
    case = CASES[name]
    stop = case.steps - 2
    profiled = min(_PROFILED, case.steps // 3)
    flags = [
        f"training.max_steps={case.steps}",
        f"training.logging_steps={max(3, case.steps // 4)}",
        f"training.profile.start_step={stop - profiled + 1}",
        f"training.profile.stop_step={stop}",
        *case.keys(gpus),
    ]
    options = argparse.Namespace(
        task=case.task, batch=case.examples(gpus), gpus=gpus, length=case.length
    )
    with only_gpus(gpus):
        found = whole_run.run_ours(folder / name, options, flags)
    del found["examples_per_sec"]  # by the clock, and the profile's end is in it
    workdir = pathlib.Path(found["workdir"])
    logged = read_lines(workdir / "metrics.jsonl")
    for name in ("tokens_per_sec", "mfu", "data_wait_share", "step_time_p50_secs"):
        # The first report is of the warm-up.
        values = [line[name] for line in logged if name in line][1:]
        if values:
            found[name] = statistics.median(values)
    found["tokens_per_sec_per_gpu"] = found["tokens_per_sec"] / gpus
    try:
        shares = trace_share.read(workdir / "profile").values()
    except ValueError as error:
        return found | {"profile": str(error)}
    worst = {
        name: max(getattr(each, name) for each in shares)
        for name in ("exposed", "collective", "idle", "long_gaps", "kernels")
    }
    most = max(shares, key=lambda each: each.exposed)
    worst["exposed_by_kind"] = most.exposed_by_kind
    # What the others have beyond it may be waiting for the slowest.
    worst["exposed_least"] = min(each.exposed for each in shares)
    return found | worst | {"profiled_secs": max(each.secs for each in shares)}


def run_trl(folder: pathlib.Path, name: str, gpus: int) -> dict[str, Any]:
    """The same by TRL; FSDP2 on several GPUs, whatever our mesh is."""
    case = CASES[name]
    script = [str(HERE / "whole_run.py"), "trl", str(folder / name)]
    start = [sys.executable]
    if gpus > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={gpus}"]
    command = [
        *(*start, *script, f"--task={case.task}", f"--batch={case.batch}"),
        *(f"--length={case.length}", f"--max_steps={case.steps}", f"--gpus={gpus}"),
        *(["--lora"] if case.lora else []),
        *(["--checkpointing"] if case.checkpointing else []),
    ]
    with only_gpus(gpus):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if case.full and case.task == "sft":
        each = case.length / gpus
        found["tokens_per_sec_per_gpu"] = found["examples_per_sec"] * each
    return found


@contextlib.contextmanager
def only_gpus(count: int) -> Iterator[None]:
    """Within, processes that are started see the first `count` GPUs alone."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = before.split(",") if before else [str(i) for i in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(listed[:count])
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def predict(name: str, gpus: int, gpu: str) -> dict[str, Any]:
    """What the compiler says of a case's step: the bound on tokens/s, and memory."""
    import tempfile

    from jaxtrain.aot import compile_for, describe_devices
    from jaxtrain.cli.command import ConfigParser

    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        config = model_config(case.shape)
        pathlib.Path(folder, "config.json").write_text(json.dumps(config))
        keys = [
            f"model.name_or_path={folder}",
            f"data.max_length={case.length}",
            f"training.per_device_train_batch_size={case.examples(gpus)}",
            "model.scan_layers=true",
            *whole_run.FLAGS,
            *case.keys(gpus),
        ]
        arguments = [case.task, *(f"--{key}" for key in keys)]
        _, settings, _ = ConfigParser("aot", "").read(arguments)
        topology = f"{gpu}:{gpus}"
        devices = describe_devices(topology)
        report = compile_for(settings, devices, topology)
    found = {"case": name, "topology": topology, "fits": report.fits}
    if report.refusal is None:
        found |= {
            "gib": round(report.device_bytes / 2**30, 1),
            "tokens_per_sec_per_gpu": round(report.tokens / report.step_secs / gpus),
            "mfu": round(report.mfu, 2),
            "secs": {name: round(secs, 4) for name, secs in report.secs.items()},
        }
    return found


# What `run` and `trl` print of a result: its name, what to call it, how to write it.
_SHOWN = (
    ("tokens_per_sec_per_gpu", "tokens/s a GPU", ",.0f"),
    ("examples_per_sec", "examples/s", ".2f"),
    ("mfu", "MFU", ".1%"),
    ("device_memory_peak_gib", "peak GiB", ".1f"),
    ("peak_gib", "peak GiB", ".1f"),
    ("exposed", "exposed", ".1%"),
    ("exposed_least", "exposed at least", ".1%"),
    ("collective", "collectives", ".1%"),
    ("idle", "idle", ".1%"),
    ("long_gaps", "of it in long gaps", ".1%"),
    ("data_wait_share", "waits for rows", ".1%"),
    ("step_time_p50_secs", "secs a step", ".4f"),
    ("useful_token_share", "useful", ".3f"),
    ("loss", "loss", ".4f"),
    ("took_secs", "secs in all", "d"),
)


def describe(line: Mapping[str, Any]) -> str:
    """A result in one line, its rate first."""
    told = [
        f"{line[name]:{form}} {word}"
        for name, word, form in _SHOWN
        if line.get(name) is not None
    ]
    told.insert(1, f"{line['case']} {line['side']} on {line['gpus']}")
    return ", ".join(
        [*told, *(str(line[k]) for k in ("error", "profile") if k in line)]
    )


def note(path: pathlib.Path, line: Mapping[str, Any]) -> None:
    """Add a line to a file of JSON lines."""
    with path.open("a") as file:
        print(json.dumps(line), file=file)


def table(results: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> str:
    """Markdown; a result is of its case's and side's latest run on so many GPUs."""
    latest = {(r["case"], r["side"], r["gpus"]): r for r in results}
    predicted = {
        (p["case"], int(p["topology"].partition(":")[2])): p for p in predictions
    }
    heads = (
        *("case", "side", "GPUs", "tokens/s a GPU", "ratio", "MFU", "peak GiB"),
        *("exposed", "idle", "aot: bound on tokens/s a GPU", "aot: GiB"),
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]

    def show(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    for (name, side, gpus), result in sorted(latest.items()):
        rates = {
            count: other.get("tokens_per_sec_per_gpu")
            for (case, whose, count), other in latest.items()
            if (case, whose) == (name, side)
        }
        rate, first = rates[gpus], rates[min(rates)]
        ratio = None if not rate or not first else rate * gpus / (first * min(rates))
        guess = predicted.get((name, gpus), {}) if side == "ours" else {}
        cells = (
            *(name, side, str(gpus), show(rate, ",.0f")),
            "" if ratio is None else f"{ratio:.3f} of {min(rates)}",
            show(result.get("mfu"), ".1%"),
            show(result.get("device_memory_peak_gib", result.get("peak_gib")), ".1f"),
            *(show(result.get(share), ".1%") for share in ("exposed", "idle")),
            show(guess.get("tokens_per_sec_per_gpu"), ",.0f"),
            show(guess.get("gib"), ".1f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=["make", "run", "trl", "predict", "table", "kill"]
    )
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=".")
    parser.add_argument("--cases", default="sft_0.5b", help=", ".join(CASES))
    parser.add_argument("--gpus", default="1,2", help="numbers of GPUs")
    parser.add_argument("--layers", type=int, help="make: instead of the model's own")
    parser.add_argument("--gpu", default="h100", help="predict: h100, h200, ...")
    options = parser.parse_args()
    names, counts = options.cases.split(","), [*map(int, options.gpus.split(","))]
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--cases {','.join(unknown)}: choose from {', '.join(CASES)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = options.folder / "results.jsonl"
    if options.what == "make":
        make(options.folder, names, options.layers)
    elif options.what == "table":
        print(table(read_lines(results), read_lines(PREDICTIONS)))
    elif options.what == "kill":
        sys.exit(not kill_and_resume.check(options.folder, max(counts)))
    else:
        for name in names:
            for gpus in counts:
                one_line(options, results, name, gpus)


def one_line(
    options: argparse.Namespace, results: pathlib.Path, name: str, gpus: int
) -> None:
    """Run or predict one case on so many GPUs, and note it, or what went wrong."""
    began = time.time()
    if options.what == "predict":
        found = predict(name, gpus, options.gpu)
        note(PREDICTIONS, found)
        print(json.dumps(found), flush=True)
        return
    side, measure = ("ours", run) if options.what == "run" else ("trl", run_trl)
    try:
        found = measure(options.folder, name, gpus)
    except (subprocess.CalledProcessError, ValueError, LookupError) as error:
        found = {"error": str(error)[-300:]}
    line = {"case": name, "side": side, "gpus": gpus}
    line = {**found, **line, "took_secs": round(time.time() - began)}
    note(results, line)
    print(describe(line), flush=True)


if __name__ == "__main__":
    main()
