"""The plot of a benchmark, as SVG or PNG, by matplotlib, which is an extra: nothing else here needs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardserve.errors import ConfigError

SUFFIXES = (".svg", ".png")
INCHES = 8, 6
DOTS_PER_INCH = 120


def check_installed() -> None:
    """ConfigError says what to install; told before the measurement, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--plot needs matplotlib, which isn't here ({error}): pip install 'shardserve[bench]'"
        ) from error


def draw(path: Path, title: str, levels: Sequence[dict[str, Any]]) -> None:
    """Throughput, and p50 and p99 of the latency, against concurrency. levels: as `Level.summary` has them."""
    from matplotlib.figure import Figure

    # Not pyplot, which keeps figures and looks for a screen.
    figure = Figure(figsize=INCHES, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    levels = sorted(levels, key=lambda level: int(level["concurrency"]))
    concurrency = [level["concurrency"] for level in levels]
    upper.plot(concurrency, [level["requests_per_second"] for level in levels], marker="o", color="tab:blue")
    upper.set_ylabel("requests a second")
    upper.set_ylim(bottom=0)
    for name, color in (("p50", "tab:green"), ("p99", "tab:red")):
        # None (no answer at all) leaves a gap.
        figures = [float("nan") if (taken := level["latency_ms"][name]) is None else taken for level in levels]
        lower.plot(concurrency, figures, marker="o", color=color, label=name)
    lower.set_ylabel("latency, ms")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("concurrency (clients, each with one request under way)")
    lower.set_xscale("log", base=2)
    lower.set_xticks(concurrency, [str(count) for count in concurrency])
    lower.minorticks_off()
    lower.legend()
    for axes in (upper, lower):
        axes.grid(visible=True, alpha=0.3)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
