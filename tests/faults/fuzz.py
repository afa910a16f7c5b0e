"""Bad input for everything that users hand over, and what becomes of each.

A kind of input is a class: `attempt` makes one input by a random generator, most of
them changed from a valid one, and reads it as a run would. It must succeed, or raise
what the command line tells in short lines with exit code 2 (`jaxtrain.cli.ending`).
Anything else is raw: a traceback, a hang, no memory left, a message of a library
without a place, a line too long to read, or a value that no run can mean.
"""

import contextlib
import copy
import csv
import dataclasses
import gzip
import io
import json
import logging
import math
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import tiny_bases
from mutations import mutate, mutate_bytes, mutate_text, odd_value

from jaxtrain import assets, config, schema
from jaxtrain.cli.ending import MISTAKE, describe
from jaxtrain.config.flags import resolve_flags, split_flags
from jaxtrain.config.sections import SCHEMA
from jaxtrain.tree import dotted, flatten

LIMIT_SECS = 90  # of a clock on the wall: the machine may be busy
MOST_LINES, MOST_CHARACTERS = 60, 1500
_FRAME = os.sep + "jaxtrain" + os.sep


class TooSlow(BaseException):
    """An input took longer than any may."""


class Nonsense(BaseException):
    """A value was accepted that no run can mean."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one input: its kind ("read", "refused" or a raw one), and more."""

    kind: str
    handled: bool
    detail: str = ""


class Kind:
    """Inputs of one kind; the folder is scratch space of their own."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def attempt(self, rng: random.Random) -> None:
        """Make an input and read it; raises what reading raises."""
        raise NotImplementedError


def run_one(kind: Kind, name: str, number: int) -> Outcome:
    """One input of a kind, made by its number alone."""
    rng = random.Random(f"{name} {number}")
    try:
        with _limited(LIMIT_SECS):
            kind.attempt(rng)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        return judge(error)
    return Outcome("read", True)


def judge(error: BaseException) -> Outcome:
    """Whether an exception is one that a user can act on."""
    found = None if isinstance(error, TooSlow | Nonsense) else describe(error)
    code, message = found or (None, "")
    lines = message.splitlines()
    reason = ""
    if code != MISTAKE:
        reason = type(error).__name__
    elif "--debug shows the way there)" in message:
        reason = f"{type(error).__name__} of a library"
    elif not message.strip():
        reason = "empty message"
    elif len(lines) > MOST_LINES or max(map(len, lines)) > MOST_CHARACTERS:
        reason = "message too long"
    if not reason:
        return Outcome("refused", True, lines[0][:300])
    return Outcome(f"{reason} {_place(error)}", False, f"{error!s:.300}")


def _place(error: BaseException) -> str:
    """The last frame of ours, and the one that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _FRAME in frame.filename]
    names = [
        f"{pathlib.Path(f.filename).name}:{f.name}" for f in (*ours[-1:], frames[-1])
    ]
    return " > ".join(dict.fromkeys(names))


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- configurations -----------------------------------------------------------------


class Config(Kind):
    """Nested dicts as a program hands them over, and flags of the command line."""

    def attempt(self, rng: random.Random) -> None:
        given = valid_config(rng)
        if rng.random() < 0.8:
            given = mutate(rng, given, rng.choice((1, 1, 2, 4)))
        if rng.random() < 0.3:
            flags, rest = split_flags(_flags(rng))
            if rest:
                return
            _, run = resolve_flags(config.default_config(), flags)
        else:
            run = config.resolve(given)
        use_config(run)


class Yaml(Kind):
    """Configuration files."""

    def attempt(self, rng: random.Random) -> None:
        given = valid_config(rng)
        if rng.random() < 0.4:
            given = mutate(rng, given, rng.choice((1, 2)))
        style = rng.choice((None, False, True))
        try:
            text = yaml.safe_dump(given, default_flow_style=style, allow_unicode=True)
        except (RecursionError, UnicodeError):
            return
        data = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.8:
            data = mutate_bytes(rng, data, rng.choice((1, 1, 2, 5)))
        path = self.folder / rng.choice(("run.yaml", "run.yml", "run.json"))
        path.write_bytes(data)
        use_config(config.resolve(config.load_config(path)))


def use_config(run: config.RunConfig) -> None:
    """Read of a resolved configuration what needs no model."""
    saved = run.to_dict()
    again = config.RunConfig.from_dict(saved).to_dict()
    assert again == saved, (again, saved)
    json.dumps(saved)
    run.explain()
    _ = run.objective_options
    for name, value in dotted(saved).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise Nonsense(f"{name} = {value}")


_LEAVES = {".".join(path): leaf for path, leaf in flatten(SCHEMA).items()}
_KEYS = sorted(_LEAVES.keys() - {"training.training_type"})
_SAMPLES: dict[str, Any] = {
    "data.train": "rows.jsonl", "data.eval": {"a": "a.jsonl", "b": "b.jsonl"},
    "training.lora.rank_pattern": {"q_proj": 4},
    "training.lora.alpha_pattern": {"q": 8},
    "training.lora.target_modules": ["q_proj", "v_proj"],
    "model.rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "training.lr_scheduler_kwargs": {"num_cycles": 2},
}  # fmt: skip


def valid_config(rng: random.Random) -> dict[str, Any]:
    """A configuration that resolves, with some keys set."""
    training_type = rng.choice(("from_scratch", "sft", "lora", "dpo"))
    given: dict[str, Any] = {"training": {"training_type": training_type}}
    for key in rng.sample(_KEYS, rng.randrange(1, 8)):
        changed = copy.deepcopy(given)
        node = changed
        *sections, name = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = _sample(rng, key)
        with contextlib.suppress(ValueError):
            config.resolve(changed)
            given = changed
    return given


def _sample(rng: random.Random, key: str) -> Any:
    """A value that a key may hold, most of the time."""
    leaf = _LEAVES[key]
    if key in _SAMPLES:
        return copy.deepcopy(_SAMPLES[key])
    if leaf.default is not None and rng.random() < 0.3:
        return list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default
    storage = schema.storage_type(leaf.hint)
    texts = [*schema._allowed_texts(leaf.hint), "x"]
    choices = {
        bool: (True, False), int: (1, 2, 8, 100), float: (0.0, 0.1, 0.5, 1.0, 1e-5),
        str: texts, object: (1, 0.5, "x", ["x"], {"x": 1}, True),
    }  # fmt: skip
    return copy.deepcopy(rng.choice(tuple(choices.get(storage, ("x",)))))


def _flags(rng: random.Random) -> list[str]:
    flags = []
    for key in rng.sample(_KEYS, rng.randrange(1, 6)):
        value = _sample(rng, key)
        text = value if isinstance(value, str) else json.dumps(value)
        if rng.random() < 0.7:
            text = mutate_text(rng, text)
        if rng.random() < 0.2:
            text = rng.choice((str, json.dumps))(odd_value(rng, 1))
        if rng.random() < 0.03:
            text = rng.choice("[({") * rng.choice((100, 5000))
        name = mutate_text(rng, key) if rng.random() < 0.2 else key
        flags += [f"--{name}={text}"] if rng.random() < 0.9 else [f"--{name}", text]
    return flags


# --- rows ---------------------------------------------------------------------------

_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day."},
]
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("next_token", {"text": "In the beginning"}),
    "completion": ("next_token", {"prompt": "One, two,", "completion": " three."}),
    "messages": ("next_token", {"messages": _MESSAGES}),
    "tools": (
        "next_token",
        {
            "messages": [
                *_MESSAGES[:2],
                {"role": "assistant", "content": "", "tool_calls": [_CALL]},
                {"role": "tool", "name": "add", "content": "2"},
                _MESSAGES[2],
            ],
            "tools": [_TOOL],
        },
    ),
    "parts": (
        "next_token",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                      _MESSAGES[2]]},
    ),
    "sharegpt": (
        "next_token",
        {"conversations": [{"from": "human", "value": "a"},
                           {"from": "gpt", "value": "b"}]},
    ),
    "alpaca": ("next_token", {"instruction": "Add.", "input": "1 1", "output": "2"}),
    "tokens": ("next_token", {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}),
    "pair": ("preference", {"prompt": "a", "chosen": " b", "rejected": " c"}),
    "chats": (
        "preference",
        {"prompt": _MESSAGES[1:2], "chosen": _MESSAGES[2:],
         "rejected": [{"role": "assistant", "content": "No."}]},
    ),
    "label": ("labeled", {"prompt": "a", "completion": " b", "label": True}),
}  # fmt: skip


class Rows(Kind):
    """Data files of every form, read, checked and tokenized."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        from jaxtrain.data.rows.tokenize import load_tokenizer

        self.tokenizer = load_tokenizer(str(assets.asset_path(assets.TOKENIZER)))

    def attempt(self, rng: random.Random) -> None:
        from jaxtrain.data.prepare.options import PrepareOptions
        from jaxtrain.data.prepare.prepare import prepare
        from jaxtrain.data.rows.folders import first_rows
        from jaxtrain.data.rows.source import load_rows

        name = rng.choice(sorted(ROWS))
        objective, row = ROWS[name]
        rows: list[Any] = [copy.deepcopy(row) for _ in range(rng.choice((1, 2, 5)))]
        if rng.random() < 0.7:
            at = rng.randrange(len(rows))
            rows[at] = mutate(rng, rows[at], rng.choice((1, 1, 2, 3)))
        options = PrepareOptions(
            objective=rng.choice((objective, objective, objective, "next_token")),
            max_length=rng.choice((4, 64, 64)),
            packing=rng.choice((None, "bfd", "bfd_split")),
            on_bad_row=rng.choice(("error", "skip")),
            assistant_only_loss="messages" in row and rng.random() < 0.3,
        )
        if rng.random() < 0.15:  # rows that a program hands over
            prepare(rows, self.tokenizer, options)
            return
        path = self._write(rng, rows)
        if path is None:
            return
        first_rows(path, "train")
        prepare(load_rows(str(path)), self.tokenizer, options)

    def _write(self, rng: random.Random, rows: list[Any]) -> pathlib.Path | None:
        suffix = rng.choice(
            (
                ".jsonl",
                ".jsonl",
                ".jsonl",
                ".json",
                ".csv",
                ".txt",
                ".parquet",
                ".arrow",
                ".array_record",
            )
        )
        try:
            if suffix in (".parquet", ".arrow") and _is_deep(rows):
                return None  # pyarrow writes such columns for minutes
            data = _file_of(rows, suffix)
        except Exception:  # no such file can be written
            return None
        if rng.random() < 0.5:
            data = mutate_bytes(rng, data, rng.choice((1, 1, 3)))
        if rng.random() < 0.1:
            data, suffix = gzip.compress(data), f"{suffix}.gz"
            if rng.random() < 0.5:
                data = mutate_bytes(rng, data)
        path = self.folder / f"rows{suffix}"
        # A new file each time: what is mapped into memory must not change.
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return path


def _is_deep(rows: list[Any]) -> bool:
    text = json.dumps(rows)
    return text.count("[") + text.count("{") > 200


def _file_of(rows: list[Any], suffix: str) -> bytes:
    if suffix == ".json":
        return json.dumps(rows, indent=1).encode()
    if suffix == ".jsonl":
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if suffix == ".txt":
        return "\n".join(map(str, rows)).encode("utf-8", "surrogatepass")
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")
    if suffix == ".array_record":
        return _records_of(rows)
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    if suffix == ".parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return sink.getvalue()


def _records_of(rows: list[Any]) -> bytes:
    """An ArrayRecord file of JSON; texts alone are written as tf.train.Example."""
    from array_record.python.array_record_module import ArrayRecordWriter

    def field(number: int, content: bytes) -> bytes:
        size, shown = len(content), b""
        while size > 127:
            size, shown = size >> 7, shown + bytes([size & 127 | 128])
        return bytes([number << 3 | 2]) + shown + bytes([size]) + content

    def example(row: dict[str, str]) -> bytes:
        features = b""
        for name, text in row.items():
            feature = field(1, field(1, text.encode()))
            features += field(1, field(1, name.encode()) + field(2, feature))
        return field(1, features)

    with tempfile.NamedTemporaryFile(suffix=".array_record") as file:
        writer = ArrayRecordWriter(file.name, "group_size:1")
        for row in rows:
            is_text = all(isinstance(value, str) for value in row.values())
            writer.write(example(row) if is_text else json.dumps(row).encode())
        writer.close()
        return pathlib.Path(file.name).read_bytes()


# --- models, tokenizers, adapters -----------------------------------------------------


class Folder(Kind):
    """A directory of valid files of which one or two are changed."""

    names: tuple[str, ...] = ()

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self.valid: dict[str, bytes] = {}

    def spoil(self, rng: random.Random) -> pathlib.Path:
        """Write the files, changed."""
        path = self.folder / "input"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        files = dict(self.valid)
        for name in rng.sample(sorted(files), rng.choice((0, 1, 1, 1, 2))):
            files[name] = self._changed(rng, name, files[name])
        for name, data in files.items():
            if rng.random() < 0.99:
                (path / name).write_bytes(data)
        return path

    def _changed(self, rng: random.Random, name: str, data: bytes) -> bytes:
        if name.endswith(".safetensors") and rng.random() < 0.7:
            return _spoil_header(rng, data)
        if name.endswith(".json") and rng.random() < 0.8:
            tree = mutate(rng, json.loads(data), rng.choice((1, 1, 2, 4)))
            with contextlib.suppress(RecursionError):
                return json.dumps(tree).encode()
        return mutate_bytes(rng, data, rng.choice((1, 1, 3)))


def _spoil_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header is another, of the right length."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.dumps(mutate(rng, json.loads(data[8 : 8 + size]))).encode()
    except RecursionError:
        return data[:20]
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


class Model(Folder):
    """Directories of models: sizes, weights, settings of generation."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        base = folder / "valid"
        if not (base / "model.safetensors").is_file():
            tiny_bases.write_base(
                base, tiny_bases.chat_tokenizer(), {"temperature": 0.7, "top_p": 0.9}
            )
        self.families = [
            {
                "model_type": name, "vocab_size": 64, "hidden_size": 32,
                "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
                "max_position_embeddings": 64, "sliding_window": 8,
                "rope_theta": 10_000.0, "rope_scaling": None,
            }
            for name in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text",
                         "phi3", "mixtral", "qwen3_moe")
        ]  # fmt: skip
        self.valid = {
            path.name: path.read_bytes()
            for path in base.iterdir()
            if path.name != "chat_template.jinja"
        }

    def attempt(self, rng: random.Random) -> None:
        from jaxtrain.models import hf
        from jaxtrain.models.generation_config import read_generation_config

        path = self.spoil(rng)
        if rng.random() < 0.5:  # sizes alone, of any family
            options = rng.choice(self.families) | {"rope_scaling": _rope(rng)}
            options = mutate(rng, options, rng.choice((0, 1, 1, 2)))
            with contextlib.suppress(RecursionError):
                (path / "config.json").write_text(json.dumps(options))
            use_sizes(hf.load_config(path))
            return
        sizes = hf.load_config(path)
        use_sizes(sizes)
        read_generation_config(str(path))
        hf.stored_dtype(path)
        if sizes.num_params() > 10**7:
            return
        sizes = hf.match_weights(path, sizes)
        from jaxtrain.models.transformer import Decoder

        hf.load_params(path, Decoder(sizes))


def _rope(rng: random.Random) -> Any:
    kinds = (
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1},
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8,
         "long_factor": [2.0] * 8, "original_max_position_embeddings": 32},
    )  # fmt: skip
    return rng.choice((None, None, *kinds))


def use_sizes(sizes: Any) -> None:
    """Compute of a model's sizes what the start of a run does."""
    from jaxtrain.models.rope import inverse_frequencies

    sizes.num_params()
    sizes.flops_per_token(64)
    json.dumps(sizes.to_hf())
    for rope in filter(None, (sizes.rope, sizes.local_rope)):
        frequencies, scale = inverse_frequencies(rope, sizes.head_dim)
        if not (np.isfinite(frequencies).all() and np.isfinite(scale)):
            raise Nonsense(f"frequencies that are not finite: {rope}")
    for name, value in vars(sizes).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise Nonsense(f"{name} = {value}")


class Tokenizer(Folder):
    """Directories of tokenizers, and what becomes of rows by them."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        base = folder / "valid"
        if not (base / "tokenizer.json").is_file():
            tiny_bases.chat_tokenizer().save_pretrained(str(base))
        self.valid = {path.name: path.read_bytes() for path in base.iterdir()}

    def attempt(self, rng: random.Random) -> None:
        from jaxtrain.data.prepare.options import PrepareOptions
        from jaxtrain.data.prepare.prepare import prepare
        from jaxtrain.data.rows.tokenize import highest_id, load_tokenizer
        from jaxtrain.models.hf_files import check_tokenizer_files

        path = self.spoil(rng)
        check_tokenizer_files(path)
        tokenizer = load_tokenizer(str(path))
        highest_id(tokenizer)
        options = PrepareOptions("next_token", 64)
        for name in ("text", "messages"):
            prepare([ROWS[name][1]], tokenizer, options)


class Adapter(Folder):
    """Directories of adapters as PEFT writes them."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        import safetensors.numpy

        from jaxtrain.models.config import ModelConfig
        from jaxtrain.models.transformer import Decoder

        sizes = ModelConfig.from_hf(
            {
                "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
                "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1,
            }
        )  # fmt: skip
        self.base = Decoder(sizes).abstract_params()
        settings = {
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
            "target_modules": ["q_proj", "v_proj"], "bias": "none",
            "task_type": "CAUSAL_LM", "base_model_name_or_path": "base",
            "use_rslora": False, "use_dora": False, "rank_pattern": {},
            "alpha_pattern": {"v_proj": 16}, "modules_to_save": None,
            "init_lora_weights": True,
        }  # fmt: skip
        tensors, rng = {}, np.random.default_rng(0)
        for layer in range(2):
            for module, width in (("q_proj", 32), ("v_proj", 16)):
                stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                for leaf, shape in (("A", (4, 32)), ("B", (width, 4))):
                    values = rng.normal(size=shape).astype(np.float32)
                    tensors[f"{stem}.lora_{leaf}.weight"] = values
        self.valid = {
            "adapter_config.json": json.dumps(settings).encode(),
            "adapter_model.safetensors": safetensors.numpy.save(tensors),
        }

    def attempt(self, rng: random.Random) -> None:
        from jaxtrain.lora.peft_config import read_settings
        from jaxtrain.lora.peft_files import load_adapter

        path = self.spoil(rng)
        read_settings(path)
        _, settings = load_adapter(path, self.base)
        alphas = (settings.alpha, *settings.alpha_pattern.values())
        if not all(math.isfinite(alpha) and alpha > 0 for alpha in alphas):
            raise Nonsense(f"lora_alpha of {alphas}")


KINDS: dict[str, type[Kind]] = {
    "config": Config,
    "yaml": Yaml,
    "rows": Rows,
    "model": Model,
    "tokenizer": Tokenizer,
    "adapter": Adapter,
}


def prepare() -> None:
    """Import what all kinds need, and start nothing that a fork would lose."""
    import pyarrow.parquet  # noqa: F401
    import safetensors.numpy  # noqa: F401
    import transformers  # noqa: F401

    import jaxtrain.data.prepare.prepare
    import jaxtrain.data.rows.source
    import jaxtrain.lora.peft_files
    import jaxtrain.models.hf
    import jaxtrain.models.transformer  # noqa: F401


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log's lines, which thousands of inputs would fill a screen with."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
