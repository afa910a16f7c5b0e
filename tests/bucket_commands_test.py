"""Every command on a model, an adapter, data and a work directory in a bucket."""

import json

import pytest

from jaxtrain import assets, cli
from jaxtrain.storage.address import as_path, filesystem
from tests.buckets import gs_bucket

__all__ = ["gs_bucket"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))


def test_every_command_takes_addresses(gs_bucket, tmp_path, capsys, monkeypatch):
    """From a model and data in a bucket to a run there, and what is done with it."""
    monkeypatch.chdir(tmp_path)
    files = filesystem(gs_bucket)
    base, workdir = f"{gs_bucket}/base", f"{gs_bucket}/run"
    files.put(f"{assets.asset_path(assets.MODEL)}/", f"{base}/", recursive=True)
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(24)]
    for name, part in (("train", rows[:16]), ("eval", rows[16:])):
        text = "".join(f"{json.dumps(row)}\n" for row in part)
        files.pipe_file(f"{gs_bucket}/data/{name}.jsonl", text.encode())

    def run(command):
        code = cli.main(command.split())
        told = capsys.readouterr()
        assert code == 0, told.err
        return told.out

    small = "--training.num_gpus=1 --training.bf16=false"
    run(
        f"train lora --workdir={workdir} --model.name_or_path={base}"
        f" --data.train={gs_bucket}/data --data.eval={gs_bucket}/data"
        f" --data.max_length=32 --training.max_steps=2 --training.save_steps=2"
        f" --training.eval_steps=2 --training.per_device_train_batch_size=2 {small}"
        " --training.report_to=jsonl --training.gradient_accumulation_steps=1"
    )
    home = as_path(workdir)
    adapter = json.loads((home / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == base  # not the copy on this disk

    logged = [json.loads(x) for x in (home / "metrics.jsonl").read_text().splitlines()]
    wanted = next(r["eval_loss"] for r in reversed(logged) if "eval_loss" in r)
    for source in (workdir, f"{workdir}/adapter"):
        run(
            f"eval {source} --data={gs_bucket}/data/eval.jsonl"
            f" --output={gs_bucket}/out/eval.json --data.max_length=32 {small}".replace(
                small, "" if source == workdir else "--training.bf16=false"
            )
        )
        found = json.loads(as_path(f"{gs_bucket}/out/eval.json").read_text())
        assert found["metrics"]["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    run(
        f"generate {workdir} hello hi --max_new_tokens=2"
        f" --output={gs_bucket}/out/texts.jsonl"
    )
    texts = as_path(f"{gs_bucket}/out/texts.jsonl").read_text().splitlines()
    assert [json.loads(x)["prompt"] for x in texts] == ["hello", "hi"]
    run(f"export {workdir} --output={tmp_path}/merged")
    assert (tmp_path / "merged/model.safetensors").stat().st_size > 1_000_000
    told = run(f"inspect {gs_bucket}/data/train.jsonl --tokenizer={base} --rows=1")
    assert "validation: 0 of 16 rows" in told
    run(f"report {workdir}")
    assert b"<html" in (home / "report.html").read_bytes()


def test_a_source_that_is_not_there_ends_with_2(gs_bucket, capsys):
    for command in (
        f"eval {gs_bucket}/no",
        f"generate {gs_bucket}/no hello",
        "export gs://nobucket/run",
        f"report {gs_bucket}/no",
        f"inspect {gs_bucket}/no.jsonl",
    ):
        assert cli.main(command.split()) == 2, command
        told = capsys.readouterr().err.strip()
        assert len(told.splitlines()) == 1 and command.split()[1] in told, told
        assert "Traceback" not in told
