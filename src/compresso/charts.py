"""Charts of a report: plain numbers in, an inline SVG for light and for dark screens and a PNG for papers out.

Every chart is drawn narrow, so that its text stays readable on a phone. Nothing here knows
about run folders or HTML. The same numbers give the same bytes.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib import font_manager, patheffects, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

WIDTH = 4.2  # inches: 403 CSS pixels
FONT = "DejaVu Sans"  # comes with matplotlib, so that every machine draws the same
MARKERS, DENSE_MARKERS = "osD^vPX", "dphx"
NUMBERED_LAYERS = 40  # beyond it, cells are too low for a number
PLACES = [(dx, dy) for dx in range(-96, 97, 6) for dy in range(-60, 61, 6)]  # of a name around its mark, in points
POINTS = 300  # of a curve; more are averaged in bins


@dataclass(frozen=True)
class Theme:
    """Colours of a chart; series from Okabe and Ito, adjusted for contrast with the surface."""

    ink: str
    muted: str
    line: str
    surface: str
    phases: tuple[str, str]
    removed: str
    heat: tuple[str, str, str]
    """From nothing kept to all kept."""
    series: tuple[str, ...]


LIGHT = Theme(
    ink="#1d2329",
    muted="#5b6672",
    line="#dfe3e6",
    surface="#ffffff",
    phases=("#f1f3f4", "#e4e8eb"),
    removed="#b8430f",
    heat=("#f3f6f9", "#8fbbdc", "#0b5c9c"),
    series=("#0b6fb8", "#c8501b", "#00876c", "#a8508c", "#8a6d00", "#5b61bd"),
)
DARK = Theme(
    ink="#e7eaed",
    muted="#a0abb5",
    line="#333b43",
    surface="#1a1e22",
    phases=("#21262b", "#2a3036"),
    removed="#f59a6a",
    heat=("#242a30", "#2f6a98", "#8cc8f5"),
    series=("#5fb2ee", "#f59a6a", "#43c9a6", "#de93c4", "#d6b23a", "#9aa3f2"),
)


class Mark(NamedTuple):
    """One value of a model, with its interval; without one, low and high are the value."""

    row: str
    model: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Picture:
    """A drawn chart. `light` and `dark` are data: URIs of SVG, `png` is 300 dpi; width and height in CSS pixels."""

    light: str
    dark: str
    png: bytes
    width: int
    height: int


def picture(draw: Callable[[Theme], Figure]) -> Picture:
    """Draw a chart in both themes."""
    uris, png = [], io.BytesIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    for theme in (DARK, LIGHT):
        with style.context(["default", _style(theme)], after_reset=True):
            figure = draw(theme)
            svg = io.BytesIO()
            figure.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
            if theme is LIGHT:
                figure.savefig(png, format="png", dpi=300, facecolor=theme.surface)
        uris.append("data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode())
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Picture(uris[1], uris[0], png.getvalue(), width, height)


def _style(theme: Theme) -> dict[str, Any]:
    return {
        "font.family": [FONT],
        "font.size": 9.5,
        "text.parse_math": False,  # names may hold dollar signs
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.line,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.7,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        **dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size", "ytick.minor.size"), 0),
        "hatch.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.fonttype": "path",
        "svg.hashsalt": "compresso",
    }


def short(name: str, most: int = 24) -> str:
    """A name in characters that the font has, its middle left out where it is long."""
    known = font_manager.get_font(font_manager.findfont(FONT)).get_charmap()
    clean = "".join(c if ord(c) in known and c.isprintable() else "?" for c in name)
    half = (most - 1) // 2
    return clean if len(clean) <= most else f"{clean[:half]}…{clean[-half:]}"


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")  # a pixel is a point
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def kept_shares(theme: Theme, columns: dict[str, list[tuple[int, int]]]) -> Figure:
    """Heat map of the kept share: a row a layer, a column a kind of unit.

    `columns` maps each kind to (kept, before) of every layer. Nothing kept is marked as
    removed, nothing before as absent.
    """
    layers = len(next(iter(columns.values())))
    numbered = layers <= NUMBERED_LAYERS
    figure, axes = _canvas(layers * (0.2 if numbered else max(0.085, 7 / layers)) + 1.15)
    share = np.array([[kept / max(before, 1) for kept, before in column] for column in columns.values()]).T
    floor = min(0.5, math.floor(10 * min(share[share > 0], default=0.5)) / 10)
    colours = LinearSegmentedColormap.from_list("kept", theme.heat)
    edges = np.arange(len(columns) + 1), np.arange(layers + 1) - 0.5
    mesh = axes.pcolormesh(*edges, share, cmap=colours, vmin=floor, vmax=1, edgecolor=theme.surface)
    mesh.set_linewidth(1.2 if numbered else 0.4)
    for x, column in enumerate(columns.values()):
        for y, (kept, before) in enumerate(column):
            if not kept:
                colour, hatch = (theme.removed, "/////") if before else (theme.line, None)
                cell = Rectangle((x, y - 0.5), 1, 1, facecolor=theme.surface, edgecolor=colour, hatch=hatch)
                axes.add_patch(cell)
            if numbered:
                text = f"{kept:,} · {100 * kept / before:.0f} %" if kept else "removed" if before else "absent"
                ink = _readable(theme, mesh.to_rgba(share[y, x])) if kept else theme.ink
                halo = [] if kept else [patheffects.withStroke(linewidth=3, foreground=theme.surface)]
                axes.text(x + 0.5, y, text, ha="center", va="center", fontsize=8.5, color=ink, path_effects=halo)
    axes.vlines(range(1, len(columns)), -0.5, layers - 0.5, color=theme.surface, linewidth=6)
    axes.set_ylim(layers - 0.5, -0.5)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], list(columns))
    axes.xaxis.tick_top()
    axes.set_yticks(range(0, layers, 1 if numbered else 5))
    axes.tick_params(labelsize=8.5)
    axes.tick_params(axis="x", labelcolor=theme.ink, labelsize=9.5)
    axes.set_ylabel("layer")
    axes.spines["bottom"].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", aspect=40, pad=0.02, label="share kept")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8.5)
    bar.ax.xaxis.set_major_formatter(_percent)
    if any(before > 0 == kept for column in columns.values() for kept, before in column):
        handle = Patch(facecolor=theme.surface, edgecolor=theme.removed, hatch="/////", label="removed sub-layer")
        figure.legend(handles=[handle], loc="outside lower center")
    return figure


def _percent(value: float, _: float) -> str:
    return f"{100 * value:.3g} %"


def _readable(theme: Theme, background: Any) -> str:
    """Ink or surface, whichever stands out more."""

    def luminance(colour: Any) -> float:
        return 0.05 + float(np.dot(np.power(to_rgb(colour), 2.2), (0.2126, 0.7152, 0.0722)))

    behind = luminance(background[:3])
    return max(theme.ink, theme.surface, key=lambda colour: abs(math.log(luminance(colour) / behind)))


def hidden_channels(theme: Theme, kept: Sequence[bool]) -> Figure:
    """Channels of the residual stream in reading order, the dropped ones in the colour of removal."""
    across = 16 * math.ceil(math.sqrt(3 * len(kept)) / 16)
    rows = math.ceil(len(kept) / across)
    figure, axes = _canvas(3.8 * rows / across + 0.75)
    colours = np.ones((rows * across, 4)) * (*to_rgb(theme.surface), 0.0)
    colours[: len(kept)] = [(*to_rgb(theme.heat[1] if keep else theme.removed), 1.0) for keep in kept]
    axes.imshow(colours.reshape(rows, across, 4), interpolation="none", aspect="equal")
    if rows * across <= 2000:
        axes.vlines(np.arange(across + 1) - 0.5, -0.5, rows - 0.5, color=theme.surface, linewidth=1)
        axes.hlines(np.arange(rows + 1) - 0.5, -0.5, across - 0.5, color=theme.surface, linewidth=1)
    step = max(1, rows // 4)
    axes.set_yticks(range(0, rows, step), [f"{across * y:,}" for y in range(0, rows, step)])
    axes.set_xticks([])
    axes.set_ylabel("channel")
    axes.tick_params(labelsize=8.5)
    axes.spines["bottom"].set_visible(False)
    handles = [Patch(color=theme.heat[1], label="kept"), Patch(color=theme.removed, label="dropped")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def sparsity_steps(theme: Theme, rows: Sequence[dict[str, Any]]) -> Figure:
    """Expected sparsity (shares) against its target, one row a step."""
    figure, axes = _over_steps(theme, rows, "sparsity")
    x, target = _thin([(step, row["target_sparsity"]) for step, row in enumerate(rows, 1)])
    axes.plot(x, target, color=theme.series[1], linewidth=5, alpha=0.4, label="target")
    x, expected = _thin([(step, row["expected_sparsity"]) for step, row in enumerate(rows, 1)])
    axes.plot(x, expected, color=theme.series[0], linewidth=1.6, label="expected")
    axes.yaxis.set_major_formatter(_percent)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")
    return figure


def loss_steps(theme: Theme, rows: Sequence[dict[str, Any]]) -> Figure:
    """Training loss, one row a step: each step faint, its running mean strong."""
    figure, axes = _over_steps(theme, rows, "loss, nats per token")
    for name, colour in (("pruning", theme.series[0]), ("recovery", theme.series[2])):
        ours = [
            (i, row["loss"]) for i, row in enumerate(rows, 1) if (row["stage"] == "recover") == (name == "recovery")
        ]
        if ours:
            x, y = _thin(ours)
            reach = max(1, len(y) // 16)
            smooth = [y[max(0, i - reach) : i + reach + 1].mean() for i in range(len(y))]
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.4)
            axes.plot(x, smooth, color=colour, linewidth=1.8, label=name)
    axes.legend(loc="upper right")
    return figure


def _thin(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and their finite values: means of bins where there are more than POINTS."""
    pairs = np.array([pair for pair in points if math.isfinite(pair[1])], dtype=float).reshape(-1, 2)
    together = max(1, math.ceil(len(pairs) / POINTS))
    bins = [pairs[i : i + together].mean(0) for i in range(0, len(pairs), together)]
    x, y = np.array(bins).reshape(-1, 2).T
    return x, y


def _over_steps(theme: Theme, rows: Sequence[dict[str, Any]], label: str) -> tuple[Figure, Axes]:
    """Axes on which each phase is a band with its name above."""
    figure, axes = _canvas(2.7)
    phases = [row["phase"] for row in rows]
    axes.set_xlim(0.5, len(phases) + 0.5)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    starts = [i for i, phase in enumerate(phases) if i == 0 or phase != phases[i - 1]]
    reached = 0.0  # right end of the name before: names of narrow bands make room to the right
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(phases)], strict=True)):
        axes.axvspan(start + 0.5, end + 0.5, color=theme.phases[number % 2], linewidth=0, zorder=0)
        name = short(phases[start], 9)
        width = 0.021 * (len(name) + 1.5) * len(phases)
        middle = max((start + end + 1) / 2, reached + width / 2)
        reached = middle + width / 2
        above = axes.get_xaxis_transform()
        axes.text(middle, 1.02, name, ha="center", fontsize=8.5, color=theme.muted, transform=above)
    return figure, axes


def dots(theme: Theme, marks: Sequence[Mark], models: dict[str, bool], label: str, zero: bool = False) -> Figure:
    """Values with intervals, a row a task. `models` tells of each, in order, whether it is dense.

    With `zero` the values are differences: marks whose interval holds 0 are hollow.
    """
    rows = list(dict.fromkeys(mark.row for mark in marks))
    used = [model for model in models if any(mark.model == model for mark in marks)]
    pitch = 0.15 * len(used) + 0.14
    figure, axes = _canvas(len(rows) * pitch + 0.75 + 0.2 * len(used))
    looks = _looks(theme, models)
    for mark in marks:
        colour, marker = looks[mark.model]
        y = rows.index(mark.row) + (used.index(mark.model) - (len(used) - 1) / 2) * 0.15 / pitch
        face = theme.surface if zero and mark.low <= 0 <= mark.high else colour
        axes.plot([mark.low, mark.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="round")
        axes.plot(mark.value, y, marker, color=colour, markersize=5, markerfacecolor=face)
    if zero:
        axes.axvline(0, color=theme.muted, linewidth=1, zorder=0)
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color=theme.line, linewidth=0.7, zorder=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [short(row, 20) for row in rows])
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.grid(axis="x")
    axes.set_xlabel(label)
    if "perplexity" in label and not zero:
        _perhaps_log(axes, "x", [mark.value for mark in marks])
    handles = [Line2D([], [], color=looks[m][0], marker=looks[m][1], markersize=5, label=short(m, 40)) for m in used]
    figure.legend(handles=handles, loc="outside upper left")
    return figure


def size_quality(
    theme: Theme, marks: Sequence[Mark], sizes: dict[str, float], models: dict[str, bool], label: str, low_is_good: bool
) -> Figure:
    """Parameters (`sizes`) against quality; a line joins the models that no other one beats in both."""
    figure, axes = _canvas(3.4)
    looks = _looks(theme, models)
    sign = 1 if low_is_good else -1
    at = {mark.model: (sizes[mark.model] / 1e6, sign * mark.value) for mark in marks}
    best = sorted(p for p in at.values() if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in at.values()))
    axes.plot([x for x, _ in best], [sign * y for _, y in best], color=theme.line, linewidth=2, zorder=1)
    for mark in marks:
        colour, marker = looks[mark.model]
        x = at[mark.model][0]
        axes.plot([x, x], [mark.low, mark.high], color=colour, linewidth=1.6)
        axes.plot(x, mark.value, marker, color=colour, markersize=7)
    axes.grid()
    axes.margins(0.14)
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if low_is_good:
        _perhaps_log(axes, "y", [mark.value for mark in marks])
    _label_points(theme, figure, axes, [(mark, at[mark.model][0]) for mark in marks], looks)
    return figure


def _looks(theme: Theme, models: dict[str, bool]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each model; dense ones are neutral."""
    dense = [model for model in models if models[model]]
    others = [model for model in models if not models[model]]
    looks = {model: (theme.muted, DENSE_MARKERS[i % len(DENSE_MARKERS)]) for i, model in enumerate(dense)}
    for i, model in enumerate(others):
        looks[model] = (theme.series[i % len(theme.series)], MARKERS[i % len(MARKERS)])
    return looks


def _perhaps_log(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis where values span more than a factor of four."""
    if max(values) < 4 * min(values):
        return
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) > 10 * min(values) else (1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(lambda value, _: f"{value:.3g}" if value < 1000 else f"{value:,.0f}")
    axis.set_minor_formatter(NullFormatter())


def _label_points(
    theme: Theme, figure: Figure, axes: Axes, points: list[tuple[Mark, float]], looks: dict[str, tuple[str, str]]
) -> None:
    """Name each mark, which stands at an x, at the nearest place that is free of other marks and names."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame = axes.get_window_extent()
    taken = [Bbox(axes.transData.transform([(x, mark.low), (x, mark.high)])).padded(5) for mark, x in points]
    line = {"arrowstyle": "-", "color": theme.muted, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    halo = [patheffects.withStroke(linewidth=3, foreground=theme.surface)]
    for mark, x in points:
        text = axes.annotate(
            short(mark.model, 22), (x, mark.value), (0, 0), textcoords="offset points", arrowprops=line
        )
        text.set(ha="center", va="center", fontsize=9, color=looks[mark.model][0], path_effects=halo)
        text.update_positions(renderer)
        box = Text.get_window_extent(text, renderer)

        def cost(place: tuple[float, float], box: Bbox = box) -> float:
            here = box.translated(*place)
            outside = here.x0 < frame.x0 or here.x1 > frame.x1 or here.y0 < frame.y0 or here.y1 > frame.y1
            return 1000.0 * (outside + sum(map(here.overlaps, taken))) + math.hypot(place[0], 1.5 * place[1])

        place = min(PLACES, key=cost)
        text.set_position(place)
        taken.append(box.translated(*place))
