"""The documentation says what the code does, and its commands run."""

import pathlib
import runpy

from jaxtrain.config import default_config
from jaxtrain.config_schema import flatten

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCKS = ("from_scratch", "sft", "lora", "dpo")


def test_the_configuration_page_is_that_of_the_code():
    """If this fails: python docs/make_configuration.py."""
    module = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
    expected = module["make_page"]((ROOT / "configs" / "base.py").read_text())
    assert (ROOT / "docs" / "configuration.md").read_text() == expected


def test_the_configuration_page_has_every_key_with_a_word_on_it():
    page = (ROOT / "docs" / "configuration.md").read_text()
    general = default_config().training
    for key in flatten(default_config().to_dict()):
        parts = key.split(".")
        in_block = parts[0] == "training" and parts[1] in BLOCKS and len(parts) > 2
        if in_block and parts[2] in general:
            continue  # a general key's twin
        assert f"| `{key}` |" in page, key
    for line in page.splitlines():
        if line.startswith("| `training"):
            assert line.count("|") >= 4, line
