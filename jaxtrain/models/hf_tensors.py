"""The tensors of a Hugging Face directory, under uniform names and in a uniform form.

Checkpoints of the same model differ in how they name and store its tensors: they may
lack the prefix "model.", hold a shared embedding under the head's name only, stack the
experts (hf_experts.py), or use float8 or MXFP4 with scales (hf_float8.py, hf_mxfp4.py).
`open_tensors` hides these differences. Nothing is read until a tensor is indexed.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.hf_composite import is_wrapped, text_name
from jaxtrain.models.hf_config import fp8_block
from jaxtrain.models.hf_experts import split_fused
from jaxtrain.models.hf_files import find_weights
from jaxtrain.models.hf_float8 import whole_tensors
from jaxtrain.models.hf_mxfp4 import whole_stacks
from jaxtrain.models.hf_names import EMBEDDING, HEAD
from jaxtrain.models.weight_files import open_weights
from jaxtrain.storage.reading import READS_AT_ONCE, AnyFile, RemoteFile

_T = TypeVar("_T")

_COPIES = min(8, os.cpu_count() or 1)  # at once, from a file on the disk

# A file of transformers' base class, which has no head, lacks the first part of names.
_WITHOUT_PREFIX = re.compile(r"(layers\.\d+|embed_tokens|norm)\..+")


class Tensors(dict[str, Any]):
    """Tensors by name; each is read from its file when it is indexed.

    `promised`: for each tensor that the index file lists, the file that should hold it.
    `in_bucket`: whether the files are in a bucket.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        promised: Mapping[str, str],
        *,
        in_bucket: bool = False,
    ) -> None:
        super().__init__(tensors)
        self.promised = promised
        self.in_bucket = in_bucket

    def for_each(self, read: Callable[[_T], None], items: Iterable[_T]) -> None:
        """Call `read`, which copies from a tensor, for each item, several at once.

        The copies are not Python's, so that as many cores as there are share them; in
        buckets more are asked for than there are cores.
        """
        workers = READS_AT_ONCE if self.in_bucket else _COPIES
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            list(pool.map(read, items))

    def whereabouts(self, name: str) -> str:
        """Where a missing tensor should be, for a message; "" if it is unknown."""
        file = self.promised.get(name)
        return f" (the index says it is in {file}: download that again)" if file else ""


@contextlib.contextmanager
def open_tensors(
    path: str | os.PathLike[str], config: ModelConfig
) -> Iterator[Tensors]:
    """Open all tensors of a directory, under the names and in the form of `hf_names`.

    Use it in a `with` statement; the tensors can be read until it ends.

    Raises:
        ValueError: there are no weights, or files are missing or damaged.
    """
    directory = pathlib.Path(path)
    files, promised = find_weights(directory)
    with contextlib.ExitStack() as stack:
        stored: dict[str, Any] = {}
        file_of: dict[str, AnyFile] = {}
        for file in files:
            opened = stack.enter_context(open_weights(file))
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                stored[name], file_of[name] = opened.get_slice(name), file
        tensors = whole_tensors(stored, file_of, fp8_block(directory))
        tensors = whole_stacks(tensors, file_of)
        rename = text_name if is_wrapped(directory) else _prefixed
        tensors = _renamed(tensors, rename)
        tensors = split_fused(config.model_type, tensors)
        if config.tie_word_embeddings and HEAD in tensors:
            tensors.setdefault(EMBEDDING, tensors[HEAD])
        in_bucket = isinstance(files[0], RemoteFile)
        promised = _renamed(promised, rename)
        yield Tensors(tensors, promised, in_bucket=in_bucket)


def _renamed(
    tensors: Mapping[str, Any], rename: Callable[[str], str | None]
) -> dict[str, Any]:
    """Rename the keys; those that `rename` maps to None are left out."""
    named = ((rename(name), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def _prefixed(name: str) -> str:
    return f"model.{name}" if _WITHOUT_PREFIX.fullmatch(name) else name
