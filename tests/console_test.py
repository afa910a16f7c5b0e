"""What a command prints: metrics, log lines and the bar, and nothing of libraries."""

import asyncio
import fcntl
import gc
import io
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from jaxtrain.record import logs
from jaxtrain.record.console import (
    ConsoleWriter,
    duration,
    format_metrics,
    one_line,
)

# As an LoRA run of DPO on a GPU has them, with all there is.
MANY = {
    "loss": 0.69314718,
    "rewards/chosen": 0.1,
    "rewards/rejected": -0.1,
    "rewards/accuracies": 0.8125,
    "rewards/margins": 0.0211,
    "kl": 2.7e-4,
    "logps/chosen": -120.5,
    "entropy": 1.5,
    "learning_rate": 3.75e-4,
    "grad_norm": 2.3001,
    "grad_norm/attention": 1.0,
    "epoch": 0.75,
    "num_tokens": 123456.0,
    "tokens_per_sec": 81234.0,
    "samples_per_sec": 7.25,
    "mfu": 0.4123,
    "goodput_share": 0.91,
    "step_time_p50_secs": 0.5,
    "device_memory_gib": 40.0,
    "device_memory_peak_gib": 71.3,
    "a_metric_of_ones_own/with_a_name_that_no_console_can_hold/in_a_line": 3.25,
}


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def written(records, *, total=4000, resume_step=None, seconds=60.0):
    """The lines of (step, metrics), so many seconds apart."""
    stream, clock = io.StringIO(), Clock()
    writer = ConsoleWriter(total, resume_step, stream=stream, clock=clock)
    for step, metrics in records:
        clock.now += seconds
        writer.write(step, metrics)
    writer.close()
    return stream.getvalue().splitlines()


def test_the_usual_metrics_come_first_under_short_names():
    (line,) = format_metrics(
        {
            "zeta": 12.0,
            "mfu": 0.41,
            "tokens_per_sec": 81234.0,
            "learning_rate": 1e-4,
            "perplexity": math.inf,
            "loss": 2.30259,
            "tiny": 1.5e-7,
        }
    )
    assert line == (
        "loss 2.303 | ppl inf | lr 1.00e-4 | tokens/s 81.2k | mfu 0.410 | zeta 12"
        " | tiny 1.50e-7"
    )


def test_what_does_not_fit_is_left_out_from_the_end_and_a_sign_says_so():
    numbers = {f"metric_{i}": i + 0.5 for i in range(40)}
    for columns in range(20, 120):
        for most_lines in (1, 2):
            lines = format_metrics(
                {"loss": 1.25, **numbers}, columns, most_lines=most_lines
            )
            assert len(lines) == most_lines
            assert max(map(len, lines)) <= columns
            assert lines[0].startswith("loss 1.250") and lines[-1].endswith("| …")
            shown = re.findall(r"metric_(\d+)", " ".join(lines))
            assert shown == [str(i) for i in range(len(shown))]
    assert not format_metrics({"loss": 1.25}, 20)[-1].endswith("…")


@pytest.mark.parametrize("total", [4, 80, 4_000_000])
def test_no_line_of_many_metrics_is_wider_than_100_columns(total):
    evaluated = {f"eval_{name}": value for name, value in MANY.items()}
    lines = written([(3, MANY), (4, MANY), (4, evaluated)], total=total, seconds=9e4)
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[:3]] == ["step", "step", "eval"]
    assert len(lines) in (3, 4)  # the evaluation alone may take two
    for line in lines[:3]:
        for name in ("loss 0.6931", "accuracy 0.812", "margin 0.0211"):
            assert name in line
    assert "eval_" not in lines[2]


def test_every_line_tells_the_time_that_has_passed_and_that_is_left():
    """Against what a reader would work out: 10 steps a minute, from the records on."""
    lines = written([(10, {"loss": 1}), (20, {"loss": 1}), (20, {"eval_loss": 2})])
    assert lines == [
        "step   10/4000 | 1m00s, <6h39m left | loss 1",
        "step   20/4000 | 2m00s, 6h38m left | loss 1",
        "eval   20/4000 | 3m00s, 13h16m left | loss 2",
    ]
    # The first record's steps hold the compilation; the meter's step time does not.
    timed = {"loss": 1, "step_time_p50_secs": 2.0}
    evaluated = (1011, {"eval_loss": 2})  # took a minute, of one step after the record
    lines = written([(1010, timed), evaluated], total=1040, resume_step=1000)
    assert lines == [
        "step 1010/1040 | 1m00s, 1m00s left | loss 1",
        "eval 1011/1040 | 2m00s, 58s left | loss 2",
    ]
    # Nothing is done yet, as in an evaluation before the first step.
    (line,) = written([(0, {"eval_loss": 2})], total=40)
    assert line == "eval  0/40 | 1m00s, ? left | loss 2"
    (line,) = written([(7, {"loss": 1})], total=None)
    assert line == "step 7 | 1m00s | loss 1"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (133, "2m13s"), (3599.6, "1h00m"),
        (3900, "1h05m"), (86399, "1d00h"), (273600, "3d04h"),
    ],
)  # fmt: skip
def test_a_duration_is_short(seconds, text):
    assert duration(seconds) == text


def test_texts_take_a_line_each_and_cannot_steer_the_terminal():
    stream = io.StringIO()
    writer = ConsoleWriter(10, stream=stream)
    writer.write_text(6, {"sample_1/output": "a\nb\x1b[2Jc" + "d" * 500})
    writer.write_text(6, {"cjk": "語" * 500, **{str(i): "x" for i in range(8)}})
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith(r"step 6 sample_1/output: a\nb\x1b[2Jcddd")
    assert [len(lines[0]), lines[0][-1]] == [100, "…"]
    assert len(lines[1]) <= 57 and lines[1].endswith("語…")  # each takes two columns
    assert lines[-1] == "step 6 and 3 more texts in samples.jsonl"
    assert one_line("short", 5) == "short"


def test_a_sign_that_the_encoding_lacks_does_not_end_a_run():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    logs.print_line("cut …", stream)
    assert stream.buffer.getvalue().split() == [b"cut", b"?"]


def test_no_bar_is_drawn_where_no_terminal_shows_it(capsys):
    writer = ConsoleWriter(10)
    writer.write(1, {"loss": 1.5})
    writer.close()
    captured = capsys.readouterr()
    assert captured.out.startswith("step  1/10 | 0s, ") and captured.err == ""


# Prints as a run does: a bar, metrics, and log lines of ours, of others, of a thread.
TALK = """
import logging, threading, time, warnings
from jaxtrain.record import logs
from jaxtrain.record.console import ConsoleWriter
logs.set_up()
logs.show_progress()
writer = ConsoleWriter(6)
def talk():
    for i in range(30):
        logging.getLogger("jaxtrain.data").info("thread says %d", i)
        time.sleep(0.002)
thread = threading.Thread(target=talk); thread.start()
for step in range(1, 7):
    writer.write(step, {"loss": 1.5})
    logging.getLogger("jaxtrain.x").warning("warned at %d", step)
    logging.getLogger("orbax.checkpoint").warning("chatter")
    logging.getLogger("absl").info("chatter")
    warnings.warn("chatter", DeprecationWarning)
    time.sleep(0.02)
thread.join(); writer.close()
logging.getLogger("jaxtrain").info("all done")
"""


def run_in_a_terminal(program: str, *, width: int = 120) -> list[str]:
    """What a terminal shows in the end, line by line: \\r goes back to column 0."""
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=end, stderr=end, env=os.environ
    )
    os.close(end)
    received = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        received += chunk
    os.close(main)
    assert process.wait() == 0, received.decode()
    shown = []
    for line in received.decode().split("\n"):
        cells: list[str] = []
        for written_over in line.rstrip("\r").split("\r"):
            cells[: len(written_over)] = written_over
        shown.append("".join(cells).rstrip())
    return shown


def test_on_a_terminal_no_line_stands_in_the_bar():
    shown = run_in_a_terminal(TALK)
    ours = re.compile(
        r"(step [1-6]/6 \| \d+s, \S+ left \| loss 1\.500"
        r"|\d\d:\d\d:\d\d (thread says \d+|warning: warned at [1-6]|all done)"
        r"|100%\|.*\| 6/6 \[.*loss 1\.5000\]|)"
    )
    assert [line for line in shown if not ours.fullmatch(line)] == []
    text = "\n".join(shown)
    assert text.count("thread says") == 30 and text.count("warned at") == 6
    assert text.count("left |") == 6 and text.count("100%") == 1


def test_in_a_file_there_is_no_bar_and_no_control_character():
    finished = subprocess.run(
        [sys.executable, "-c", TALK], capture_output=True, text=True, check=True
    )
    assert finished.stderr == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", finished.stdout)
    assert len(finished.stdout.splitlines()) == 30 + 6 + 6 + 1


@pytest.fixture
def logging_as_it_was():
    root = logging.getLogger()
    names = ("", "jaxtrain", "orbax.b", *logs._LIBRARIES, *logs._NOISY)
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = list(root.handlers)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def say_everything() -> None:
    for name in ("jaxtrain.a", "orbax.b", "my_module"):
        for level in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger(name), level)("%s %s", name, level)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ["info", "warning", "error", "orbax.b error", "my_module warning"]),
        ({"JAXTRAIN_LOG_LEVEL": "ERROR"}, ["error", "orbax.b error"]),
        ({"JAXTRAIN_LOG_LEVEL": "debug"}, ["debug", "info", "orbax.b info"]),
    ],
)
def test_ours_are_shown_and_of_libraries_errors_only(
    environ, expected, logging_as_it_was, capsys, recwarn
):
    logs.set_up(environ=environ)
    logs.show_progress(environ)
    if not environ.get("JAXTRAIN_LOG_LEVEL"):
        # As some libraries do when they are imported.
        logging.getLogger("orbax.b").setLevel(logging.DEBUG)
    say_everything()
    lines = [line[9:] for line in capsys.readouterr().out.splitlines()]
    found = [line.partition(": ")[2] or line for line in lines]
    for text in expected:
        assert (text if " " in text else f"jaxtrain.a {text}") in found
    if "JAXTRAIN_LOG_LEVEL" not in environ:
        assert found == [
            "jaxtrain.a info", "jaxtrain.a warning", "jaxtrain.a error",
            "orbax.b error", "my_module warning", "my_module error",
        ]  # fmt: skip
        assert "error: jaxtrain.a error" in lines and "jaxtrain.a info" in lines
        assert environ["TF_CPP_MIN_LOG_LEVEL"] == "2"
    if environ.get("JAXTRAIN_LOG_LEVEL") == "debug":
        assert len(environ) == 1  # nothing is hushed


def test_what_orbax_drops_of_a_damaged_checkpoint_is_not_told(
    logging_as_it_was, capsys, recwarn
):
    """asyncio dumped the task, seconds behind our own line about that checkpoint."""
    logs.set_up(environ={})

    async def read() -> None:
        raise ValueError("the manifest is cut off")

    async def drop() -> None:
        dropped = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        del dropped

    asyncio.run(drop())
    gc.collect()
    assert capsys.readouterr() == ("", "")


def test_what_the_environment_says_of_a_library_stays(logging_as_it_was, recwarn):
    environ = {"TF_CPP_MIN_LOG_LEVEL": "0"}
    logs.set_up(environ=environ)
    assert environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
    with pytest.raises(ValueError, match=r"JAXTRAIN_LOG_LEVEL = 'loud'.*debug, info"):
        logs.set_up(environ={"JAXTRAIN_LOG_LEVEL": "loud"})


def test_long_lines_are_wrapped_below_their_text_and_paths_stay_whole():
    path = "/a/" + "very_" * 30 + "long/path"
    message = f"first {'word ' * 40}{path}\nsecond line"
    record = logging.LogRecord("jaxtrain", logging.INFO, "", 0, message, (), None)
    lines = logs.LineFormatter().format(record).splitlines()
    assert re.match(r"\d\d:\d\d:\d\d first word", lines[0])
    assert all(line.startswith(" " * 9) for line in lines[1:])
    assert all(len(line) <= 100 for line in lines if path not in line)
    assert any(line.endswith(path) for line in lines)
    assert lines[-1] == " " * 9 + "second line"
    record.levelno, record.levelname = logging.ERROR, "ERROR"
    assert f"word {path}" in logs.LineFormatter().format(record)


@pytest.mark.parametrize(
    "say",
    [
        "logging.getLogger('jaxtrain').info('line %d', n)",
        "writer.write(n, {'loss': 1})",
    ],
)
def test_a_run_goes_on_where_nobody_reads_its_lines(say):
    program = f"""
import logging, time
from jaxtrain.record import logs
from jaxtrain.record.console import ConsoleWriter
logs.set_up()
logs.show_progress()
writer = ConsoleWriter(9)
logging.getLogger("jaxtrain").info("begin")
for n in range(1, 6):
    time.sleep(0.2)
    {say}
print("unread")
raise SystemExit(7)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().endswith("begin\n")
    process.stdout.close()
    assert process.wait(timeout=60) == 7
    assert process.stderr.read() == ""
