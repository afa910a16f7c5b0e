"""The command line: every config runs to the end; bad input ends it early."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import xla_flags

SLOW = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_main(*arguments, cwd=ROOT, **more):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags.QUICK_TO_COMPILE,
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        **more,
    }
    return subprocess.run(
        [sys.executable, "-m", "jaxtrain.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


SHORT = (
    "--config.training.max_steps=2",
    "--config.training.eval_on_start=False",
    "--config.training.logging_steps=1",
    "--config.data.max_train_rows=64",
    "--config.data.max_eval_rows=16",
)


@pytest.mark.parametrize(
    "name",
    ["dpo", *(pytest.param(n, marks=SLOW) for n in ("from_scratch", "sft", "lora"))],
)
def test_every_config_runs_to_the_end(name, tmp_path):
    # As for the first time: nothing lies there, and no file of rows was read before.
    (tmp_path / "empty").mkdir()
    finished = run_main(
        f"--config={ROOT / 'configs' / name}.py",
        f"--workdir={tmp_path}",
        *SHORT,
        cwd=tmp_path / "empty",
        HF_DATASETS_CACHE=str(tmp_path / "datasets"),
    )
    assert finished.returncode == 0, finished.stderr[-3000:] + finished.stdout[-3000:]
    check_output(finished, name)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if "loss" in r] == [1, 2]
    assert any("eval_loss" in r for r in records)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "adapter").is_dir() == (name == "lora")


# A log line of ours with what stands below it, or a record.
OURS = re.compile(
    r"\d\d:\d\d:\d\d (?!error|warning) {0,2}\S.*|         .*"
    r"|(step|eval) +[12]/2 \| \S+, <?\S+ left \| .*|step \d+ sample_.*"
)


def check_output(finished, name):
    """A block, a line for each record, and nothing of any library on either stream."""
    assert finished.stderr == ""
    lines = finished.stdout.splitlines()
    assert [line for line in lines if not OURS.fullmatch(line)] == []
    too_long = [line for line in lines if len(line) > 100]
    # A path is never cut, so that it can be copied.
    assert [line for line in too_long if "/" not in line] == []
    (title,) = [n for n, line in enumerate(lines) if f": {name} run " in line]
    labels = [line[11:22].strip() for line in lines[title + 1 :] if line[9:11] == "  "]
    shown = [label for label in labels if label]
    assert shown[:8] == [
        "model", "data", "batch", "steps", "devices", "precision", "memory", "writes",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines if " left | " in line] == [
        "step", "step", "eval",
    ]  # fmt: skip


@SLOW
def test_a_yaml_file_in_the_documented_form_runs(tmp_path):
    (tmp_path / "run.yaml").write_text(
        """\
training:
  training_type: "sft"
  num_gpus: 1
  bf16: false
  max_steps: 1
  report_to: []
  sft:
    per_device_train_batch_size: 2
    learning_rate: 2e-5
    warmup_ratio: 0.1
    lr_scheduler_type: "cosine"
data:
  max_train_rows: 8
  max_eval_rows: 4
"""
    )
    finished = run_main(
        f"--config=configs/from_yaml.py:{tmp_path / 'run.yaml'}",
        f"--workdir={tmp_path / 'out'}",
    )
    assert finished.returncode == 0, finished.stderr[-3000:] + finished.stdout[-3000:]
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_bad_values_end_with_code_2_and_all_the_reasons(tmp_path):
    finished = run_main(
        "--config=configs/dpo.py",
        f"--workdir={tmp_path / 'out'}",
        "--config.training.dpo.beta=-1.0",
        "--config.training.warmup_ratio=2.0",
    )
    assert finished.returncode == 2
    assert "training.dpo.beta=-1.0" in finished.stderr
    assert "training.warmup_ratio=2.0" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_a_bad_row_ends_with_code_2_its_number_and_the_reason(tmp_path):
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": None}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished = run_main(
        "--config=configs/sft.py",
        f"--workdir={tmp_path / 'out'}",
        f"--config.data.train={data}",
    )
    assert finished.returncode == 2, finished.stderr[-2000:]
    assert "1 of 2 rows" in finished.stderr
    assert "completion" in finished.stderr
