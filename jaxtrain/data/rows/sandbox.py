"""Chat templates, compiled and rendered within limits of time and of output.

A template comes with a downloaded tokenizer or in a row, so none is trusted. It sees
plain JSON values alone, in Jinja's sandbox, as in transformers. Beyond that, what a
render may cost is bounded: loops and macros count steps, whatever makes a text counts
its characters, and long renders watch the processor's time. Steps and characters are
the same on every machine, so the same rows are bad everywhere; nothing needs signals or
a process of its own, so templates render in threads and workers alike.
"""

import datetime
import functools
import json
import re
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from jaxtrain.data.rows.marks import Span
from jaxtrain.record.safe_text import shown

MAX_STEPS = 2_000_000  # iterations, macro calls, and items of lists that are built
MAX_CHARACTERS = 100_000_000  # of all texts that are made on the way
MAX_SECONDS = 10.0  # of the thread's processor time
_STEPS_BETWEEN_CLOCKS = 256
_MAX_BITS = 100_000  # of an integer
_LONG_NUMBER = re.compile(r"\d{6}|\*|\{[^{}]*\{")  # in a format: a width it asks for
_REASONING = ("reasoning_content", "thinking", "reasoning")


class LimitError(Exception):
    """A template asks for more time or text than any conversation needs."""


class _Budget(threading.local):
    """What the render that this thread is at may still spend, and has written."""

    steps = 0
    characters = 0
    deadline = 0.0
    written = 0
    spans: list[Span] | None = None

    def open(self, spans: list[Span] | None) -> None:
        self.steps, self.characters = MAX_STEPS, MAX_CHARACTERS
        self.deadline = time.thread_time() + MAX_SECONDS
        self.written, self.spans = 0, spans

    def step(self) -> None:
        left = self.steps = self.steps - 1
        if left < 0:
            raise LimitError(f"it loops more than {MAX_STEPS:,} times")
        if not left % _STEPS_BETWEEN_CLOCKS and time.thread_time() > self.deadline:
            raise LimitError(f"it takes more than {MAX_SECONDS:.0f} seconds")

    def make(self, characters: int) -> None:
        """Spend what a text of this length costs, before or after it is made."""
        self.characters -= characters
        if self.characters < 0:
            raise LimitError(f"it makes more than {MAX_CHARACTERS:,} characters")

    def weigh(self, *values: Any) -> int:
        """Spend all that values hold, written out; returns their characters."""
        total, left = 0, list(values)
        while left:
            value = left.pop()
            if isinstance(value, str):
                total += len(value)
                continue
            if isinstance(value, Namespace):
                value = getattr(value, "_Namespace__attrs")  # noqa: B009
            if isinstance(value, Mapping):
                left.extend(value.keys())
                left.extend(value.values())
            elif isinstance(value, list | tuple | set):
                left.extend(value)
            else:
                continue
            self.steps -= len(value)
            if self.steps < 0:
                raise LimitError(f"it builds lists of more than {MAX_STEPS:,} items")
        self.make(total)
        return total


_BUDGET = _Budget()


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    spans: list[Span] | None = None,
) -> str:
    """A conversation as text.

    Args:
        messages, variables: plain, as `plain_messages` and `plain_data` give them.
        spans: filled with what stands between {% generation %} and {% endgeneration %}.

    Raises:
        Exception: whatever the template raises, `LimitError` among others.
    """
    compiled = compile_template(template)
    _BUDGET.open(spans)
    written = []
    for part in compiled.generate({**variables, "messages": messages}):
        written.append(part)
        _BUDGET.written += len(part)
        _BUDGET.make(len(part))
    return "".join(written)


@functools.lru_cache(maxsize=256)
def compile_template(template: str) -> jinja2.Template:
    """The template with its counters. Raises jinja2.TemplateSyntaxError."""
    environment = _environment()
    return environment.from_string(_Counted().visit(environment.parse(template)))


def plain_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates see them: no nulls; reasoning under all of its names."""
    seen = []
    for message in messages:
        own = {k: plain_data(v) for k, v in message.items() if v is not None}
        thought = next((own[key] for key in _REASONING if key in own), None)
        if thought is not None:
            own = {"thinking": thought, **own, "reasoning_content": thought}
        seen.append(own)
    return seen


def plain_data(value: Any) -> Any:
    """The same of JSON's types alone; what else there is, as the name of its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_data(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain_data(item) for item in value)
    if hasattr(value, "dtype") and hasattr(value, "item"):  # NumPy's scalars
        return plain_data(value.item())
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


class _Counted(NodeTransformer):
    """Adds the counters to a template's syntax tree.

    A step is read as an attribute: the sandbox would look into every call.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = _filtered(node.test, "_counted")
        return _stepping(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return _stepping(self.generic_visit(node))

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        is_slice = isinstance(node.arg, nodes.Slice)
        return _filtered(node, "_sliced") if is_slice else node

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        return _filtered(self.generic_visit(node), "_built")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_built") if node.ctx == "load" else node


def _stepping(node: Any) -> Any:
    step = nodes.ExprStmt(nodes.EnvironmentAttribute("step"), lineno=node.lineno)
    node.body = [step, *node.body]
    return node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which whatever makes a text or a number pays for it."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    @property
    def step(self) -> None:
        _BUDGET.step()

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        parts = list(parts)
        _BUDGET.make(sum(map(len, parts)))
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+":
            _check_operands(operator, left, right)
            return self.binop_table[operator](left, right)
        result = left + right
        if type(result) in (str, list, tuple):
            _BUDGET.make(len(result))
        return result

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        if isinstance(method, types.BuiltinMethodType):
            _check_method(method, [*args, *kwargs.values()])
        result = super().call(context, obj, *args, **kwargs)
        if isinstance(result, str | list | tuple):
            _BUDGET.make(len(result))
        elif isinstance(result, dict | Namespace):
            _BUDGET.weigh(result)
        return result


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse products, powers and formatted texts that are too long."""
    if operator == "%":
        if isinstance(left, str):
            _check_format(left, left.count("%") + 1, [right, left])
        return
    sizes = [
        len(x) if isinstance(x, str | list | tuple) else None for x in (left, right)
    ]
    length = sizes[0] if sizes[0] is not None else sizes[1]
    number = right if sizes[0] is not None else left
    if length is not None and isinstance(number, int):
        _BUDGET.make(length * max(number, 0))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right
        if operator == "*":
            bits = left.bit_length() + right.bit_length()
        if bits > _MAX_BITS:
            raise LimitError("it computes with numbers that are too long")


def _check_method(method: Any, args: Sequence[Any]) -> None:
    """Refuse a method whose text would be far longer than what it is given."""
    name, text = method.__name__, method.__self__
    if name in ("translate", "expandtabs", "to_bytes"):
        raise LimitError(f"it calls {shown(name)}, which a chat template may not")
    if name in ("center", "ljust", "rjust", "zfill"):
        _BUDGET.make(max([0, *(x for x in args if isinstance(x, int))]))
    elif name == "join" and args:
        _check_join(text, args[0])
    elif name == "replace" and len(args) > 1:
        _check_replace(text, *args[:2])
    elif name in ("format", "format_map"):
        _check_format(text, text.count("{"), args)


def _check_join(separator: Any, values: Any) -> None:
    if isinstance(values, Sequence) and isinstance(separator, str):
        _BUDGET.weigh(values)
        _BUDGET.make(len(values) * len(separator))


def _check_replace(text: Any, old: Any, new: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    _BUDGET.make(text.count(old) * len(new))


def _check_format(text: str, fields: int, values: Sequence[Any]) -> None:
    if _LONG_NUMBER.search(text):
        raise LimitError("it formats with a width beyond any text's")
    _BUDGET.make(fields * _BUDGET.weigh(*values))


# Filters that write out what they are given, and the largest number that each takes.
_WRITING = {
    "batch": 100_000, "center": 1_000_000, "indent": 16, "round": 100,
    "slice": 100_000, "tojson": 16, "wordwrap": 1_000_000,
    **dict.fromkeys((
        "capitalize", "e", "escape", "forceescape", "format", "join", "lower",
        "pprint", "replace", "safe", "string", "striptags", "sum", "title", "trim",
        "truncate", "upper", "urlencode", "wordcount",
        "xmlattr",
    )),
}  # fmt: skip


def _guarded(name: str, function: Callable[..., Any], most: int | None) -> Any:
    """A filter that pays for what it is given and for the text it makes of it."""

    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        # An environment or a context may come first.
        values = args[1:] if hasattr(function, "jinja_pass_arg") else args
        numbers = [*values[1:], *kwargs.values()]
        if most and any(isinstance(x, int) and x > most for x in numbers):
            raise LimitError(f"it gives the filter {shown(name)} more than {most:,}")
        if name == "join":
            values = (list(values[0]), *values[1:])
            args = (*args[: len(args) - len(values)], *values)
            separator = [*values[1:2], *(kwargs[k] for k in ("d",) if k in kwargs)]
            _check_join(str(separator[0]) if separator else "", values[0])
        elif name == "replace":
            _BUDGET.weigh(*values)
            _check_replace(*values[:1], *_replaced(values[1:], kwargs))
        elif name == "sum" and not all(
            isinstance(x, str | int | float) for x in numbers
        ):
            raise LimitError("it adds up lists with 'sum'")  # quadratic in Python
        elif name == "format":
            text = str(values[0])
            _check_format(text, text.count("%"), numbers)
        else:
            for value in values:
                if not isinstance(value, str):
                    _BUDGET.weigh(value)
        result = function(*args, **kwargs)
        if isinstance(result, str):
            _BUDGET.make(len(result))
        return result

    return filtered


def _replaced(values: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """The old and the new text of the filter `replace`, however they are given."""
    pair = [*values[:2], *(named[key] for key in ("old", "new") if key in named)]
    return pair if len(pair) == 2 else ["", ""]


def _counted(value: Any) -> Any:
    _BUDGET.step()
    return value


def _built(value: Any) -> Any:
    _BUDGET.weigh(value)
    return value


def _sliced(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _BUDGET.make(len(value))
    return value


def _concat(values: Sequence[Any]) -> str:
    _BUDGET.weigh(values)
    return "".join(map(str, values))


def _finalize(value: Any) -> Any:
    if not isinstance(value, str):
        _BUDGET.weigh(value)
    return value


class _Generation(Extension):
    """{% generation %}, transformers' tag around what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marked = nodes.CallBlock(self.call_method("_mark"), [], [], body)
        return marked.set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text, start = caller(), _BUDGET.written
        if _BUDGET.spans is not None:
            _BUDGET.spans.append((start, start + len(text)))
        return text


class _PublicNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no {shown(name)}")


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    for name in dict(*args, **kwargs):
        _check_public(name)
    return _PublicNamespace(*args, **kwargs)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    _check_format(form, 0, [])
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter writes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_finalize,
    )
    filters = environment.filters
    filters["tojson"] = _to_json
    for name, most in _WRITING.items():
        filters[name] = _guarded(name, filters[name], most)
    del filters["urlize"]
    filters.update(_built=_built, _concat=_concat, _counted=_counted, _sliced=_sliced)
    environment.globals.update(
        raise_exception=_raise, strftime_now=_now, dict=_dict, namespace=_namespace
    )
    del environment.globals["lipsum"]
    return environment
