"""Whole train steps in fp8 against bfloat16: rates, memory and their ratios.

    python benchmarks/fp8_step.py [--cases lora_8b,sft_3b_short,...] [--steps 6]
    python benchmarks/fp8_step.py --smoke    # tiny shapes, any backend

Each case of step_cases.py runs twice by train_step.py, in processes of their own, with
layers unrolled: as it is and with --fp8. A line a case; where one of the two fails, as
where memory does not suffice, its error.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

CASES = "lora_8b_remat,lora_8b,sft_3b_remat,sft_3b_short,dpo_3b,sft_8b"
SCRIPT = pathlib.Path(__file__).with_name("train_step.py")


def run_case(name: str, options: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """The line that train_step.py prints of a case."""
    command = [sys.executable, str(SCRIPT), "--in_process", "--cases", name]
    command += ["--steps", str(options.steps), *flags]
    command += ["--smoke"] * options.smoke + ["--unroll"] * (not options.scan)
    environ = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environ
    )
    told = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    for line in told:
        if "rate" in line:  # the others say how far it came
            return line
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--scan", action="store_true", help="layers in one scan")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    for name in options.cases.split(","):
        base, fast = run_case(name, options), run_case(name, options, "--fp8")
        told = [
            line["error"]
            if "error" in line
            else f"{line['rate']:.4g} {line['unit']}, {line['peak_gib']} GiB, losses"
            f" {line['losses']}, warm-up {line['warmup_secs']} s"
            for line in (base, fast)
        ]
        print(f"{name} bf16: {told[0]}\n{name} fp8:  {told[1]}", flush=True)
        if "rate" in base and "rate" in fast:
            memory = fast["peak_gib"] / base["peak_gib"] if base["peak_gib"] else 0.0
            print(
                f"{name}: {fast['rate'] / base['rate']:.3f} times the rate,"
                f" {memory:.3f} of the memory, {fast['device']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
