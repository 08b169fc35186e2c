"""Pictures of a run: throughput by consumers and batch, latencies, rates with a snapshot held."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .contenders import CONTENDERS
from .measure import Summary, Where, summaries
from .records import Run, Sample

__all__ = ["draw"]

_TITLES = {contender.name: contender.title for contender in CONTENDERS}
_COLOURS = {contender.name: f"C{place}" for place, contender in enumerate(CONTENDERS)}
_DASHED = {"baseline": ":", "peer": "--", "ours": "-"}
_STYLES = {contender.name: _DASHED[contender.family] for contender in CONTENDERS}
_BARS = ("enqueue-single", "enqueue-open", "enqueue-batch", "business", "wake-up", "payloads")


def draw(run: Run, folder: Path) -> list[Path]:
    """Write the pictures that a run has the data for, and return their files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib as mpl  # noqa: PLC0415 - only who asks for pictures needs it

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    table = summaries(run)
    files = [
        *_drains(table, folder),
        *_latencies(run.samples, folder),
        *_windows(run, folder),
    ]
    for name in _BARS:
        files += _bars(table, name, folder)
    return files


def _figure(width: float = 9, height: float = 5) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    return figure, axis


def _saved(figure: Any, folder: Path, name: str) -> Path:
    from matplotlib import pyplot as plt  # noqa: PLC0415

    file = folder / f"{name}.png"
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def _drains(table: dict[Where, Summary], folder: Path) -> Iterator[Path]:
    found = {where: item for where, item in table.items() if where[0] == "drain"}
    if not found:
        return
    consumers = sorted({int(row.facts["consumers"]) for row in found.values()})
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(
        1,
        len(consumers),
        figsize=(4.5 * len(consumers), 5.5),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, count in zip(axes[0], consumers, strict=True):
        _lines(axis, found, count)
    axes[0][0].set_ylabel("messages per second, dequeue and archive")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    yield _saved(figure, folder, "drain")


def _lines(axis: Any, found: dict[Where, Summary], consumers: int) -> None:
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for (_, _, name), row in found.items():
        if row.facts["consumers"] == consumers:
            lines[name].append((int(row.facts["batch"]), row.median))
    for name, points in lines.items():
        across, up = zip(*sorted(points), strict=True)
        style = {"color": _COLOURS[name], "linestyle": _STYLES[name], "label": _TITLES[name]}
        axis.plot(across, up, marker="o", **style)
    axis.set(xscale="log", yscale="log", xlabel="messages at a time")
    axis.set_title(f"{consumers} consumer{'s' * (consumers > 1)}")
    axis.grid(visible=True, which="both", alpha=0.3)


def _latencies(samples: Sequence[Sample], folder: Path) -> Iterator[Path]:
    lines: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample in samples:
        if sample.scenario == "latency":
            lines[sample.contender, sample.point] += sample.series.get("latency_ms", [])
    if not any(lines.values()):
        return
    figure, axis = _figure()
    for (name, wake), ages in lines.items():
        ordered = sorted(ages)
        part = [(place + 1) / len(ordered) for place in range(len(ordered))]
        style = "-" if wake == "notify" else ":"
        label = f"{_TITLES[name]}, {wake}"
        axis.step(ordered, part, color=_COLOURS[name], linestyle=style, label=label)
    axis.set(xscale="log", xlabel="milliseconds until picked up", ylabel="part of the messages")
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize=8)
    yield _saved(figure, folder, "latency")


def _windows(run: Run, folder: Path) -> Iterator[Path]:
    rounds: dict[str, list[list[float]]] = defaultdict(list)
    for sample in run.samples:
        if sample.scenario == "snapshot":
            rounds[sample.contender].append(sample.series.get("rates", []))
    if not rounds:
        return
    figure, axis = _figure()
    width = float(run.header.sizes["window"])
    for name, rates in rounds.items():
        length = min(map(len, rates))
        up = [statistics.median(rate[n] for rate in rates) for n in range(length)]
        across = [width * (n + 1) for n in range(length)]
        style = {"color": _COLOURS[name], "linestyle": _STYLES[name], "label": _TITLES[name]}
        axis.plot(across, up, marker="o", **style)
    axis.set(xlabel="seconds with the snapshot held", ylabel="messages per second", yscale="log")
    axis.grid(visible=True, which="both", alpha=0.3)
    axis.legend(fontsize=8)
    yield _saved(figure, folder, "snapshot")


def _bars(table: dict[Where, Summary], scenario: str, folder: Path) -> Iterator[Path]:
    found = {where: item for where, item in table.items() if where[0] == scenario}
    if not found:
        return
    points = list(dict.fromkeys(where[1] for where in found))
    names = [
        contender.name
        for contender in CONTENDERS
        if any(where[2] == contender.name for where in found)
    ]
    figure, axis = _figure(9, 1 + 0.3 * len(points) * len(names))
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        for row, point in enumerate(points):
            item = found.get((scenario, point, name))
            if item is not None:
                spread = [[item.median - item.low], [item.high - item.median]]
                label = _TITLES[name] if row == 0 else None
                across = row + place * height
                axis.barh(
                    across, item.median, height, xerr=spread, color=_COLOURS[name], label=label
                )
    axis.set_yticks([row + 0.4 for row in range(len(points))], points)
    axis.invert_yaxis()
    axis.set_xlabel("messages per second")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    yield _saved(figure, folder, scenario)
