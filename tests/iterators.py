"""Iterators over training batches, made of flat options as the tests name them."""

import dataclasses
from typing import Any

from jaxtrain.data.batches import pipeline
from jaxtrain.data.batches.pipeline import BatchShape, Reading
from jaxtrain.data.stream import batches


def parts_of(options: dict[str, Any]) -> tuple[BatchShape, Reading, dict[str, Any]]:
    """The options' `BatchShape` and `Reading`, and those that are of neither."""
    made, rest = [], dict(options)
    for part in (BatchShape, Reading):
        names = {field.name for field in dataclasses.fields(part)} & rest.keys()
        made.append(part(**{name: rest.pop(name) for name in names}))
    return made[0], made[1], rest


def make_train_iterator(dataset: Any, **options: Any) -> pipeline.BatchIterator:
    """`pipeline.make_train_iterator` of flat options."""
    shape, reading, rest = parts_of(options)
    return pipeline.make_train_iterator(dataset, shape, reading, **rest)


def make_stream_iterator(dataset: Any, **options: Any) -> batches.StreamIterator:
    """A `StreamIterator` of flat options."""
    shape, reading, rest = parts_of(options)
    return batches.StreamIterator(dataset, shape, reading, **rest)
