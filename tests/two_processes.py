"""A program in two processes of two CPU devices each, which find one another."""

import os
import pathlib
import socket
import subprocess
import sys

import xla_flags

import jaxtrain

_TREE = str(pathlib.Path(jaxtrain.__file__).parent.parent)


def run_two(program: str, folder: pathlib.Path) -> list[str]:
    """Run a program twice; its arguments are the folder, an address and the rank.

    Both must succeed. Returns what each wrote to stderr.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": _TREE,
        "XLA_FLAGS": xla_flags.flags(2),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, folder, address, str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = []
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        told.append(errors)
    return told
