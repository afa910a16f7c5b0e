"""Kinds of damage to a checkpoint, as disks, people and half-done copies make them.

`KINDS` is the table. Each kind gets the folder of the newest checkpoint and that of an
older one, and changes files of the newest alone.
"""

import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable

Damage = Callable[[pathlib.Path, pathlib.Path], None]
KINDS: dict[str, Damage] = {}


def files_of(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    """The files of a checkpoint, in an order that does not depend on the disk."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip_bit(path: pathlib.Path, bit: int) -> None:
    """Invert one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_random_bit(checkpoint: pathlib.Path, seed: int) -> str:
    """Invert one bit of all the bits of a checkpoint; says which."""
    files = [path for path in files_of(checkpoint) if path.stat().st_size]
    draws = random.Random(seed)
    # Half of the seeds take any file alike: small ones hold what describes the rest.
    weights = [path.stat().st_size if seed % 2 else 1 for path in files]
    path = draws.choices(files, weights)[0]
    bit = draws.randrange(8 * path.stat().st_size)
    flip_bit(path, bit)
    return f"bit {bit} of {path.relative_to(checkpoint)}"


def _data_file(checkpoint: pathlib.Path) -> pathlib.Path:
    """The largest file: the numbers of the arrays."""
    return max(files_of(checkpoint), key=lambda path: path.stat().st_size)


# Each a path below the step's folder; "data" is the largest file.
_PARTS = {
    "arrays": "data",
    "array index": "state/manifest.ocdbt",
    "process index": "state/ocdbt.process_0/manifest.ocdbt",
    "array metadata": "state/_METADATA",
    "sharding": "state/_sharding",
    "record": "record/metadata",
    "checksums": "checksums/process_0.json",
    "step metadata": "_CHECKPOINT_METADATA",
}


def _find(checkpoint: pathlib.Path, part: str) -> pathlib.Path:
    name = _PARTS[part]
    return _data_file(checkpoint) if name == "data" else checkpoint / name


def _on_each_part(name: str, change: Callable[[pathlib.Path], None]) -> None:
    """Add one kind for each part of a checkpoint."""
    for part in _PARTS:

        def damage(newest: pathlib.Path, _: pathlib.Path, part: str = part) -> None:
            change(_find(newest, part))

        KINDS[f"{part}: {name}"] = damage


def _truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip_in_the_middle(path: pathlib.Path) -> None:
    flip_bit(path, 4 * path.stat().st_size + 1)


def garble(path: pathlib.Path) -> None:
    """Fill a file with as many random bytes as it has."""
    size = path.stat().st_size
    path.write_bytes(random.Random(size).randbytes(size))


def _make_folder(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


_on_each_part("deleted", pathlib.Path.unlink)
_on_each_part("cut in half", _truncate)
_on_each_part("empty", lambda path: path.write_bytes(b""))
_on_each_part("all zeros", lambda path: path.write_bytes(bytes(path.stat().st_size)))
_on_each_part("one bit flipped", _flip_in_the_middle)
_on_each_part("garbled", garble)
_on_each_part("a folder in its place", _make_folder)


def _kind(name: str) -> Callable[[Damage], Damage]:
    def add(damage: Damage) -> Damage:
        KINDS[name] = damage
        return damage

    return add


for _part in ("state", "record", "checksums"):

    def _delete_part(newest: pathlib.Path, _: pathlib.Path, part: str = _part) -> None:
        shutil.rmtree(newest / part)

    def _swap_part(
        newest: pathlib.Path, older: pathlib.Path, part: str = _part
    ) -> None:
        shutil.rmtree(newest / part)
        shutil.copytree(older / part, newest / part)

    KINDS[f"{_part}/ deleted"] = _delete_part
    KINDS[f"{_part}/ of an older step in its place"] = _swap_part


@_kind("the whole folder is empty")
def _(newest: pathlib.Path, _: pathlib.Path) -> None:
    shutil.rmtree(newest)
    newest.mkdir()


@_kind("a file in place of the folder")
def _(newest: pathlib.Path, _: pathlib.Path) -> None:
    shutil.rmtree(newest)
    newest.write_text("a checkpoint was here")


@_kind("a dangling link in place of the folder")
def _(newest: pathlib.Path, _: pathlib.Path) -> None:
    shutil.rmtree(newest)
    newest.symlink_to(newest.with_name("nowhere"))


@_kind("an older step under the newest one's name")
def _(newest: pathlib.Path, older: pathlib.Path) -> None:
    shutil.rmtree(newest)
    shutil.copytree(older, newest)


@_kind("data files of all arrays swapped with an older step's")
def _(newest: pathlib.Path, older: pathlib.Path) -> None:
    ours, theirs = _data_file(newest), _data_file(older)
    shutil.copyfile(theirs, ours)


@_kind("data file longer than it was")
def _(newest: pathlib.Path, _: pathlib.Path) -> None:
    path = _data_file(newest)
    path.write_bytes(path.read_bytes() * 2)


@_kind("data file: one block of 512 bytes is zero")
def _(newest: pathlib.Path, _: pathlib.Path) -> None:
    path = _data_file(newest)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 512] = bytes(len(content[middle : middle + 512]))
    path.write_bytes(content)


@_kind("data file: two blocks swapped")
def _(newest: pathlib.Path, _: pathlib.Path) -> None:
    path = _data_file(newest)
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    first, second = content[half - 512 : half], content[half : half + 512]
    content[half - 512 : half + 512] = second + first
    path.write_bytes(content)


def _edit_json(path: pathlib.Path, edit: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def _edits(part: str, name: str, edit: Callable[[dict], None]) -> None:
    def damage(newest: pathlib.Path, _: pathlib.Path) -> None:
        _edit_json(_find(newest, part), edit)

    KINDS[f"{part}: {name}"] = damage


def _rename_leaf(record: dict) -> None:
    name = next(iter(record["layout"]))
    record["layout"]["another"] = record["layout"].pop(name)


def _duplicate_leaf(record: dict) -> None:
    name, description = next(iter(record["layout"].items()))
    record["layout"][f"{name}.copy"] = description


def _set_hash(sealed: dict) -> None:
    name = next(iter(sealed["body"]["blocks"]))
    sealed["body"]["blocks"][name][0][1] = "0" * 16


_edits("record", "another step", lambda record: record.update(step=99))
_edits("record", "without its config", lambda record: record.pop("config"))
_edits("record", "without its format", lambda record: record.pop("format"))
_edits("record", "a leaf renamed", _rename_leaf)
_edits("record", "a leaf twice", _duplicate_leaf)
_edits("record", "no data position", lambda record: record.update(data_states=[]))
_edits("record", "says it has no checksums", lambda r: r.update(checksums=0))
_edits("checksums", "one hash altered", _set_hash)
_edits("checksums", "no blocks", lambda sealed: sealed["body"].update(blocks={}))
_edits("checksums", "no body", lambda sealed: sealed.pop("body"))
_edits("record", "another metric", lambda r: r["metrics"].update(loss=0.125))


@_kind("record: valid JSON of another kind")
def _(newest: pathlib.Path, _: pathlib.Path) -> None:
    (newest / "record" / "metadata").write_text("[1, 2, 3]")


@_kind("record: 100,000 brackets")
def _(newest: pathlib.Path, _: pathlib.Path) -> None:
    (newest / "record" / "metadata").write_text("[" * 100_000)


@_kind("record: not UTF-8")
def _(newest: pathlib.Path, _: pathlib.Path) -> None:
    path = newest / "record" / "metadata"
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


@_kind("files of arrays that are links to nowhere")
def _(newest: pathlib.Path, _: pathlib.Path) -> None:
    path = _data_file(newest)
    path.unlink()
    path.symlink_to("nowhere")
