"""YAML as configurations have it: numbers of YAML 1.2, and nothing without end.

A small file can stand for a value larger than any memory, by aliases of aliases, or be
nested deeper than Python can follow. What is beyond the limits here is refused with its
line, as the file is read.
"""

import re
from typing import Any

import yaml

from jaxtrain.record.safe_text import shown

_DEEPEST = 60  # values within one another
_MOST_VALUES = 200_000  # in all, with aliases written out
_MERGE_TAG = "tag:yaml.org,2002:merge"


class RefusedYamlError(yaml.MarkedYAMLError):
    """YAML, but not as a configuration; the problem says what to do."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(None, None, problem, mark)


class YamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader with these numbers and limits, and no key given twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # values in a node that is whole, by its id

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        start: Any = event.start_mark
        if self._depth >= _DEEPEST:
            raise RefusedYamlError(
                f"more than {_DEEPEST} levels of nested values; nest them less", start
            )
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise RefusedYamlError(
                    f"*{event.anchor} refers to itself; write the value out", start
                )
            return node
        size = 1 + sum(self._sizes[id(child)] for child in _children(node))
        if size > _MOST_VALUES:
            raise RefusedYamlError(
                f"it holds more than {_MOST_VALUES:,} values, aliases written out;"
                " use fewer of them",
                start,
            )
        self._sizes[id(node)] = size
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, AttributeError, OverflowError) as error:
            # PyYAML passes Python's errors on for 2020-99-99, `!!int x` and their like.
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rpartition(":")[2]
            raise RefusedYamlError(
                f"{shown(node.value)} is not a valid {kind}; put it in quotes if you"
                " mean a string",
                node.start_mark,
            ) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if key.tag == _MERGE_TAG or not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in names:
                raise RefusedYamlError(
                    f"key {shown(key.value)} is given twice; keep one", key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
