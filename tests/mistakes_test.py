"""What a user gets wrong: one short message with place, value and fix, and code 2.

Each row is a command in a folder of the user's. What needs no model is told before one
loads: there `load_model` must not be reached.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from jaxtrain import assets, cli, main, trainer
from jaxtrain.cli import command, ending
from jaxtrain.config import resolve
from jaxtrain.models import load
from jaxtrain.run import distributed, interrupts, preflight, trial, weights
from jaxtrain.run.checkpoint import CheckpointManager
from jaxtrain.run.step_log import StepLog
from tests.runs import act_at_log, interrupt

ROOT = pathlib.Path(__file__).resolve().parent.parent

LOSSES = """\
import jax.numpy as jnp
from jaxtrain.types import WeightedSum

def without_arguments(): pass

def raises(policy, reference, batch):
    raise KeyError("gone")

def a_number(policy, reference, batch):
    return 3.0

def focal(policy, reference, batch, *, gamma=2.0):
    logps = policy(batch).logps * batch.loss_mask
    return WeightedSum(-gamma * logps.sum(), batch.loss_mask.sum()), {}

def not_a_number(policy, reference, batch):
    loss, metrics = focal(policy, reference, batch)
    return WeightedSum(loss.total * jnp.nan, loss.weight), metrics
"""
LONG = "/disk" + "/folder" * 40 + "/metrics.jsonl"
ROW = '{"prompt": "a", "completion": " b"}\n'
FILES = {
    "bad.yaml": "training:\n  training_type: sft\n max_steps: 1\n",
    "tabs.yaml": "training:\n\tmax_steps: 3\n",
    "twice.yaml": "training:\n  seed: 3\n  max_steps: 3\n  seed: 4\n",
    "near.yaml": "training:\n  lerning_rate: 1e-4\n",
    "flat.yaml": "learning_rate: 1e-4\ntrain: rows.jsonl\n",
    "types.yaml": "training:\n  learning_rate: fast\n  max_steps: many\n",
    "list.yaml": "- training\n",
    "no_key.yaml": "# training:\n#   max_steps: 3\n",
    "no_key.json": "",
    "binary.yaml": b"\xff\xfe\x00training",
    "raises.py": "def get_config():\n    raise RuntimeError('boom')\n",
    "syntax.py": "x = 1\ndef get_config(:\n",
    "empty.py": "x = 1\n",
    "imports.py": "import nosuchmodule\n",
    "number.py": "def get_config():\n    return 3\n",
    "my_losses.py": LOSSES,
    "empty.jsonl": "",
    "text.jsonl": "hello\n",
    "bad_row.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": \n',
    "columns.jsonl": '{"question": "a", "answer": "b"}\n',
    "pairs.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "rows.jsonl": ROW * 4,
    "semicolons.csv": "prompt;completion\na;b\n",
    "rows.xyz": "x",
    "latin1.txt": b"caf\xe9",
    "a_file": "x",
    "broken.jinja": "{% for m in messages %}{{ m }",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of files of which each has something wrong with it."""
    folder = tmp_path_factory.mktemp("home")
    for name, content in FILES.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            (folder / name).write_bytes(content)
    (folder / "splits").mkdir()
    for split in ("train", "test"):
        (folder / "splits" / f"{split}.jsonl").write_text(ROW)
    (folder / "nothing").mkdir()
    (folder / "folder.yaml").mkdir()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "moved", "peft_type": "LORA", "r": 4}'
    )
    source = assets.asset_path(assets.MODEL)
    for name in ("no_weights", "garbage", "no_tokenizer", "bert", "no_json"):
        shutil.copytree(source, folder / name)
    (folder / "no_weights" / "model.safetensors").unlink()
    (folder / "garbage" / "model.safetensors").write_bytes(b"garbage" * 9)
    for path in (folder / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    config = json.loads((folder / "bert" / "config.json").read_text())
    text = json.dumps(config | {"model_type": "bert"})
    (folder / "bert" / "config.json").write_text(text)
    (folder / "no_json" / "config.json").write_text("{not json")
    return folder


@pytest.fixture
def inside(home: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The process stands in that folder, offline, and nobody is logged in."""
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    # A page of the docs has a module of this name, which may be imported already.
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A command, and what its message has to say. `late`: the model is loaded first."""

    command: str
    said: tuple[str, ...]
    late: bool = False


def m(command: str, *said: str, late: bool = False) -> Mistake:
    return Mistake(command, said, late)


TRAIN = "train sft --workdir=out/x --training.max_steps=1"
ROWS = f"{TRAIN} --data.train=rows.jsonl"
MISTAKES = [
    # --- the command line
    m("trian sft", "no command 'trian'", "did you mean train?"),
    m("train", "no configuration is named", "jaxtrain train --help"),
    m("train sft --config=dpo", "two configurations are named, sft and dpo"),
    m("train sfft", "config = 'sfft'", "did you mean sft?"),
    m("train sft --wrkdir=x", "--wrkdir", "did you mean --workdir?"),
    m("train sft --workdir=a --workdir=b", "--workdir is given twice", "once"),
    m(f"{TRAIN} --training.lerning_rate=1", "--training.lerning_rate", "did you mean"),
    m(f"{TRAIN} --training.max_steps=few", "--training.max_steps=few", "an integer"),
    m(f"{TRAIN} --training.learning_rate=nan", "not a number >= 0; set one"),
    m(f"{TRAIN} --training.seed=-1", "[0, 4294967296)"),
    m(f"{TRAIN} --training.dpo.beta=0.3", "training_type is sft", "remove the flag"),
    m(f"{TRAIN} --learning_rate=1", "did you mean --training.learning_rate?"),
    m(f"{TRAIN} --learning_rat 1e-4", "did you mean --training.learning_rate?"),
    m(f"{TRAIN} --max-step=3", "did you mean --training.max_steps?"),
    m(f"{TRAIN} --remove_unused_columns False", "nothing reads are left out"),
    m("train lora --training.lora.alpha=1", "did you mean training.lora.lora_alpha?"),
    m(f"{TRAIN} --model.expert_exchange=tokens", "model.expert_exchange",
      "mesh.expert is 1"),
    m(f"{TRAIN} --training.fp8=true", "training.fp8", "needs bf16", "bf16 = true"),
    m("configs nope", "'nope'", "there are"),
    # --- files of configuration
    m("train runn.yaml", "'runn.yaml'", "no such file in"),
    m("train bad.yaml", "bad.yaml, line 3", "indentation"),
    m("train tabs.yaml", "tabs.yaml, line 2", "indent with spaces"),
    m("train twice.yaml", "twice.yaml, line 4", "'seed' is given twice", "keep one"),
    m("train folder.yaml", "'folder.yaml'", "a folder; name a file"),
    m("train sft --data.train=", "--data.train=", "leave the flag out"),
    m("generate garbage --prompts=latin1.txt", "latin1.txt", "save it as UTF-8"),
    m("generate garbage --prompts=latin1.txt --output=./latin1.txt",
      "--output=latin1.txt is read by this command"),
    m("generate garbage hello --output=bert/config.json", "is a run's record"),
    m("generate adapter hello", "its base model 'moved'", "--model"),
    m("train near.yaml", "training.lerning_rate = 0.0001", "did you mean"),
    m("train flat.yaml", "training.learning_rate?", "did you mean data.train?"),
    m("train types.yaml", "training.learning_rate = 'fast'", "training.max_steps"),
    m("train list.yaml", "'list.yaml'", "write 'training:'"),
    m("train no_key.yaml", "'no_key.yaml': it holds no key", "write 'training:'"),
    m("train --config=no_key.json", "'no_key.json': it holds no key"),
    m("train binary.yaml", "binary.yaml", "not YAML"),
    m("train raises.py", "raises.py, line 2: RuntimeError: boom"),
    m("train syntax.py", "syntax.py, line 2: SyntaxError"),
    m("train empty.py", "empty.py", "get_config()", "jaxtrain configs sft"),
    m("train imports.py", "imports.py, line 1", "nosuchmodule"),
    m("train number.py", "number.py", "returned int", "return a ConfigDict"),
    # --- data
    m(f"{TRAIN} --data.train=row.jsonl", "data.train = 'row.jsonl'", "'rows.jsonl'?"),
    m(f"{TRAIN} --data.train=./nope", "data.train = './nope'", "check the path"),
    m(f"{TRAIN} --data.train=rows.jsonl,pairs.jsonl", "a weight, as in a.jsonl:0.7"),
    m(f"{ROWS} --data.eval_split=test", "eval_split = 'test'", "has no splits",
      "set data.eval"),
    m(f"{TRAIN} --data.train=splits --data.eval_split=train", "eval_split = 'train'",
      "trains on that split", "name another"),
    m(f"{TRAIN} --data.train=splits --data.eval_split=training",
      "eval_split = 'training'", "data.train_split = 'train' trains on that split"),
    m(f"{TRAIN} --data.train=owner/rows --data.eval_split=train", "trains on that"),
    m(f"{TRAIN} --data.train=splits --data.eval_split=validation",
      "eval_split = 'validation'", "only ['test', 'train']"),
    m(f"{ROWS} --data.text_column=body", "data.text_column = 'body' has no effect",
      "prompt_completion"),
    m(f"{TRAIN} --data.text_column=body", "data.text_column = 'body' has no effect",
      "set data.train", late=True),
    m(f"{TRAIN} --data.train=semicolons.csv", "by commas instead of ';'"),
    m(f"{TRAIN} --data.train=https://a.b/c.jsonl", "download it and give a path"),
    m(f"{TRAIN} --data.train=empty.jsonl", "data.train", "it is empty"),
    m(f"{TRAIN} --data.train=nothing", "data.train = 'nothing'", "no data file"),
    m(f"{TRAIN} --data.train=text.jsonl", "text.jsonl", "first line is not JSON"),
    m(f"{TRAIN} --data.train=columns.jsonl", "columns ['answer', 'question']", "give"),
    m(f"{TRAIN} --data.train=pairs.jsonl", "data.train", "needs text"),
    m("train dpo --workdir=out/x --data.train=rows.jsonl", "data.train",
      "needs 'chosen' and 'rejected'"),
    m(f"{TRAIN} --data.train=rows.xyz", "data.train = 'rows.xyz'", ".jsonl"),
    m(f"{ROWS} --data.eval=evil.jsonl", "data.eval = 'evil.jsonl'", "check the path"),
    m(f"{ROWS} --training.eval_steps=5", "training.eval_steps = 5", "set data.eval"),
    m(f"{TRAIN} --data.train=bad_row.jsonl", "bad_row.jsonl line 2", "on_bad_row",
      late=True),
    m(f"{TRAIN} --data.chat_template=broken.jinja", "'broken.jinja', line 1", "mend"),
    m(f"{TRAIN} --data.chat_template=gone.jinja", "'gone.jinja' does not exist"),
    m("inspect columns.jsonl", "columns ['answer', 'question']"),
    m("inspect nonsense", "nonsense"),
    # --- metrics, trackers, objectives
    m(f"{TRAIN} --training.metric_for_best_model=eval_los", "'eval_los'",
      "did you mean 'eval_loss'?"),
    m(f"{TRAIN} --training.generation.metrics=blue", "'blue' is no metric", "bleu"),
    m(f"{TRAIN} --training.generation.metrics=my_losses:nope",
      "training.generation.metrics", "my_losses has no function 'nope'"),
    m(f"{TRAIN} --training.generation.metrics=bertscore"
      " --training.generation.bertscore_model=nothing", "'nothing'", "config.json"),
    m(f"{TRAIN} --training.report_to=wandb", "training.report_to", "wandb"),
    m(f"{TRAIN} --training.objective=nomodule:f", "nomodule", "PYTHONPATH"),
    m(f"{TRAIN} --training.objective=my_losses:fokal", "did you mean 'focal'?"),
    m(f"{TRAIN} --training.objective=my_losses:without_arguments",
      "training.objective = 'my_losses:without_arguments'", "TypeError", "arguments"),
    m(f"{TRAIN} --training.objective=my_losses:raises", "KeyError: 'gone'",
      "my_losses.py, line 7"),
    m(f"{TRAIN} --training.objective=my_losses:a_number", "return a WeightedSum"),
    m(f"{TRAIN} --training.objective=my_losses:focal"
      " --training.objective_kwargs={'gama':1}", "{'gama': 1}", "unexpected keyword"),
    # --- folders and devices
    m("train sft --workdir=a_file", "workdir = 'a_file'", "is a file", "another"),
    m("train sft --workdir=a_file/x", "workdir = 'a_file/x'", "is a file"),
    m("train sft --workdir=", "--workdir is empty"),
    m("train sft --workdir=hdfs://b/x", "workdir = 'hdfs://b/x'", "give gs://"),
    m("train sft --workdir=gs://", "workdir = 'gs://'", "names no bucket"),
    m(f"{TRAIN} --training.num_gpus=99", "training.num_gpus = 99", "set 8 or fewer"),
    m(f"{TRAIN} --mesh.tensor=3", "tensor 3", "the nearest are"),
    m(f"{ROWS} --data.format=messages", "set data.format = 'auto'"),
    m("generate garbage --prompts=semicolons.csv", "--prompts=semicolons.csv",
      "a prompt on each line"),
    m("generate garbage --prompts=empty.jsonl", "--prompts=empty.jsonl: no prompt"),
    m("train sft --workdir=out/caf\udce9", "caf\\udce9", "not UTF-8"),
    # --- models
    m("generate garbage a --model.attention=xla", "--model.attention has no effect"),
    m(f"{TRAIN} --model.attention=cudnn", "model.attention = 'cudnn'", "auto or xla",
      late=True),
    m(f"{TRAIN} --model.rope_scaling={{rope_type:yarn}}", "'rope_type:yarn'",
      "a space behind the colon", late=True),
    m(f"{TRAIN} --model=./nope", "'./nope'", "check the spelling", late=True),
    m(f"{TRAIN} --model=owner/nope", "'owner/nope'", "hf download", late=True),
    m(f"{TRAIN} --model=nothing", "nothing/config.json is missing", "download",
      late=True),
    m(f"{TRAIN} --model=no_weights", "no_weights", "model.safetensors", late=True),
    m(f"{TRAIN} --model=garbage", "garbage/model.safetensors", "again", late=True),
    m(f"{TRAIN} --model=no_tokenizer", "'no_tokenizer'", "tokenizer.json", late=True),
    m(f"{TRAIN} --model=bert", "'bert'", "llama", late=True),
    m(f"{TRAIN} --model=no_json", "no_json/config.json", "JSON", late=True),
    m(f"{TRAIN} --data.max_length=100000", "max_length = 100000",
      "max_position_embeddings", late=True),
    m("train lora --workdir=out/x --training.lora.target_modules=nope_proj",
      "nope_proj", late=True),
    m("train lora --workdir=out/x --training.lora.modules_to_save=lm_head",
      "lm_head", late=True),
    # --- reports
    m("report nowhere", "nowhere"),
    m("report nothing", "nothing"),
]  # fmt: skip


def run(command: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and stderr of a command, in this process."""
    capfd.readouterr()
    code = cli.main(command.split())
    return code, capfd.readouterr().err


def forbid_loading(patch: pytest.MonkeyPatch) -> None:
    """No command may load a model.

    `weights` is imported above, so that its name for the function is patched too. If a
    command imported it under the patch, it would keep the patched one for later tests.
    """
    for module in (load, weights):
        patch.setattr(module, "load_model", lambda _: pytest.fail("it was loaded"))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda each: each.command)
def test_a_mistake_is_told_in_one_short_message(
    mistake: Mistake,
    inside: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if not mistake.late:
        forbid_loading(inside)
    code, said = run(mistake.command, capfd)
    assert code == ending.MISTAKE, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert 1 <= len(lines) <= 3, said
    if not mistake.late:
        assert len(said.splitlines()) == len(lines), f"noise: {said}"
    for part in mistake.said:
        assert part in said, said


def test_debug_shows_the_traceback_and_keeps_the_code(
    inside: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = run("train raises.py --debug", capfd)
    assert code == ending.MISTAKE
    assert "Traceback" in said and "error: raises.py, line 2" in said


# --- what stops a run that has begun ------------------------------------------------

SHORT = (
    "train from_scratch --workdir={workdir} --training.max_steps=2"
    " --training.logging_steps=1 --training.save_steps=1 --training.eval_steps=0"
    " --training.save_final_model=false --training.per_device_train_batch_size=1"
    " --data.max_train_rows=32 --data.max_length=32 --training.report_to=jsonl"
    " --model.architecture.num_hidden_layers=1 --model.architecture.hidden_size=32"
    " --training.num_gpus=1 --data.max_eval_rows=4"  # half of the time
)
CHANGED = [  # a later command's other flag, and what its refusal says
    ("--training.resume_from_checkpoint=never", "use a new workdir, or 'auto'"),
    ("--training.optimizer=lion", "training.optimizer: 'adamw' -> 'lion'"),
    ("--training.ema_decay=0.9", "training.ema_decay: None -> 0.9"),
    ("--training.moment_dtype=bfloat16", "moment_dtype: 'float32' -> 'bfloat16'"),
    ("--model.param_dtype=bfloat16", "param_dtype: 'float32' -> 'bfloat16'"),
    ("--training.seed=7", "training.seed: 42 -> 7"),
    ("--training.fp16=true", "training.fp16: False -> True"),
    ("--training.gradient_accumulation_steps=2", "1 -> 2"),
    ("--model.architecture.num_attention_heads=2", "4 -> 2"),
]


@pytest.mark.slow
def test_a_run_that_ends_early_says_why_and_how_to_go_on(
    inside: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
) -> None:
    whole = SHORT.format(workdir=tmp_path / "run")
    with inside.context() as patch:
        patch.setattr(StepLog, "ask", act_at_log(2, interrupt))
        code, said = run(whole, capfd)
    assert code == ending.INTERRUPTED
    assert "step 1 is saved" in said and "the same command goes on" in said
    with inside.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state")
        patch.setattr(CheckpointManager, "save", _raise_at(2, full))
        code, said = run(whole, capfd)
    assert code == ending.FAULT
    assert "the disk is full: make room" in said and "Traceback" not in said
    forbid_loading(inside)
    for flag, expected in CHANGED:
        code, said = run(f"{whole} {flag}", capfd)
        assert code == ending.MISTAKE, said
        assert expected in said and "workdir" in said
        assert len(said.splitlines()) == 1, said


def _raise_at(step: int, error: BaseException) -> Any:
    def method(self: Any, *arguments: Any, **_: Any) -> None:
        if arguments[0] == step:
            raise error

    return method


def test_a_loss_that_is_no_number_names_the_step_and_the_key(
    inside: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
) -> None:
    command = SHORT.format(workdir=tmp_path / "run")
    code, said = run(f"{command} --training.objective=my_losses:not_a_number", capfd)
    assert code == ending.MISTAKE
    assert "step 1: the gradient is not finite" in said
    assert "bad_batches" in said and "training.on_nonfinite = 'skip'" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_ends_with_130(tmp_path: pathlib.Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jaxtrain",
            "train",
            "sft",
            f"--workdir={tmp_path / 'x'}",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # the log has begun
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    # Where it came in an import's `exec`, Python ends by the signal: a shell's 130 too.
    assert process.returncode in (ending.INTERRUPTED, -signal.SIGINT), said
    assert "interrupted; no step is saved yet" in said
    assert "Traceback" not in said


def test_a_platform_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "jaxtrain", "train", "sft"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "nosuch"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == ending.MISTAKE
    (line,) = finished.stderr.splitlines()
    assert "JAX_PLATFORMS = 'nosuch'" in line and "unset it" in line
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("error", [RuntimeError("no backend"), AssertionError()])
def test_jaxs_ways_to_say_that_a_device_is_missing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setattr("jax.device_count", fail)
    with pytest.raises(ValueError, match=r"JAX_PLATFORMS = .*no such device"):
        distributed.count_devices()


# --- looks before a model loads -----------------------------------------------------


def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write
    with pytest.raises(ValueError, match="cannot be written to; give another"):
        preflight.check_workdir(tmp_path / "runs" / "x")


@pytest.mark.parametrize(
    ("file", "content", "is_refused"),
    [
        ("config.json", {"model_type": "llama"}, True),
        ("adapter_config.json", {"r": 8}, True),
        ("config.json", {"training": {"training_type": "sft"}}, False),
        ("tokenizer.json", {}, False),
    ],
)
def test_a_run_does_not_write_over_a_model(
    file: str, content: dict[str, Any], is_refused: bool, tmp_path: pathlib.Path
) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    run_config = resolve({"training": {}})
    if not is_refused:
        preflight.check(run_config, tmp_path)
        return
    with pytest.raises(ValueError, match=r"folder of a model.* give another workdir"):
        preflight.check(run_config, tmp_path)


@pytest.mark.parametrize("name", ["run[1]", "a*", "b?/x", "a\\b"])
def test_a_workdir_that_orbax_reads_as_a_pattern_is_refused(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for workdir in (tmp_path / name, name):
        with pytest.raises(ValueError, match=r"reads as a pattern.*give a workdir"):
            preflight.check_workdir(workdir)
    for workdir in ("run 1", "rün-1_{a}", "~a#b%20c'd"):
        preflight.check_workdir(workdir)


@pytest.mark.parametrize(
    "login",
    [{"WANDB_API_KEY": "k"}, {"WANDB_MODE": "offline"}, {"NETRC": "netrc"},
     {"WANDB_BASE_URL": "https://wandb.here:8080/", "NETRC": "netrc"}],
)  # fmt: skip
def test_every_way_to_log_in_to_wandb_is_known(
    login: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    machines = "".join(
        f"machine {host}\n  login user\n  password {'k' * 40}\n"
        for host in ("api.wandb.ai", "wandb.here")
    )
    (tmp_path / "netrc").write_text(machines)
    run_config = resolve({"training": {"report_to": "wandb"}})
    preflight.check(run_config, tmp_path, login)
    with pytest.raises(ValueError, match="you are not logged in to api"):
        preflight.check(run_config, tmp_path, {})
    other = {"WANDB_BASE_URL": "https://elsewhere", "NETRC": "netrc"}
    with pytest.raises(ValueError, match="logged in to elsewhere"):
        preflight.check(run_config, tmp_path, other)


@pytest.mark.parametrize(
    ("saved", "now", "change"),
    [
        ({"lora": {"enabled": True}}, {"lora": {"enabled": True, "r": 8}},
         "training.lora.r: 16 -> 8"),
        ({"lora": {"enabled": True, "lora_alpha": 8}}, {"lora": {"enabled": True}},
         "training.lora.lora_alpha: 8 -> 32"),
        ({"lora": {"enabled": True}}, {"lora": {"enabled": True, "use_rslora": True}},
         "training.lora.use_rslora: False -> True"),
        ({"lora": {"enabled": True}},
         {"lora": {"enabled": True, "alpha_pattern": {"q_proj": 8}}},
         "training.lora.alpha_pattern.q_proj: None -> 8"),
        ({"lora": {"enabled": True, "rank_pattern": {"q_proj": 8}}},
         {"lora": {"enabled": True}}, "training.lora.rank_pattern.q_proj: 8 -> None"),
        ({"lora": {"enabled": True}},
         {"lora": {"enabled": True, "init_lora_weights": "pissa"}},
         "training.lora.init_lora_weights: 'default' -> 'pissa'"),
        ({"lora": {"enabled": True, "init_from": "."}}, {"lora": {"enabled": True}},
         "training.lora.init_from: '.' -> None"),
        ({"lora": {"enabled": True}}, {"lora": {"enabled": True, "init_from": "."}},
         "training.lora.init_from: None -> '.'"),
        ({"lora": {"enabled": True, "init_from": "moved"}},
         {"lora": {"enabled": True, "init_from": "."}}, None),
        ({"lora": {"enabled": True}}, {}, "training.lora.enabled: True -> None"),
        ({}, {"lora": {"enabled": True}}, "training.lora.enabled: None -> True"),
        ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2},
         "training.per_device_train_batch_size times data-parallel devices: 4 -> 2"),
        ({"training_type": "sft"}, {"training_type": "dpo"},
         "training.training_type: 'sft' -> 'dpo'"),
        ({"learning_rate": 1e-4}, {"learning_rate": 1e-5}, None),
        ({"max_steps": 5}, {"max_steps": 9}, None),
    ],
)  # fmt: skip
def test_settings_that_no_step_can_go_on_with_are_told_from_others(
    saved: dict[str, Any],
    now: dict[str, Any],
    change: str | None,
    tmp_path: pathlib.Path,
) -> None:
    record_step(tmp_path, {"training": saved})
    run_config = resolve({"training": now}, device_count=1)
    if change is None:
        preflight.check(run_config, tmp_path)
        return
    with pytest.raises(ValueError) as caught:
        preflight.check(run_config, tmp_path)
    assert change in str(caught.value) and "holds step 7" in str(caught.value)


def test_a_long_text_beside_an_output_is_no_path(tmp_path: pathlib.Path) -> None:
    made = command.Parser("generate", "")
    made.add_argument("--system")
    made.add_argument("--output", type=command.file_argument)
    (tmp_path / "out.jsonl").touch()
    given = [f"--output={tmp_path / 'out.jsonl'}", f"--system={'be kind ' * 999}"]
    assert made.parse(given).system.startswith("be kind")


def record_step(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """What tells a run from a checkpoint of step 7 by this configuration."""
    then = resolve(config, device_count=1).to_dict()
    record = workdir / "checkpoints" / "7" / "record"
    record.mkdir(parents=True)
    saved_record = {"format": 1, "step": 7, "layout": {}, "config": then}
    (record / "metadata").write_text(json.dumps(saved_record))


def test_another_packing_is_refused_by_its_key(tmp_path: pathlib.Path) -> None:
    record_step(tmp_path, {"data": {"packing": True}})
    preflight.check(resolve({"data": {"packing": True}}, device_count=1), tmp_path)
    with pytest.raises(ValueError, match=r"data\.packing: True -> False"):
        preflight.check(resolve({"data": {"packing": False}}, device_count=1), tmp_path)


def test_a_packing_that_was_the_default_once_is_gone_on_with(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_step(tmp_path / "out", {"data": {"packing": False}})
    (tmp_path / "sft.yaml").write_text("training: {training_type: sft}")

    class Begun(Exception):
        """Nothing was refused before the run."""

    def begin(*_: Any, **__: Any) -> None:
        raise Begun

    monkeypatch.setattr(trainer, "TrainingOrchestrator", begin)
    arguments = [str(tmp_path / "sft.yaml"), f"--workdir={tmp_path / 'out'}"]
    with pytest.raises(Begun):
        main.main(arguments)
    with pytest.raises(ValueError, match=r"data\.packing: False -> True"):
        main.main([*arguments, "--data.packing=true"])


def test_a_run_that_ended_without_a_checkpoint_is_not_begun_anew(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
    preflight.check(resolve({}, device_count=1), tmp_path)  # it was killed before
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="model is of a run that ended and saved no"):
        preflight.check(resolve({}, device_count=1), tmp_path)
    never = {"training": {"resume_from_checkpoint": "never"}}
    preflight.check(resolve(never, device_count=1), tmp_path)


@pytest.mark.parametrize("objective", ["auto", "orpo", "cpo", "simpo", "kto"])
def test_the_metrics_of_our_objectives_are_known_before_training(
    objective: str,
) -> None:
    keys = {"training_type": "dpo", "objective": objective, "eval_steps": 1}
    best = "eval_logps/chosen" if objective == "kto" else "eval_rewards/accuracies"
    run_config = resolve({"training": keys | {"metric_for_best_model": best}})
    made = trainer.build.make_objective(run_config)
    trial.check_objective(run_config, made)
    wrong = resolve({"training": keys | {"metric_for_best_model": "eval_rouge"}})
    with pytest.raises(ValueError, match=r"these are: eval_.*, eval_loss"):
        trial.check_objective(wrong, made)


# --- faults of the machine ----------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device"), 1, "full"),
        (OSError(errno.ENOSPC, "No space left on device", LONG), 1, LONG),
        (ValueError(f"{LONG}: No space left on device [some.cc:7]"), 1, f"{LONG}: No"),
        (MemoryError(), 1, "no memory left"),
        (TimeoutError("the others did not come"), 1, "did not come"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), 2, "out/x: "),
        (OSError(errno.EROFS, "Read-only file system", "out/x"), 2, "out/x: "),
        (OSError(errno.EIO, "Input/output error", "out/x"), 1, "out/x: "),
    ],
)
def test_a_fault_of_the_machine_is_told_from_a_mistake(
    error: Exception, code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def command(_: list[str]) -> None:
        raise error

    assert ending.run_command(command, []) == code
    printed = capfd.readouterr().err
    assert said in printed and "Traceback" not in printed
    assert len(printed.splitlines()) <= 2


def test_a_bug_keeps_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def command(_: list[str]) -> None:
        raise KeyError("ours")

    assert ending.run_command(command, []) == ending.FAULT
    assert "Traceback" in capfd.readouterr().err


def test_the_echo_of_a_failed_save_is_not_printed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    ending.run_command(lambda _: None, [])
    echo = RuntimeError("Event loop is closed")
    sys.excepthook(RuntimeError, echo, None)
    assert capfd.readouterr().err == ""
    sys.excepthook(RuntimeError, RuntimeError("another"), None)
    assert "RuntimeError: another" in capfd.readouterr().err


def test_a_command_tells_of_no_read_that_orbax_dropped(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What watches for Ctrl-C put Python's own hook in the place of the command's."""
    previous = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(sys, "argv", ["jaxtrain"])
    # It would stay for the tests that come after.
    monkeypatch.setattr(ending.logs, "set_up", lambda **_: None)
    monkeypatch.setattr(interrupts, "_watches", interrupts._watches)

    class Dropped:
        def __init__(self, text: str) -> None:
            self.text = text

        def __del__(self) -> None:
            raise ValueError(self.text)

    try:
        for _ in range(2):
            ending.run_command(lambda _: None)
        Dropped("Encountered error while reading array index: 3")
        assert capfd.readouterr().err == ""
        Dropped("something else")
        assert "something else" in capfd.readouterr().err
    finally:
        signal.signal(signal.SIGINT, previous)


def test_an_interrupt_that_a_library_swallows_ends_the_run_all_the_same(
    inside: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    previous = signal.getsignal(signal.SIGINT)
    inside.setattr(interrupts, "_pressed", False)

    def prepare(self: Any) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)

    inside.setattr("jaxtrain.trainer.TrainingOrchestrator.prepare", prepare)
    try:
        interrupts.watch()
        code = ending.run_command(main.main, ["sft", "--workdir=out/x"])
    finally:
        signal.signal(signal.SIGINT, previous)
    assert code == ending.INTERRUPTED
    assert "interrupted; no step is saved yet" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_where_python_cannot_raise_shows_no_traceback(
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As in a callback of the garbage collector; of other errors Python tells."""
    previous = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    class Broken:
        def __del__(self) -> None:
            raise error("here")

    try:
        interrupts.watch()
        Broken()
    finally:
        signal.signal(signal.SIGINT, previous)
    told = capfd.readouterr().err
    assert ("here" in told and "Traceback" in told) == (error is OSError)
