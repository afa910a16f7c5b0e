"""`jaxtrain chat`: a conversation in the terminal."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxtrain.cli.generate import (
    add_sampling,
    check_sampling,
    encode,
    for_output,
    load,
    make_stream,
    require_template,
    settle,
)
from jaxtrain.cli.source import SourceParser, prepare_devices
from jaxtrain.record.safe_text import is_unicode

if TYPE_CHECKING:
    from jaxtrain.models.load import LoadedModel

_EXAMPLES = """\
Talk with a model, an adapter or a run, by the chat template of its tokenizer:

  jaxtrain chat out/sft
  jaxtrain chat Qwen/Qwen2.5-0.5B-Instruct --temperature=0.7 --system="Be brief."

Each answer knows the whole conversation. /clear begins a new one, /exit or Ctrl-D
leaves, and Ctrl-C stops an answer. How tokens are drawn is, where no flag says it, as
the model's generation_config.json has it, and so are the tokens that end an answer."""
_HELP = "/clear begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"

Message = dict[str, str]


def main(arguments: Sequence[str]) -> None:
    """Talk until the input ends.

    Raises:
        ValueError: a flag, the source, or a model without a chat template.
    """
    parser = SourceParser("chat", _EXAMPLES)
    parser.add_argument("--system", help="the system message")
    add_sampling(parser, max_new_tokens=512)
    options, source, flags = parser.read(arguments)
    check_sampling(parser, options)
    prepare_devices()
    run, policy = settle(source, options, flags)
    import jax

    if jax.process_count() > 1:
        raise ValueError("chat runs in one process: start it without a launcher")
    model = load(run, policy, options)
    require_template(model)
    answer = make_answer(model, options)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and history in `input`)
    if sys.stdin.isatty():
        print(_HELP)
    talk(answer, options.system)


def make_answer(
    model: "LoadedModel", options: Any
) -> Callable[[list[Message]], Iterator[str]]:
    """A function that answers a conversation by pieces of text."""
    import jax

    from jaxtrain.evaluation.stream import text_pieces

    stream, weights = make_stream(model, options), model.on_device(model.params)
    key = jax.random.key(options.seed)

    def answer(messages: list[Message]) -> Iterator[str]:
        tokens, limit = encode(model, messages, 0), model.config.longest_text
        if len(tokens) >= limit:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens, and the model {limit}"
                " positions"
            )
        # Each turn has draws of its own, and what room is left.
        turn = jax.random.fold_in(key, len(messages))
        answered = stream(weights, tokens, key=turn)
        fitting = itertools.islice(answered, limit - len(tokens))
        yield from text_pieces(model.tokenizer, fitting)

    return answer


def talk(
    answer: Callable[[list[Message]], Iterator[str]], system: str | None = None
) -> None:
    """Read turns from standard input and print the answers, until the input ends."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            print(f"\n{_HELP}")
            continue
        if not is_unicode(text):
            print("This line is not UTF-8 and was not sent.")
            continue
        if text == "/exit":
            return
        if text == "/clear":
            messages = list(opening)
        elif text.startswith("/"):
            print(_HELP)
        elif text:
            messages = _take_turn(answer, messages, text)


def _take_turn(
    answer: Callable[[list[Message]], Iterator[str]], messages: list[Message], text: str
) -> list[Message]:
    """The conversation with a question and its answer, or as it was after an error.

    What was answered before Ctrl-C counts as the answer.
    """
    asked = [*messages, {"role": "user", "content": text}]
    said = ""
    try:
        for piece in answer(asked):
            said += piece
            print(for_output(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    except ValueError as error:
        print(f"{error}; /clear begins anew", file=sys.stderr)
        return messages
    print()
    return [*asked, {"role": "assistant", "content": said}]
