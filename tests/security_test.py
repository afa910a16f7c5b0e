"""SECURITY.md, line by line: every test here is named there, and the other way."""

import ast
import io
import json
import logging
import pathlib
import re
import socket
import sys

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import yaml

from jaxtrain import assets, cli
from jaxtrain.cli import chat, ending, generate, source
from jaxtrain.config import ConfigError, diff, load_yaml, resolve
from jaxtrain.data import inspect
from jaxtrain.data.rows.formats import BadRow
from jaxtrain.data.rows.jinja import read_template
from jaxtrain.data.rows.source import load_rows
from jaxtrain.data.rows.template import render_chat
from jaxtrain.data.rows.tokenize import load_tokenizer
from jaxtrain.models import hf_composite, hf_files
from jaxtrain.record import logs, provenance, safe_text
from jaxtrain.record.console import ConsoleWriter
from jaxtrain.report.page import write_report
from jaxtrain.run import hub
from jaxtrain.storage import folders, mirror, reading
from tests.runs import tiny_config, train

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxtrain"
TOKEN = "hf_" + "QwErTyUiOpAsDfGhJkLz"
SIGNATURE = "5f2d9a77c0"
SIGNED = f"https://b.s3.amazonaws.com/x?X-Amz-Signature={SIGNATURE}&versionId=3"
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m"


def trees():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        yield name, ast.parse(path.read_text("utf-8"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def calls(tree):
    """The dotted name of each call, with its node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_every_line_names_its_test_and_every_test_its_line():
    page = (ROOT / "SECURITY.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+)`", page)
    tests = [name for name in globals() if name.startswith("test_")]
    tests.remove("test_every_line_names_its_test_and_every_test_its_line")
    assert sorted(named) == sorted(tests)


# --- what is read --------------------------------------------------------------------


def test_nothing_that_is_read_is_unpickled(tmp_path):
    unpickling = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
                  "torch"}  # fmt: skip
    for name, tree in trees():
        roots = {module.split(".")[0] for module in imported(tree)}
        assert not roots & unpickling, name
        if "multiprocessing" in roots:  # its pipes, to processes of our own
            assert name.startswith(("data/prepare/worker", "data/stream/producer")), (
                name
            )
        for called, node in calls(tree):
            given = {keyword.arg for keyword in node.keywords}
            assert "allow_pickle" not in given, name  # numpy's default is False
            assert not called.endswith(("read_pickle", "torch.load")), name
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        np.load(tmp_path / "objects.npy")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_weights_in_pickles_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ValueError, match=re.escape(name)) as refused:
        hf_files.find_weights(tmp_path)
    assert "pickle" in str(refused.value) and "safetensors" in str(refused.value)


def test_no_text_is_run_as_code_or_by_a_shell():
    may_run = {"config/files.py": "spec.loader.exec_module"}  # a config that is Python
    for name, tree in trees():
        for called, node in calls(tree):
            assert called not in {"eval", "exec", "compile", "__import__"}, name
            assert not called.startswith(("os.system", "os.popen", "runpy.")), name
            assert "exec_module" not in called or may_run.get(name) == called, name
            if called.startswith("subprocess."):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                assert "shell" not in given, name
                assert isinstance(node.args[0], ast.List), name


def test_yaml_makes_plain_values_alone(tmp_path):
    file = tmp_path / "run.yaml"
    made = tmp_path / "made"
    file.write_text(f"data: !!python/object/apply:os.mkdir ['{made}']\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_yaml(file)
    assert not made.exists()
    for name, tree in trees():
        for called, node in calls(tree):
            if called == "yaml.load":
                assert ast.unparse(node.args[1]) == "YamlLoader", name
            assert not called.startswith(("yaml.unsafe", "yaml.full")), name
    from jaxtrain.config.yaml_loader import YamlLoader

    assert issubclass(YamlLoader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}{{ messages.__class__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__}'.format(messages) }}",
    ],
)
def test_chat_templates_stay_in_the_sandbox(template):
    tokenizer = load_tokenizer(str(assets.asset_path(assets.TOKENIZER)))
    messages = [{"role": "user", "content": "x"}]
    try:
        tokenizer.chat_template = read_template(template)
        shown = render_chat(tokenizer, messages, {})
    except (ValueError, BadRow):
        shown = ""
    # What may not be seen is undefined, and prints as nothing.
    assert shown == "" and messages == [{"role": "user", "content": "x"}]
    for name, tree in trees():
        for called, _ in calls(tree):  # nothing else makes a template of a text
            assert not called.endswith(("jinja2.Template", ".from_string")) or (
                name == "data/rows/sandbox.py"
            ), name


def tokenizer_folder(folder, **settings):
    """The embedded tokenizer with other settings."""
    folder.mkdir(parents=True)
    for file in pathlib.Path(assets.asset_path(assets.TOKENIZER)).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_code_in_a_model_directory_runs_only_if_asked_for(tmp_path):
    assert resolve({}).model.trust_remote_code is False
    folder = tokenizer_folder(
        tmp_path / "model",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]},
    )
    made = tmp_path / "made"
    (folder / "mine.py").write_text(f"open({str(made)!r}, 'w')\nclass Mine: pass\n")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ValueError, match="cannot load tokenizer") as refused:
        load_tokenizer(str(folder))
    assert "trust_remote_code" in str(refused.value)
    assert not made.exists()


# --- files that name others ----------------------------------------------------------


def write_index(folder, shard):
    folder.mkdir(parents=True, exist_ok=True)
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_weights(path):
    import safetensors.numpy

    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({"model.norm.weight": np.ones(2, np.float32)}, path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "..", "a/b"])
def test_an_index_of_weights_names_files_beside_it_alone(shard, tmp_path):
    write_weights(tmp_path / "x.safetensors")
    write_index(tmp_path / "model", shard)
    with pytest.raises(ValueError, match="must lie beside the index"):
        hf_files.find_weights(tmp_path / "model")


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    home = tmp_path / "models--a--b"
    write_weights(home / "blobs" / "1f2e")
    snapshot = home / "snapshots" / "abc"
    write_index(snapshot, "one.safetensors")
    (snapshot / "one.safetensors").symlink_to("../../blobs/1f2e")
    files, _ = hf_files.find_weights(snapshot)
    assert files == [snapshot / "one.safetensors"]
    assert hf_files.is_own_file(files[0])


def test_an_export_copies_no_file_from_outside_of_the_model(tmp_path, caplog):
    model, target = tmp_path / "model", tmp_path / "export"
    model.mkdir()
    target.mkdir()
    (tmp_path / "id_rsa").write_text("private")
    (model / "processor.json").write_text("{}")
    (model / "same.json").symlink_to("processor.json")
    (model / "notes.json").symlink_to("../id_rsa")
    hf_composite.copy_others(model, target)
    assert {file.name for file in target.iterdir()} == {"processor.json", "same.json"}
    assert "notes.json is a link" in caplog.text


def test_a_tokenizers_settings_name_no_other_file(tmp_path):
    own = load_tokenizer(str(assets.asset_path(assets.TOKENIZER)))
    (tmp_path / "elsewhere.json").write_text("{}")
    settings = dict.fromkeys(
        ("tokenizer_file", "vocab_file"), str(tmp_path / "elsewhere.json")
    )
    found = load_tokenizer(str(tokenizer_folder(tmp_path / "model", **settings)))
    assert found.get_vocab() == own.get_vocab()


def test_a_saved_data_set_names_files_beside_its_list_alone(tmp_path):
    for name in ("here", "there"):
        datasets.Dataset.from_dict({"text": [name]}).save_to_disk(tmp_path / name)
    state = tmp_path / "here" / "state.json"
    content = json.loads(state.read_text())
    (file,) = (tmp_path / "there").glob("*.arrow")
    for elsewhere in (f"../there/{file.name}", str(file)):
        content["_data_files"] = [{"filename": elsewhere}]
        state.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="must lie beside the list"):
            load_rows(str(tmp_path / "here"))
    (tmp_path / "dict").mkdir()
    splits = {"splits": ["../there"]}
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps(splits))
    with pytest.raises(ValueError, match="must lie beside the list"):
        load_rows(str(tmp_path / "dict"))


@pytest.mark.parametrize(
    "address, key",
    [
        ("gs://b/m", "m/../../../escape.json"),
        ("gs://b/m", "m/./../../escape.json"),
        ("gs://b/m", "m//etc/escape.json"),
        ("gs://b/m", "m/..\\\\escape.json"),
        ("gs://b/..", "../escape.json"),
        ("gs://b/../../x", "../../x/escape.json"),
        ("s3://b/a/..", "a/../escape.json"),
    ],
)
def test_a_copy_of_a_bucket_stays_in_the_cache(address, key, tmp_path, monkeypatch):
    class Bucket:
        def find(self, at, detail):
            name = f"b/{key}"
            return {name: {"name": name, "type": "file", "size": 2, "etag": "1"}}

    monkeypatch.setattr(folders, "filesystem", lambda address: Bucket())
    monkeypatch.setattr(reading, "read_range", lambda *_: b"{}")
    root = tmp_path / "outer" / "cache"
    try:
        copy = mirror.mirror(address, root)
    except ValueError as error:
        assert "leads out of the folder" in str(error)
    else:
        assert copy.resolve().is_relative_to(root.resolve())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.is_relative_to(root) for path in written)
    # What lies elsewhere is no copy, whatever it says of itself.
    fake = tmp_path / "entry"
    fake.mkdir()
    (fake / "source.json").write_text('{"address": "gs://b/m", "remaining": []}')
    assert mirror.origin(fake / "model", root) is None


# --- what is written -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x", "/tmp/x", "a/../../x", "..\\x", "\\x", "..", ".", "a\x1b[2Jb", "a\nb"],
)
def test_a_run_name_stays_below_the_folder_of_runs(name):
    with pytest.raises(ConfigError, match=r"training\.run_name = "):
        resolve({"training": {"run_name": name}})
    for allowed in ("mine", "team/mine", "...", "naïve 2×", "a..b"):
        assert resolve({"training": {"run_name": allowed}}).loop.run_name == allowed


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a\x1b", "a.b"])
def test_the_name_of_an_evaluation_set_is_a_word(name):
    with pytest.raises(ConfigError, match=r"data\.eval"):
        resolve({"data": {"train": "x.jsonl", "eval": {name: "y.jsonl"}}})


def test_temporary_files_have_names_that_nobody_foresees():
    for name, tree in trees():
        for called, _ in calls(tree):
            assert called not in {"tempfile.mktemp", "os.tempnam", "os.tmpnam"}, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/tmp", "/var/tmp", "/dev/shm")), name


OWN_LOSS = """
from jaxtrain.objectives.table import next_token


def loss(policy, reference, batch, *, api_key, address, more):
    assert api_key and address and more["hub_token"]
    return next_token(policy, reference, batch)
"""


def forbid(*_, **__):
    raise AssertionError("a run of local files asked for the network")


def test_a_local_run_asks_no_network_writes_nothing_elsewhere_and_keeps_no_secret(
    tmp_path, monkeypatch, caplog, capsys
):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "loss_with_key.py").write_text(OWN_LOSS)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, forbid)
    monkeypatch.setattr(socket, "getaddrinfo", forbid)
    caplog.set_level(logging.DEBUG, "jaxtrain")

    def start(key, max_steps):
        config = tiny_config(
            "sft",
            max_steps=max_steps,
            save_steps=1,
            report_to=("jsonl", "tensorboard"),
            objective="loss_with_key:loss",
        )
        config.training.objective_kwargs = {
            "api_key": key,
            "address": SIGNED,
            "more": {"hub_token": TOKEN},
        }
        train(config, tmp_path / "here" / "work")

    start("first-s3cr3t", 1)
    start("other-s3cr3t", 2)  # goes on from the checkpoint, with another key
    assert "resumed from step 1" in caplog.text
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"work"}
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    printed = capsys.readouterr()
    kept = {"log": caplog.text, "output": printed.out + printed.err}
    for path in (tmp_path / "here").rglob("*"):
        if path.is_file():
            kept[str(path)] = path.read_bytes().decode("latin-1")
    assert any("record" in name and "checkpoints" in name for name in kept)
    for name, text in kept.items():
        for secret in ("s3cr3t", TOKEN, SIGNATURE):
            assert secret not in text, name
    config = json.loads((tmp_path / "here" / "work" / "config.json").read_text())
    assert config["training"]["objective_kwargs"]["api_key"] == "***"
    assert "versionId=3" in config["training"]["objective_kwargs"]["address"]
    # Whoever evaluates the run is told that an argument is not known any more.
    source.configure(source.find(str(tmp_path / "here" / "work")))
    assert "objective_kwargs holds secrets" in caplog.text


# --- secrets ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "masked"),
    [
        (f"use {TOKEN} now", "use *** now"),
        (SIGNED, SIGNED.replace(SIGNATURE, "***")),
        ("https://me:pw@hub.example/x", "https://***@hub.example/x"),
        ("https://x.org/y?token=abc&page=2", "https://x.org/y?token=***&page=2"),
        ("https://x.blob/y?sv=1&sig=a%2Fb", "https://x.blob/y?sv=1&sig=***"),
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer ***"),
        (f"sk-{'a1' * 12}", "***"),
        ("ghp_0123456789abcdefghij", "***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        (
            {"credentials": {"user": "u", "id": 7}},
            {"credentials": {"user": "***", "id": "***"}},
        ),
        ({"api_keys": ["a", "b"]}, {"api_keys": ["***", "***"]}),
        # These are none.
        ("9f2c1b7a6d5e4f30918273645abcdef012345678", ...),  # a commit
        ({"tokens": "a", "keys": "b", "stop_token": "<|end|>"}, ...),
        ("out/sk-run/hf_model", ...),
    ],
)
def test_secrets_are_known_by_their_key_or_their_form(value, masked):
    assert safe_text.mask_secrets(value) == (value if masked is ... else masked)


@pytest.mark.parametrize("place", ["id:hunter2@b/m", "hunter2@b/m", "id:hunter2/m"])
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_credentials_in_an_address_are_refused_and_not_shown(scheme, place, capsys):
    for command in (
        f"train sft --data.train={scheme}://{place}",
        f"train sft --model.name_or_path={scheme}://{place}",
        f"eval {scheme}://{place}",
        f"report {scheme}://{place}",
    ):
        assert cli.main(command.split()) == 2
        told = capsys.readouterr().err
        assert "credentials" in told and "hunter2" not in told
        assert len(told.strip().splitlines()) == 1


def test_the_recorded_command_holds_no_secret():
    command = provenance.command_line(
        [
            *("jaxtrain", "train", "sft", "--wandb_api_key=s3cr3t", "--hub-token"),
            *("s3cr3t", f"--training.run_name={TOKEN}", f"--data.train={SIGNED}"),
            '--training.objective_kwargs={"api_key": "s3cr3t"}',
            "--training.objective_kwargs={api_key: s3cr3t, gamma: 2}",
            "--training.objective_kwargs=('api_key', 's3cr3t')",
            "--training.objective_kwargs.api_key=s3cr3t",
            "--max_steps=5",
        ]
    )
    for secret in ("s3cr3t", TOKEN, SIGNATURE):
        assert secret not in command
    assert "--max_steps=5" in command and '"gamma": 2' in command


def test_an_upload_shows_no_token_and_no_path(tmp_path, monkeypatch, capsys):
    """The hub's client may quote the token in an error; a base may lie anywhere."""
    local = {"base_model_name_or_path": "/home/me/model", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(local))
    (tmp_path / "adapter_model.safetensors").touch()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def whoami(self):
        raise RuntimeError(f"401: Bearer {TOKEN}")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", whoami)
    hub._check_token.cache_clear()
    assert cli.main(["push", str(tmp_path), "me/model"]) == ending.MISTAKE
    assert TOKEN not in (error := capsys.readouterr().err) and "401" in error
    sent = hub._published(tmp_path / "adapter_config.json").decode()
    assert "/home" not in sent and "LORA" in sent


def test_lines_about_another_config_hold_no_secret():
    old = {"training": {"objective_kwargs": {"api_key": "s3cr3t", "gamma": 1}}}
    new = {"training": {"objective_kwargs": {"api_key": "n3w", "gamma": 2}}}
    lines = "\n".join(diff(old, new))
    assert "s3cr3t" not in lines and "n3w" not in lines
    assert "gamma" in lines


def test_messages_hold_no_secret_and_steer_no_terminal(capsys):
    message = (
        f"training.objective_kwargs = {{'api_key': 's3cr3t'}}: no; hub_token = 's3cr3t'"
        f" --api_key=s3cr3t {TOKEN} at {SIGNED}; password = 4711;"
        f" num_key_value_heads = 2; num_key_value_heads=-1: no; num_token = 5: no;"
        f" eos_token = '</s>', a = 'b'{ESCAPE}"
    )

    def fails(_):
        raise ValueError(message)

    def breaks(_):
        raise RuntimeError(message)

    assert ending.run_command(fails, []) == ending.MISTAKE
    assert ending.run_command(breaks, []) == ending.FAULT
    printed = capsys.readouterr().err
    record = logging.LogRecord("jaxtrain", logging.ERROR, "", 0, message, None, None)
    for text in (printed, logs.LineFormatter().format(record)):
        for hidden in ("s3cr3t", "4711", TOKEN, SIGNATURE, "\x1b", "\x07", "\x9b"):
            assert hidden not in text
        assert "num_key_value_heads = 2; num_key_value_heads=-1: no" in text
        assert "num_token = 5: no" in text
        assert "eos_token = '</s>', a = 'b'\\x1b]0;owned" in text


# --- texts of strangers ---------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_texts_of_data_and_models_steer_no_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    writer = ConsoleWriter(5, stream=screen, show_bar=False)
    writer.write(1, {f"loss{ESCAPE}": 1.0})
    writer.write_text(1, {f"sample{ESCAPE}": f"text{ESCAPE}"})
    generate._print(f"said{ESCAPE}")
    turns = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(turns))
    chat.talk(lambda messages: iter([f"answer{ESCAPE[:4]}", ESCAPE[4:]]))
    tokenizer = load_tokenizer(str(assets.asset_path(assets.TOKENIZER)))
    run = resolve({"data": {"format": "text"}})
    lines, _ = inspect.report(run, [{"text": f"row{ESCAPE}"}], tokenizer)
    shown = screen.getvalue() + "".join(lines)
    assert all(text in shown for text in ("loss", "sample", "said", "answer", "row"))
    assert not {"\x1b", "\x07", "\x9b"} & {*shown}
    # What is not read by a terminal is left as it is.
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert generate.for_output(ESCAPE) == ESCAPE


def test_a_report_runs_no_text_as_a_script(tmp_path):
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    record = {"step": 1, "time": 1.0, "loss": 2.0, f"x{attack}": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    sample = {"step": 1, "time": 1.0, f"sample{attack}/output": attack}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    config = {"training": {"run_name": attack, "training_type": attack}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = write_report([tmp_path]).read_text("utf-8")
    assert "<script>alert" not in page and "<img" not in page
    assert page.count("<script") == page.count("</script") == 1
    assert "alert(1)" in page  # as data
    assert "default-src 'none'" in page
    # The script puts texts in as texts: it has none of the ways that parse HTML.
    for parses in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write",
                   "eval(", "new Function", "srcdoc", "javascript:"):  # fmt: skip
        assert parses not in page.replace(json.dumps(attack), "")
