"""The files of a Hugging Face directory, and what is wrong with damaged ones.

A download that broke off, a clone without git-lfs and a copy onto a full disk leave
files that no reader takes. Each is described here in one line: which file, what is
wrong with it, what to do.
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors

from jaxtrain.models.bucket import weight_file, weight_names
from jaxtrain.models.hf_names import TOKENIZER_FILES, WEIGHTS, WEIGHTS_INDEX
from jaxtrain.models.problems import Problems
from jaxtrain.record.safe_text import shown
from jaxtrain.storage.reading import AnyFile, RemoteFile

_LFS_POINTER = b"version https://git-lfs"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_AGAIN = "download it again (`hf download`; in a git clone `git lfs pull`)"


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file holds none; it says what it holds.
    """
    _check_content(file)
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: integers too long too
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{file} is not JSON ({reason}): {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__}, not an object of keys: {_AGAIN}"
        )
    return content


def is_own_file(file: pathlib.Path) -> bool:
    """Whether a file of a directory, a link followed, is of that directory itself.

    Snapshots in the hub's cache hold links into the `blobs` beside `snapshots`.
    """
    directory = file.parent.resolve()
    homes = [directory]
    if directory.parent.name == "snapshots":
        homes.append(directory.parent.with_name("blobs"))
    return any(file.resolve().is_relative_to(home) for home in homes)


def check_tokenizer_files(directory: pathlib.Path) -> None:
    """Raise ValueError if files of the tokenizer are damaged; it names them all."""
    problems = Problems()
    for name in TOKENIZER_FILES:
        file = directory / name
        if not file.is_file():
            continue
        with problems.noted():
            if file.suffix == ".json":
                read_json(file)
            elif file.suffix == ".model":
                _check_content(file)
    problems.check()


def has_weights(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory has weights, or an index of them."""
    folder = pathlib.Path(directory)
    is_one = weight_file(folder, WEIGHTS).is_file()
    return is_one or (folder / WEIGHTS_INDEX).is_file()


def find_weights(directory: pathlib.Path) -> tuple[list[AnyFile], dict[str, str]]:
    """The files of weights, and for each tensor of an index the file that it names.

    Raises:
        ValueError: there are none, or files are missing or damaged; it names all.
    """
    weight_map: dict[str, str] = {}
    if (whole := weight_file(directory, WEIGHTS)).is_file():
        files = [whole]
    elif (directory / WEIGHTS_INDEX).is_file():
        weight_map = _read_index(directory / WEIGHTS_INDEX)
        names = sorted(set(weight_map.values()))
        files = [weight_file(directory, name) for name in names]
    else:
        raise ValueError(_why_no_weights(directory))
    _read_at_once([file for file in files if isinstance(file, RemoteFile)])
    problems = Problems()
    for file in files:
        with problems.noted():
            read_header(file)
    problems.check()
    return files, weight_map


def read_header(file: AnyFile) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and the place where its tensors begin.

    The header says for each tensor its `dtype`, `shape` and `data_offsets`.

    Raises:
        ValueError: the file is damaged.
        OSError: a bucket does not give it.
    """
    return (_remembered if isinstance(file, RemoteFile) else _read_header)(file)


def _read_at_once(files: list[RemoteFile]) -> None:
    """Read the headers of files in a bucket; their use says what is wrong."""

    def read(file: RemoteFile) -> None:
        with contextlib.suppress(ValueError):
            read_header(file)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(read, files))


def _read_header(file: AnyFile) -> tuple[dict[str, Any], int]:
    _check_content(file)
    size = file.stat().st_size
    # Of a file in a bucket no byte more than is asked for.
    with file.open("rb", 0 if isinstance(file, RemoteFile) else -1) as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        start = 8 + length
        text = stream.read(length) if start <= size else b""
    try:
        header = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is cut off in its header or is not a safetensors file: {_AGAIN}"
        ) from error
    try:
        wanted = start + _check_places(header)
    except ValueError as error:
        raise ValueError(f"{file}: {error}: {_AGAIN}") from None
    if size != wanted:
        state = "is cut off" if size < wanted else "is too long"
        raise ValueError(
            f"{file} {state}: {size} bytes, but its header says {wanted}: {_AGAIN}"
        )
    return header, start


_remembered = functools.lru_cache(maxsize=512)(_read_header)

# Bits of a value, by safetensors' name of its type.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def _check_places(header: Mapping[str, Any]) -> int:
    """The bytes of all tensors of a header; they must lie one behind the other.

    Raises:
        ValueError: a tensor's type, shape or place is none; names the tensor.
    """
    places = []
    for name, tensor in header.items():
        try:
            bits, shape = _BITS[tensor["dtype"]], tensor["shape"]
            begin, end = tensor["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                f"its header gives {shown(name, 200)} no type, shape and place"
            ) from None
        numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
        if any(type(each) is not int or not 0 <= each < 2**63 for each in numbers):
            raise ValueError(
                f"its header gives {shown(name, 200)} the shape {shown(shape, 80)} at"
                f" {shown(begin)} to {shown(end)}"
            )
        if (end - begin) * 8 != math.prod(shape) * bits:
            raise ValueError(
                f"its header gives {shown(name, 200)} {end - begin} bytes, which the"
                f" shape {shown(shape, 80)} of {tensor['dtype']} does not take"
            )
        places.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            raise ValueError(
                f"its header puts {shown(name, 200)} at byte {begin} and not at {at},"
                " where the tensor before it ends"
            )
        at = end
    return at


@contextlib.contextmanager
def reading(file: pathlib.Path) -> Iterator[None]:
    """Name the file in what safetensors says of it, as a ValueError."""
    try:
        yield
    except safetensors.SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read ({reason:.300}): {_AGAIN}") from error


def _check_content(file: AnyFile) -> None:
    """Raise ValueError for a file that is not there, empty or a pointer of git-lfs."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: {_AGAIN}")
    with file.open("rb", 0 if isinstance(file, RemoteFile) else -1) as stream:
        start = stream.read(len(_LFS_POINTER))
    if not start:
        raise ValueError(f"{file} is empty: {_AGAIN}")
    if start == _LFS_POINTER:
        raise ValueError(
            f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in"
            " the clone, or download it with `hf download`"
        )


def _read_index(index: pathlib.Path) -> dict[str, str]:
    """Which file each tensor is in, by an index.

    Raises:
        ValueError: it does not say so, or names files that are elsewhere or missing.
    """
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, Mapping)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(
            f"{index} has no weight_map that gives each tensor's file: {_AGAIN}"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        # The index is input: it may not name files elsewhere.
        if pathlib.PurePath(name).name != name or "\\" in name or name == "..":
            raise ValueError(
                f"{index} names the file {shown(name)}; shards must lie beside the"
                " index"
            )
    folder = index.parent
    missing = [name for name in names if not weight_file(folder, name).is_file()]
    if missing:
        raise ValueError(
            f"{index} names files that {index.parent} lacks: {', '.join(missing)};"
            " download them again"
        )
    return dict(weight_map)


def _why_no_weights(directory: pathlib.Path) -> str:
    names = weight_names(directory)
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{directory} has its weights only as pickles ({', '.join(pickles)}),"
            " which can run code when read. Convert them to safetensors:"
            " transformers' AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...) on a machine that may run them"
        )
    found = f"{directory} has neither {WEIGHTS} nor {WEIGHTS_INDEX}"
    if (directory / "adapter_config.json").is_file():
        return (
            f"{found}, but an adapter: name the model that it was trained on, and the"
            " adapter as training.lora.init_from"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    if len(others) == 1 and re.fullmatch(r"model\.\w+\.safetensors", others[0]):
        return f"{found}, only the variant {others[0]}: rename it to {WEIGHTS}"
    if others:
        return f"{found}, only {', '.join(others[:3])}: download the index too"
    return f"{found}: download the weights"


def shorten(items: list[str], most: int = 8) -> str:
    """The first few of a list in a message, and how many more there are."""
    more = len(items) - most
    return "; ".join(items[:most]) + (f"; and {more} more" if more > 0 else "")
