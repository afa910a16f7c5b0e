"""Uploads to the hub: what refuses them before anything long, and what they send."""

import json
import types

import huggingface_hub
import pytest

from jaxtrain.cli import main
from jaxtrain.config import default_config, resolve
from jaxtrain.run import export, hub, preflight

TOKEN = "hf_" + "abcd" * 8


class FakeApi:
    """The calls of `HfApi` that an upload makes; what they were given."""

    made: tuple = ()
    refuses = False

    def whoami(self):
        if FakeApi.refuses:
            raise RuntimeError("401 Client Error\nInvalid user token.")
        return {"name": "me"}

    def create_repo(self, name, *, private, exist_ok):
        assert exist_ok
        FakeApi.made = (name, private)

    def create_commit(self, name, operations, *, commit_message):
        def content(operation):
            with operation.as_file() as file:
                return file.read()

        sent = {each.path_in_repo: content(each) for each in operations}
        FakeApi.made += (name, commit_message, sent)
        return types.SimpleNamespace(repo_url=f"https://hub/{name}")


@pytest.fixture
def online(monkeypatch):
    """A machine that may use the network and has logged in, with a hub that is fake."""
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "refuses", False)
    monkeypatch.setattr(FakeApi, "made", ())
    hub._check_token.cache_clear()
    return monkeypatch


@pytest.fixture
def adapter(tmp_path):
    directory = tmp_path / "run" / "adapter"
    directory.mkdir(parents=True)
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    (directory / "README.md").write_text("the card")
    return directory


def test_a_run_that_could_not_upload_is_refused_before_it_starts(online, tmp_path):
    config = default_config()
    config.training.push_to_hub = "me/model"
    run = resolve(config)
    preflight.check(run, tmp_path)  # logged in, and the hub knows the token
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE = 1 forbids the network"):
        preflight.check(run, tmp_path, {"HF_HUB_OFFLINE": "1"})
    online.setattr(FakeApi, "refuses", True)
    hub._check_token.cache_clear()
    with pytest.raises(ValueError, match=r"\(401 Client Error\).*hf auth login"):
        preflight.check(run, tmp_path, {})
    online.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"no token of the hub.*HF_TOKEN"):
        preflight.check(run, tmp_path, {})
    config.training.push_to_hub = "model"
    with pytest.raises(ValueError, match=r"(?s)'model' is not .* owner/name"):
        preflight.check(resolve(config), tmp_path, {})


def test_an_upload_needs_an_export(online):
    config = default_config()
    config.training.push_to_hub = "me/model"
    config.training.save_final_model = False
    lines = [line for line in resolve(config).explain() if "push_to_hub" in line]
    assert len(lines) == 1 and "save_final_model" in lines[0]


def test_the_command_is_refused_offline_with_code_2(adapter, capsys):
    (adapter / "adapter_config.json").write_text("{}")
    assert main(["push", str(adapter), "me/model"]) == 2  # as conftest.py sets it
    error = capsys.readouterr().err
    assert "HF_HUB_OFFLINE = 1 forbids the network" in error
    assert main(["push", str(adapter.parent / "none"), "me/model"]) == 2
    assert "holds no exported model or adapter" in capsys.readouterr().err


def test_the_command_uploads_a_runs_adapter_in_one_commit(online, adapter, capsys):
    base = "/home/me/.cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc"
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert main(["push", str(adapter.parent), "me/model", "--message=First"]) == 0
    printed = capsys.readouterr()
    assert "https://hub/me/model" in printed.out
    assert TOKEN not in printed.out + printed.err
    made, private, name, message, sent = FakeApi.made
    assert (made, private, name, message) == ("me/model", True, "me/model", "First")
    published = json.loads(sent.pop("adapter_config.json"))
    assert published == config | {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    assert sent == {"adapter_model.safetensors": b"weights", "README.md": b"the card"}
    # It is only what is published that names the hub.
    assert json.loads((adapter / "adapter_config.json").read_text()) == config


def test_a_path_of_this_machine_is_not_published(online, adapter, caplog):
    config = {"base_model_name_or_path": "/home/me/private/model"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert main(["push", str(adapter), "me/model", "--public"]) == 0
    _, private, *_, sent = FakeApi.made
    assert not private
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] is None
    assert "its path is left out" in caplog.text


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/c/models--a-b--c.d/snapshots/12", "a-b/c.d"),
        ("/c/models--a-b--c.d/snapshots/12/", "a-b/c.d"),
        ("/models/mine", None),
        ("../mine", None),
        ("a/b/c", None),
        ("", None),
    ],
)
def test_a_base_has_its_name_on_the_hub_or_none(name, published):
    assert hub.base_name(name) == published


@pytest.mark.parametrize(
    ("directory", "base"),
    [
        ("/c/models--a--b/snapshots/12", "a/b"),
        ("/models/mine", "/models/mine"),
        (None, None),
    ],
)
def test_an_adapter_names_its_base_as_other_machines_know_it(
    directory, base, monkeypatch
):
    written = []
    monkeypatch.setattr(export.lora, "save_adapter", lambda *a, **_: written.extend(a))
    monkeypatch.setattr(export, "write_card", lambda *_, **__: None)
    settings = types.SimpleNamespace(changes_base=False)
    monkeypatch.setattr(export, "lora_config", lambda *_: settings)
    monkeypatch.setattr(export.hf_composite, "is_wrapped", lambda *_: False)
    config = types.SimpleNamespace(tie_word_embeddings=True)
    model = types.SimpleNamespace(directory=directory, config=config)
    state = types.SimpleNamespace(trainable={}, frozen={}, step=1)
    export._write_adapter("out", model, None, state)
    assert written == ["out", {}, settings, base]
