"""Raw rows to token rows: our preparation beside TRL's, time and memory, in one run.

    PYTHONPATH=. python benchmarks/preparation.py --rows=300000 --processes=2 \
        --tokenizer=../shared/tokenizers/qwen3 [--cases=sft,chat,dpo]

Three kinds of rows of random words: prompt with completion, conversations of four turns
with assistant_only_loss, and conversational preference pairs. Each case and side runs
in a process of its own, from a jsonl file to the data set that a trainer reads: ours
through load_rows and prepare_cached, TRL's through load_dataset and the constructor of
its trainer (with a model of a few weights), both with so many processes and no cache.
The counts of tokens must be equal.

Memory is anonymous (RssAnon and RssShmem of /proc: heap and stacks, not mapped files,
whose pages the system takes back when it needs them), sampled ten times a second: the
most above what the main process had after its imports, of it alone and of it with its
child processes.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

CASES = ("sft", "chat", "dpo")
SIDES = ("ours", "trl")
MAX_LENGTH = 1024
VOCABULARY = 5000


def make_rows(case: str, count: int) -> Iterator[dict[str, Any]]:
    """Rows of random words, the same each time."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    vocabulary = [
        "".join(rng.choices(letters, range(len(letters), 0, -1), k=rng.randint(2, 9)))
        for _ in range(VOCABULARY)
    ]

    def text(words: int) -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randint(words // 2, 2 * words)))

    def turn(role: str, words: int) -> dict[str, str]:
        return {"role": role, "content": text(words)}

    for _ in range(count):
        if case == "sft":
            yield {"prompt": text(20), "completion": " " + text(30)}
        elif case == "chat":
            yield {"messages": [turn(r, 12) for r in ("user", "assistant") * 2]}
        else:
            sides = {side: [turn("assistant", 20)] for side in ("chosen", "rejected")}
            yield {"prompt": [turn("user", 30)]} | sides


def load_tokenizer(folder: str, case: str) -> Any:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if case == "chat":  # a template that TRL has a marked copy of, with equal text
        import importlib.util

        found = importlib.util.find_spec("trl")
        assert found is not None and found.origin is not None
        templates = pathlib.Path(found.origin).parent / "chat_templates"
        name = "qwen3_instruct_2507.jinja"
        tokenizer.chat_template = (templates / name).read_text()
    return tokenizer


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    from jaxtrain.data.prepare.cache import prepare_cached
    from jaxtrain.data.prepare.options import PrepareOptions
    from jaxtrain.data.prepare.workers import Resources
    from jaxtrain.data.rows.source import load_rows

    tokenizer = load_tokenizer(options.tokenizer, options.case)
    start = begin()
    prepared = prepare_cached(
        load_rows(options.file),
        tokenizer,
        PrepareOptions(
            objective="preference" if options.case == "dpo" else "next_token",
            max_length=MAX_LENGTH,
            assistant_only_loss=options.case == "chat",
        ),
        os.path.join(options.scratch, "ours"),
        Resources(options.processes),
    )
    secs = end(start)
    stores = prepared.stores.values()
    trained = sum(int(store.trained.sum()) for store in stores)
    return {"secs": secs, "rows": len(prepared), "trained": trained}


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.tokenizer, options.case)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=4, intermediate_size=4,
            num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        )
    )  # fmt: skip
    given: dict[str, Any] = dict(
        output_dir=options.scratch, report_to=[], use_cpu=True, bf16=False,
        max_length=MAX_LENGTH, dataset_num_proc=options.processes,
    )  # fmt: skip
    start = begin()
    rows = datasets.load_dataset("json", data_files=options.file, split="train")
    trainer: Any
    if options.case == "dpo":
        trainer = trl.DPOTrainer(
            model, copy.deepcopy(model), args=trl.DPOConfig(**given),
            train_dataset=rows,
            processing_class=tokenizer,
        )  # fmt: skip
    else:
        given["assistant_only_loss"] = options.case == "chat"
        trainer = trl.SFTTrainer(
            model, args=trl.SFTConfig(**given), train_dataset=rows,
            processing_class=tokenizer,
        )  # fmt: skip
    secs = end(start)
    trained, found = 0, trainer.train_dataset.with_format("arrow")
    for table in found.iter(1000):
        if options.case == "dpo":
            for side in ("chosen_ids", "rejected_ids"):
                trained += sum(map(len, table[side].to_pylist()))
        else:
            for labels in table["labels"].to_pylist():
                trained += len(labels) - labels.count(-100)
    return {"secs": secs, "rows": len(found), "trained": trained}


def begin() -> float:
    """Tell the other process that imports are done."""
    print("begin", flush=True)
    time.sleep(0.5)  # for its first sample
    return time.perf_counter()


def end(start: float) -> float:
    """Tell it that what follows only counts what was made; the seconds until now."""
    secs = time.perf_counter() - start
    print("end", flush=True)
    return secs


# --- the process that measures -----------------------------------------------------


def anonymous_bytes(process: int) -> int:
    """Heap, stacks and shared memory of a process; 0 where it has ended."""
    try:
        text = pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = dict(line.split(":", 1) for line in text.splitlines())
    kinds = ("RssAnon", "RssShmem")
    return 1024 * sum(int(found.get(kind, "0 kB").split()[0]) for kind in kinds)


def descendants(process: int) -> list[int]:
    """The process and all below it."""
    parents: dict[int, list[int]] = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(
            int(folder.name)
        )
    found = [process]
    for number in found:
        found += parents.get(number, [])
    return found


def measure(case: str, side: str, file: str, options: argparse.Namespace) -> Any:
    """Seconds, counts and memory of one side in a process of its own."""
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        command = [
            sys.executable, __file__, f"--case={case}", f"--side={side}",
            f"--file={file}", f"--scratch={scratch}",
            f"--tokenizer={options.tokenizer}", f"--processes={options.processes}",
        ]  # fmt: skip
        # transformers asks the hub about some folders, without one it waits.
        environment = {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1"}
        running = subprocess.Popen(
            command, env=os.environ | environment, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not options.verbose else None, text=True,
        )  # fmt: skip
        assert running.stdout is not None
        while running.stdout.readline() not in ("begin\n", ""):
            pass
        os.set_blocking(running.stdout.fileno(), False)
        start = anonymous_bytes(running.pid)
        alone = together = start
        while running.poll() is None and not running.stdout.readline():
            found = [anonymous_bytes(number) for number in descendants(running.pid)]
            alone, together = max(alone, found[0]), max(together, sum(found))
            time.sleep(0.1)
        os.set_blocking(running.stdout.fileno(), True)
        output = running.stdout.read()
        running.wait()
        if running.returncode:
            raise RuntimeError(f"{side} of {case} ended with {running.returncode}")
        result = json.loads(output.strip().splitlines()[-1])
        above = {
            "main_mib": round((alone - start) / 2**20),
            "all_mib": round((together - start) / 2**20),
        }
        return result | above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--folder", help="for data and caches; default: the system's")
    parser.add_argument("--verbose", action="store_true")
    for name in ("case", "side", "file", "scratch"):  # of the processes measured
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run = run_ours if options.side == "ours" else run_trl
        print(json.dumps(run(options)), flush=True)
        return
    packages = ("tokenizers", "transformers", "datasets", "trl")
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"load": os.getloadavg(), "cores": os.cpu_count()} | versions))
    for case in options.cases.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            file = os.path.join(folder, "rows.jsonl")
            with open(file, "w", encoding="utf-8") as out:
                for row in make_rows(case, options.rows):
                    out.write(json.dumps(row) + "\n")
            found = {}
            for side in options.sides.split(","):
                found[side] = measure(case, side, file, options)
                line = {"case": case, "side": side, "load": os.getloadavg()[0]}
                print(json.dumps(line | found[side]), flush=True)
            if len(found) == 2:
                ours, peer = found["ours"], found["trl"]
                same = all(ours[key] == peer[key] for key in ("rows", "trained"))
                ratio = round(peer["secs"] / ours["secs"], 2)
                print(json.dumps({"case": case, "times_trl": ratio, "equal": same}))


if __name__ == "__main__":
    main()
