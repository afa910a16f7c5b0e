"""A model directory's generation_config.json: read, applied, kept in the export.

What it says about sampling are defaults: `LoadedModel.generate` and
`training.generation` use them wherever a setting is left unset.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxtrain.record.safe_text import shown

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
# What transformers takes for `top_k` where a file that samples does not name it.
_USUAL_TOP_K = 50
# Settings that change the texts of transformers and that our generation lacks, each
# with the values at which it does nothing.
_NOT_APPLIED: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "min_p": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "repetition_penalty": (None, 1),
    "sequence_bias": (None,),
    "stop_strings": (None,),
    "suppress_tokens": (None,),
    "typical_p": (None, 1),
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The keys of a generation_config.json; none where a directory has no such file."""

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, in the order of the file."""
        return as_ids(self.values.get("eos_token_id"))

    @property
    def _samples(self) -> bool:
        return self.values.get("do_sample") is True

    @property
    def _temperature(self) -> float:
        return self._value("temperature", 1.0) if self._samples else 0.0

    def settings(self, **given: Any) -> dict[str, Any]:
        """`given`, and the file's values or ours for what is None in it.

        Returns:
            `max_new_tokens`, `temperature` (0: greedy, also where the file does not
            sample), `top_k` (0: off), `top_p` (1: off), and whatever else was given.
        """
        found = {
            "max_new_tokens": self._value("max_new_tokens", 64),
            "temperature": self._temperature,
            "top_k": self._value("top_k", _USUAL_TOP_K if self._samples else 0),
            "top_p": self._value("top_p", 1.0),
        }
        self._warn_of_what_is_not_applied()
        if unread := self.unread(**given):
            logger.warning(
                "generation takes the most likely token, so %s is not read: the"
                " temperature is 0, or unset and the model's %s does not sample",
                " and ".join(f"{name} = {given[name]}" for name in unread),
                FILE,
            )
        return found | {
            name: value for name, value in given.items() if value is not None
        }

    def unread(self, **given: Any) -> list[str]:
        """The given settings that have no effect because generation is greedy.

        They act only where tokens are drawn, and the temperature is 0 here.
        """
        temperature = given.get("temperature")
        if temperature or (temperature is None and self._temperature):
            return []
        off = (("top_k", (None, 0)), ("top_p", (None, 1)))
        return [name for name, values in off if given.get(name) not in values]

    def save(self, directory: str | pathlib.Path) -> None:
        """Write the file into a directory."""
        text = json.dumps(dict(self.values), indent=2) + "\n"
        (pathlib.Path(directory) / FILE).write_text(text, encoding="utf-8")

    def _value(self, name: str, otherwise: Any) -> Any:
        value = self.values.get(name)
        return otherwise if value is None else value

    def _warn_of_what_is_not_applied(self) -> None:
        left_out = [
            f"{name} = {shown(self.values[name])}"
            for name, neutral in _NOT_APPLIED.items()
            if self.values.get(name) not in neutral
        ]
        if left_out:
            logger.warning(
                "generation here does not apply %s of the model's %s; the export keeps"
                " the file",
                ", ".join(left_out),
                FILE,
            )


def read_generation_config(directory: str | pathlib.Path | None) -> GenerationConfig:
    """Read a directory's generation_config.json; empty without a directory or a file.

    Raises:
        ValueError: it is no JSON object, or holds values of a wrong type: all of them.
    """
    file = pathlib.Path(directory or "") / FILE
    if directory is None or not file.is_file():
        return GenerationConfig()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(
            f"{file} is not JSON ({reason}): download it again, or delete it, and"
            " generation takes its own defaults"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} holds a {type(values).__name__}, not an object of settings:"
            " download it again, or delete it"
        )
    problems = [
        f"{name} = {shown(values[name], 60)}: must be {wanted}"
        for name, (fits, wanted) in _CHECKS.items()
        if values.get(name) is not None and not fits(values[name])
    ]
    if problems:
        raise ValueError(f"{file} has {'; '.join(problems)}. Correct or delete it")
    return GenerationConfig(values)


def as_ids(value: Any) -> tuple[int, ...]:
    """Token ids as a tuple, given one, several, or None."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_whole(value) and value >= 0


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "eos_token_id": (
        lambda value: all(map(_is_id, as_ids(value))),
        "a token id or a list of them",
    ),
    "bos_token_id": (_is_id, "a token id"),
    "pad_token_id": (_is_id, "a token id"),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: _is_number(value) and value >= 0, "at least 0"),
    "top_p": (
        lambda value: _is_number(value) and 0 < value <= 1,
        "above 0 and at most 1",
    ),
    "top_k": (_is_id, "a whole number, at least 0"),
    "max_new_tokens": (
        lambda value: _is_whole(value) and value >= 1,
        "a whole number, at least 1",
    ),
}
