"""Draw the losses that benchmarks/fp8_quality.py wrote, a panel for each training.

python docs/make_fp8_plot.py fp8_quality.json docs/images/fp8.svg
"""

import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 300, 220, 42, 30, 34
SMOOTHED = 20  # steps that a point is the mean of
POINTS = 120  # of a line
COLORS = {"bf16": "#9aa0a6", "fp8": "#c5221f"}
TITLES = {"pre-training": "pre-training", "sft": "SFT", "dpo": "DPO"}


def smooth(losses: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean loss of those up to each."""
    means = np.convolve(losses, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
    steps = np.arange(SMOOTHED, len(losses) + 1)
    chosen = np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).astype(int)
    return steps[chosen], means[chosen]


def draw_panel(
    name: str, runs: dict[str, dict[str, list[float]]], left: int
) -> Iterator[str]:
    lines = {run: smooth(values["loss"]) for run, values in runs.items()}
    most = max(steps[-1] for steps, _ in lines.values())
    low = min(means.min() for _, means in lines.values())
    high = max(means.max() for _, means in lines.values())
    right, bottom = left + WIDTH - 12, HEIGHT - BOTTOM
    start = left + LEFT

    def place(step: float, loss: float) -> str:
        x = start + (right - start) * step / most
        y = bottom - (bottom - TOP) * (loss - low) / (high - low)
        return f"{x:.1f} {y:.1f}"

    yield f'<text x="{start}" y="18" fill="#333">{TITLES[name]}: loss</text>'
    for share in (0.0, 0.5, 1.0):
        loss = low + share * (high - low)
        yield f'<path d="M{place(0, loss)}L{place(most, loss)}" stroke="#ddd"/>'
        _, y = place(0, loss).split()
        yield (
            f'<text x="{start - 6}" y="{y}" dy="4" text-anchor="end" fill="#333">'
            f"{loss:.2f}</text>"
        )
    yield (
        f'<text x="{right}" y="{HEIGHT - 14}" text-anchor="end" fill="#333">'
        f"{most} steps</text>"
    )
    # The fp8 line last, so that it lies on top.
    for run in sorted(lines, key=lambda run: run.startswith("fp8")):
        path = "L".join(place(*point) for point in zip(*lines[run], strict=True))
        color = COLORS[run.split()[0]]
        yield f'<path d="M{path}" stroke="{color}" stroke-width="1.5" fill="none"/>'


def main() -> None:
    source, target = map(pathlib.Path, sys.argv[1:])
    stages = json.loads(source.read_text("utf-8"))
    whole = WIDTH * len(stages)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{HEIGHT}"'
        f' viewBox="0 0 {whole} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{whole}" height="{HEIGHT}" fill="white"/>',
    ]
    for index, (name, runs) in enumerate(stages.items()):
        parts += draw_panel(name, runs, WIDTH * index)
    parts.append(
        f'<text x="{LEFT}" y="{HEIGHT - 14}" fill="{COLORS["bf16"]}">bfloat16, three'
        f' seeds</text><text x="{LEFT + 130}" y="{HEIGHT - 14}"'
        f' fill="{COLORS["fp8"]}">fp8</text>'
    )
    target.write_text("\n".join([*parts, "</svg>\n"]), "utf-8")


if __name__ == "__main__":
    main()
