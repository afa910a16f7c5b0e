"""docs/from_trl.md: it has every option of the peers, and no key that we lack."""

import dataclasses
import pathlib
import re

import pytest

from jaxtrain.config.sections import SCHEMA
from jaxtrain.tree import dotted

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "from_trl.md"
QUOTED = set(re.findall(r"`([^`\n]+)`", PAGE.read_text()))
SHARED = (
    PAGE.read_text().split("go by the same name under `training`:")[1].split(". `")[0]
)


def fields_of(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


@pytest.mark.torch
@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig"])
def test_every_option_of_trl_has_its_place(name: str) -> None:
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    own = fields_of(getattr(trl, name)) - fields_of(transformers.TrainingArguments)
    assert own - QUOTED == set()


@pytest.mark.torch
def test_every_option_of_pefts_lora_has_its_place() -> None:
    peft = pytest.importorskip("peft")
    assert fields_of(peft.LoraConfig) - QUOTED == set()


def test_every_key_of_ours_that_the_page_names_exists() -> None:
    keys = set(dotted(SCHEMA))
    groups = {key.rsplit(".", 1)[0] for key in keys}
    named = {
        re.split(r"[ (=]", text)[0]
        for text in QUOTED
        if re.match(r"(training|model|data|mesh)\.\w", text)
    }
    assert len(named) > 30
    assert named - keys - groups == set()


def test_options_said_to_be_the_same_are_keys_of_ours() -> None:
    names = re.findall(r"`(\w+)`", SHARED)
    assert len(names) == 30
    assert set(names) - set(SCHEMA["training"]) == set()
