"""`jaxtrain generate`: continue prompts with a model, an adapter or a run."""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtrain.cli.command import file_argument, path_argument
from jaxtrain.cli.source import (
    COMPUTING,
    Source,
    SourceParser,
    check_acting,
    configure,
    prepare_devices,
)
from jaxtrain.config import RunConfig, resolve
from jaxtrain.config.flags import Flag, override
from jaxtrain.record.safe_text import escape_controls

if TYPE_CHECKING:
    from jaxtrain.evaluation.stream import Stream
    from jaxtrain.models.load import LoadedModel

Prompt = str | list[dict[str, Any]]

_EXAMPLES = """\
Continue prompts:

  jaxtrain generate out/sft "In the beginning"
  jaxtrain generate Qwen/Qwen2.5-0.5B-Instruct --chat "What is JAX?" --temperature=0.7
  jaxtrain generate out/lora --step=20 --prompts=prompts.jsonl --output=texts.jsonl

One prompt is answered as its tokens come. Several, and those of a file, are answered
together, one JSON line each. A prompt of - is standard input. A run is asked by the
model it exported or, where there is none yet, by its newest checkpoint. How tokens are
drawn is, where no flag says it, as the model's generation_config.json has it, and so
are the tokens that end a text."""

# Generation has attention to a cache of its own, and no loss.
_IDLE = ("model.attention", "model.loss_chunk_tokens")


def main(arguments: Sequence[str]) -> None:
    """Print the texts, and write them where `--output` says.

    Raises:
        ValueError: a flag, the source, a prompt or the model is not valid.
    """
    parser = SourceParser("generate", _EXAMPLES)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="a text, or - for standard input")
    add(
        "--prompts",
        dest="file",
        help="a .jsonl file with a prompt or messages in each row, or a text file with"
        " a prompt in each line; - for such lines of standard input",
    )
    add("--chat", action="store_true", help="put prompts into the chat template")
    add("--system", help="with --chat: the system message")
    add("--batch_size", type=int, default=8, help="prompts at once, over all devices")
    add("--output", type=file_argument, help="a .jsonl file for prompts and texts")
    add_sampling(parser, max_new_tokens=128)
    options, source, flags = parser.read(arguments)
    if options.system is not None and not options.chat:
        parser.error("--system: only --chat has a system message; add --chat")
    if options.batch_size < 1:
        parser.error(f"--batch_size={options.batch_size}: give 1 or more")
    prompts = read_prompts(options)
    if not prompts:
        empty = "" if options.file is None else f"--prompts={options.file}: "
        parser.error(f"{empty}no prompt is given: add one, or --prompts=FILE")
    check_sampling(parser, options)
    prepare_devices()
    run, policy = settle(source, options, flags)
    model = load(run, policy, options)
    if not all(isinstance(prompt, str) for prompt in prompts):
        require_template(model)
    if len(prompts) == 1 and options.file is None:
        texts = [_stream_one(model, options, prompts[0])]
    else:
        texts = _answer_all(model, options, prompts)
    _write(options.output, prompts, texts)


def add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """The flags by which tokens are chosen."""
    add = parser.add_argument
    add(
        "--max_new_tokens",
        type=int,
        default=max_new_tokens,
        help=f"the longest text, in tokens (default: {max_new_tokens})",
    )
    add(
        "--temperature",
        type=float,
        help="divides the logits; 0 takes the most likely token (default: as the"
        " model's generation_config.json samples, or 0)",
    )
    add(
        "--top_k",
        type=int,
        help="draw among so many tokens; 0 is all (default: the model's, or all)",
    )
    add(
        "--top_p",
        type=float,
        help="and among this much probability (default: the model's, or all)",
    )
    add("--seed", type=int, default=0, help="of the draws")


def check_sampling(parser: SourceParser, options: argparse.Namespace) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: names the flag.
    """
    for name, fits, wanted in (
        ("max_new_tokens", lambda value: value >= 1, "1 or more"),
        ("temperature", lambda value: value >= 0, "0 (greedy) or more"),
        ("top_k", lambda value: value >= 0, "0 (off) or more"),
        ("top_p", lambda value: 0 < value <= 1, "above 0, at most 1 (off)"),
    ):
        value = getattr(options, name)
        if value is not None and not fits(value):
            parser.error(f"--{name}={value}: give {wanted}")


def settle(
    source: Source, options: argparse.Namespace, flags: Sequence[Flag]
) -> tuple[RunConfig, Any]:
    """The configuration to load by, and the policy for `run.weights.load_state`.

    Raises:
        ValueError: a flag or the configuration is not valid, or the run has saved
            nothing.
    """
    import jax

    from jaxtrain.run.weights import choose_checkpoint, without_reference

    policy = None
    if source.kind == "run":
        asks_for_checkpoint = options.step is not None or options.model is not None
        if source.exported is not None and not asks_for_checkpoint:
            source = Source(str(source.exported), "model")
        else:
            step = options.step or "last"
            policy = choose_checkpoint(source.run(), source.checkpoints, step)
    config = configure(source, base=options.model, flags=flags)
    keys = override(config, flags)
    acting = (*COMPUTING, "data.chat_template")
    check_acting(keys, acting, "generation", but=_IDLE)
    run = resolve(config, device_count=jax.device_count(), flags=keys)
    return without_reference(run), policy


def load(run: RunConfig, policy: Any, options: argparse.Namespace) -> "LoadedModel":
    """Load the model, with its adapters kept separate from the base weights.

    Raises:
        ValueError: the model cannot be loaded, or a sampling option was given although
            generation always takes the most likely token.
    """
    from jaxtrain.models.source import read_generation
    from jaxtrain.run.weights import as_model, load_state

    if unread := read_generation(run).unread(**_sampling(options)):
        raise ValueError(
            f"{' and '.join(f'--{name}' for name in unread)}: no effect where the most"
            " likely token is taken, as by --temperature=0 or by a model whose"
            " generation_config.json does not sample; add --temperature"
        )
    return as_model(*load_state(run, policy))


def make_stream(model: "LoadedModel", options: argparse.Namespace) -> "Stream":
    """Make the stream that answers prompts one after the other, token by token."""
    from jaxtrain.evaluation import stream

    return stream.make_stream(
        model.decoder,
        eos_ids=model.eos_ids,
        pad_id=model.tokenizer.pad_token_id,
        **model.generation.settings(
            max_new_tokens=options.max_new_tokens, **_sampling(options)
        ),
    )


def encode(
    model: "LoadedModel", prompt: Prompt, number: int, room: int | None = None
) -> list[int]:
    """Tokenize a prompt, and check that `room` new tokens, if given, still fit.

    `number` is the prompt's number, which error texts name.

    Raises:
        ValueError: prompt and new tokens exceed the model's positions, or the prompt
            cannot be encoded.
    """
    from jaxtrain.evaluation.generate import encode_prompt

    config = model.config
    tokens = encode_prompt(model.tokenizer, prompt, number, config.vocab_size)
    limit = config.longest_text
    if room is not None and len(tokens) + room > limit:
        raise ValueError(
            f"prompt {number} has {len(tokens)} tokens: with --max_new_tokens={room}"
            f" that is more than the model's {limit} positions; shorten one of the two"
        )
    return tokens


def require_template(model: "LoadedModel") -> None:
    """Raise ValueError if the tokenizer has no template to write conversations by."""
    import jinja2

    own, lacks = getattr(model.tokenizer, "chat_template", None), ""
    named = own if isinstance(own, dict) else {}
    asked = [{"role": "user", "content": "?"}]
    if named and "default" not in named:
        lacks = " called default"
    elif own:
        try:
            model.tokenizer.apply_chat_template(asked, tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            lacks = f" that is Jinja (line {error.lineno}: {error.message})"
        except Exception:  # of this conversation, which others need not share
            return
    if lacks or not own:
        raise ValueError(
            f"the tokenizer of {model.directory} has no chat template{lacks}: give one"
            f" by --data.chat_template={'|'.join(('FILE', *sorted(named)))}, or"
            " continue plain text with jaxtrain generate"
        )


def read_prompts(options: argparse.Namespace) -> list[Prompt]:
    """The prompts of the command line and of a file, conversations as messages.

    Raises:
        ValueError: a row of the file has no prompt; names its line.
    """
    texts: list[Any] = [
        sys.stdin.read() if text == "-" else text for text in options.prompts
    ]
    if options.file is not None:
        texts += _read_file(options.file)
    if not options.chat:
        return texts
    opening = [] if options.system is None else [("system", options.system)]
    return [
        [{"role": r, "content": c} for r, c in (*opening, ("user", text))]
        if isinstance(text, str)
        else text
        for text in texts
    ]


def _read_file(name: str) -> Iterator[Prompt]:
    is_input = name == "-"
    if name.endswith((".csv", ".tsv", ".json", ".parquet", ".arrow", ".gz", ".zst")):
        raise ValueError(
            f"--prompts={name}: give a .jsonl file, or one with a prompt on each line"
        )
    try:
        text = (
            sys.stdin.read() if is_input else path_argument(name).read_text("utf-8-sig")
        )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 ({error.reason}); save it as UTF-8"
        ) from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if not name.endswith(".jsonl"):
            yield line
            continue
        try:
            yield _prompt_of(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}, line {number}: {error}") from error


def _prompt_of(row: Any) -> Prompt:
    """The prompt of a row of data, without the answer that may stand behind it."""
    if isinstance(row, Mapping):
        messages = row.get("messages")
        if isinstance(messages, list) and messages:
            while messages and messages[-1].get("role") == "assistant":
                messages = messages[:-1]
            return messages
        for column in ("prompt", "text"):
            if row.get(column) and isinstance(row[column], str | list):
                return row[column]
    raise ValueError("a row needs a prompt, messages or a text")


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags; None if not given, for the model's own setting."""
    return {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}


def _stream_one(
    model: "LoadedModel", options: argparse.Namespace, prompt: Prompt
) -> str:
    import jax

    from jaxtrain.evaluation.stream import text_pieces

    tokens = encode(model, prompt, 0, options.max_new_tokens)
    key = jax.random.key(options.seed)
    weights = model.on_device(model.params)
    made = make_stream(model, options)(weights, tokens, key=key)
    text = ""
    for piece in text_pieces(model.tokenizer, made):
        text += piece
        _print(piece, end="")
    _print("")
    return text


def _answer_all(
    model: "LoadedModel", options: argparse.Namespace, prompts: Sequence[Prompt]
) -> list[str]:
    for number, prompt in enumerate(prompts):
        encode(model, prompt, number, options.max_new_tokens)
    texts = model.generate(
        prompts,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        **_sampling(options),
    )
    for line in _lines(prompts, texts):
        _print(line)
    return texts


def _lines(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[str]:
    """Rows that can be trained and evaluated on."""
    rows = zip(prompts, texts, strict=True)
    return [
        json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False)
        for prompt, text in rows
    ]


def _write(
    output: pathlib.Path | None, prompts: Sequence[Prompt], texts: Sequence[str]
) -> None:
    import jax

    if output is not None and jax.process_index() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        lines = _lines(prompts, texts)
        output.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _print(text: str, end: str = "\n") -> None:
    import jax

    if jax.process_index() == 0:
        print(for_output(text), end=end, flush=True)


def for_output(text: str) -> str:
    """A model's text, with control characters escaped if stdout is a terminal."""
    return escape_controls(text) if sys.stdout.isatty() else text
