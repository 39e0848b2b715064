"""The picture of the scaling benchmark: time and memory against the number of experts, and against the model's size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

STYLES = {"average": ("#3566a8", "o"), "opcm": ("#c0562b", "s")}
LABELS = {"seconds": "seconds per fold", "peak_rss_mb": "peak resident memory, MiB"}
TITLES = {
    "experts": "against the number of the expert",
    "sizes": "against the model's size (second expert)",
}
AXES = {"experts": "number of the expert that is folded", "sizes": "parameters, millions"}


def draw(facts: Mapping[str, Any], file: Path) -> None:
    """Draw one column for each part that was measured: seconds above, memory below.

    Time against the model's size has two logarithmic axes; all other vertical axes start at 0, so that what is flat
    looks flat.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in AXES if facts.get(part)]
    figure, axes = pyplot.subplots(2, len(parts), figsize=(5.5 * len(parts), 7), squeeze=False, layout="constrained")
    for column, part in enumerate(parts):
        for row, key in enumerate(LABELS):
            _panel(axes[row][column], facts[part], part, key)
        axes[0][column].set_title(TITLES[part], fontsize=11)
    figure.suptitle(f"foldin, one fold with its serving checkpoint: {_where(facts)}", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, found: Mapping[str, Mapping[str, Mapping[str, float]]], part: str, key: str) -> None:  # noqa: ANN401
    """One quantity against one other, a line per method."""
    scale = 1e6 if part == "sizes" else 1.0
    for method, points in found.items():
        colour, marker = STYLES[method]
        across, up = [int(at) / scale for at in points], [point[key] for point in points.values()]
        axis.plot(across, up, color=colour, marker=marker, label=method)
    ticks = sorted({int(at) / scale for points in found.values() for at in points})
    axis.set(
        xscale="log", xticks=ticks, xticklabels=[f"{tick:.3g}" if tick < 1000 else f"{tick:.0f}" for tick in ticks]
    )
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    if part == "sizes" and key == "seconds":
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.1 * max(point[key] for points in found.values() for point in points.values()))
    axis.set_xlabel(AXES[part])
    axis.set_ylabel(LABELS[key])
    axis.grid(visible=True, which="major", alpha=0.3)
    axis.legend()


def _where(facts: Mapping[str, Any]) -> str:
    machine = facts["machine"]
    told = f"{machine['cpu']}, {machine['cores']} cores, {facts['date'][:10]}"
    return f"{told} (quick: no measurement)" if facts["parameters"].get("quick") else told
