"""Pictures of what `run.py` found.

    python bench/gpu/draw.py OUT.png RESULTS.json...

Needs matplotlib. What the files have no figures of is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPAN = 3.0  # per cent of the picture of what is added
TITLES = {"first p50": "first token p50", "gaps p50": "gap p50", "gaps p99": "gap p99", "throughput": "tokens/s"}


def main() -> int:
    """One picture with a panel for each thing that was found."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out, *files = sys.argv[1:]
    parts: dict[str, Any] = {}
    cards: set[str] = set()
    for file in files:
        found = json.loads(Path(file).read_text())
        parts |= {name: part for name, part in found["parts"].items() if part.get("done")}
        cards |= set(found["machine"]["cards"])
    panels = [(draw, data) for draw, find in PANELS if (data := find(parts))]
    if not panels:
        print("draw: there is nothing to draw in these files", file=sys.stderr)
        return 1
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axis, (draw, data) in zip(axes[0], panels, strict=True):
        draw(axis, data)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(", ".join(sorted(cards)))

    figure.savefig(out, dpi=110)
    return 0


def ratios(axis: Any, data: list[dict[str, Any]]) -> None:
    """What the gateway adds, in per cent of the direct way."""
    width = 0.8 / len(TITLES)
    for at, (name, title) in enumerate(TITLES.items()):
        places = [place + at * width for place in range(len(data))]
        axis.bar(places, [(row[name] - 1) * 100 for row in data], width, label=title)
    axis.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(data))],
        [f"{row['streams']}\n{row.get('way', '').rpartition(' ')[2]}" for row in data],
    )
    axis.axhspan(-SPAN, SPAN, color="0.93", zorder=0)
    axis.set(xlabel="streams at once, and the door", ylabel="gateway against direct, %", title="Added to vLLM's tokens")
    axis.legend(frameon=False, fontsize=8)


def swaps(axis: Any, data: list[dict[str, Any]]) -> None:
    """Seconds of a swap, by the tier."""
    names = [row["the other goes by"] for row in data]
    axis.barh(names, [row["median s"] for row in data], color="tab:blue")
    for at, row in enumerate(data):
        axis.text(row["median s"], at, f" {row['median s']:.2f} s", va="center", fontsize=9)
    axis.set(xscale="log", xlabel="seconds from the request to its first token", title="Two models that do not fit")
    axis.invert_yaxis()
    axis.margins(x=0.25)


def waits(axis: Any, data: dict[str, list[float]]) -> None:
    """How long the requests of the trace waited for their first token."""
    for uid, found in data.items():
        if found:
            ordered = sorted(found)
            axis.step(ordered, [(at + 1) / len(ordered) * 100 for at in range(len(ordered))], label=uid, where="post")
    axis.set(xscale="log", xlabel="seconds to the first token", ylabel="% of requests", title="More models than fit")
    axis.legend(frameon=False, fontsize=8)


PANELS: tuple[tuple[Callable[[Any, Any], None], Callable[[dict[str, Any]], Any]], ...] = (
    (ratios, lambda parts: parts.get("latency", {}).get("gateway / direct, median of the repetitions")),
    (swaps, lambda parts: parts.get("swaps", {}).get("swaps of two models of 7 B, request to first token")),
    (waits, lambda parts: parts.get("trace", {}).get("waits s")),
)

if __name__ == "__main__":
    sys.exit(main())
