"""Draw the README's plot from the metrics.jsonl that a run left in its work directory.

    python docs/make_plot.py out/dpo docs/images/dpo.svg

Standard library only, so that the drawing is a small, stable SVG.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 44, 52, 34, 40  # around the axes, in pixels
# (metric, its axis' top, where the axis stands, color, what the plot calls it)
CURVES = (
    ("eval_rewards/accuracies", 1.0, "left", "#0072b2", "reward accuracy (left)"),
    ("eval_rewards/margins", 3.0, "right", "#d55e00", "reward margin (right)"),
)

Point = tuple[float, float]


def read_curve(workdir: pathlib.Path, metric: str) -> list[Point]:
    """(step, value) of each record that has the metric.

    Raises:
        ValueError: none has.
    """
    lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    points = [(r["step"], r[metric]) for r in records if r.get(metric) is not None]
    if not points:
        raise ValueError(f"{workdir}/metrics.jsonl has no {metric}")
    return points


def make_svg(workdir: pathlib.Path) -> str:
    """The plot: two curves over the optimizer step, an axis on either side."""
    curves = [(read_curve(workdir, curve[0]), *curve[1:]) for curve in CURVES]
    last_step = max(step for points, *_ in curves for step, _ in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
        f' viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        y = _y(fraction)
        parts.append(
            f'<path d="M{LEFT} {y:g}H{WIDTH - RIGHT}" stroke="#ddd" fill="none"/>'
        )
        step = last_step * fraction
        parts.append(_text(_x(fraction), HEIGHT - 20, f"{step:g}", "middle", "#333"))
    parts.append(_text(WIDTH / 2, HEIGHT - 4, "optimizer step", "middle", "#333"))
    for number, (points, top, side, color, label) in enumerate(curves):
        for fraction in (0, 0.25, 0.5, 0.75, 1):
            x = LEFT - 6 if side == "left" else WIDTH - RIGHT + 6
            anchor = "end" if side == "left" else "start"
            tick = f"{top * fraction:g}"
            parts.append(_text(x, _y(fraction) + 4, tick, anchor, color))
        at = [(_x(step / last_step), _y(value / top)) for step, value in points]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        parts.append(
            f'<path d="M{line}" stroke="{color}" stroke-width="2" fill="none"/>'
        )
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in at
        ]
        parts.append(_text(LEFT + 200 * number, 18, label, "start", color))
    return "\n".join([*parts, "</svg>", ""])


def _x(fraction: float) -> float:
    return LEFT + fraction * (WIDTH - LEFT - RIGHT)


def _y(fraction: float) -> float:
    return HEIGHT - BOTTOM - fraction * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, text: str, anchor: str, color: str) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}">{text}</text>'
    )


def main(argv: Sequence[str]) -> int:
    """Command line: a work directory and the file to write."""
    if len(argv) != 2:
        print("usage: make_plot.py WORKDIR FILE.svg", file=sys.stderr)
        return 2
    path = pathlib.Path(argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make_svg(pathlib.Path(argv[0])), "utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
