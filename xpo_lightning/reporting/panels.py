"""Describes the learning curves, for the picture and the page that draw them: the panels, and the lines of each."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xpo_lightning.core.errors import InputError
from xpo_lightning.reporting.metrics_file import Metrics, Series, read_metrics, smooth, thin

COLORS = ("#1f5c9f", "#b05f12", "#2f8f5b", "#b8405e", "#7a5bb0", "#7d7a14", "#1f9aa8", "#c45ab3")
BAND = "± standard error"
Span = tuple[float, float]


@dataclass(frozen=True)
class Kind:
    """What a line shows of a metric, and its strokes.

    Args:
        name: Its name in a legend.
        width: Width of the stroke, in points.
        opacity: Opacity of the stroke.
        dotted: Whether each value has a dot, if the values are few.
    """

    name: str
    width: float
    opacity: float
    dotted: bool = False

    def titled(self, writer: str) -> str:
        """Return the legend's name of such a line, with whose completions it is about where there are several."""
        return f"{writer}, {self.name}" if writer else self.name


RAW = Kind("raw", 0.8, 0.3)
TRAINING = Kind("training", 1.3, 0.7)
HELD_OUT = Kind("held out", 2.2, 1.0, dotted=True)
KINDS = (RAW, TRAINING, HELD_OUT)
"""The kinds in the order in which they are drawn."""
BAND_OPACITY = 0.17


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    Args:
        kind: What it shows of its metric.
        place: Number of its metric in the panel: of its colour, or of its dashes where colours tell runs apart.
        name: Its name; empty for values as logged, which go by that of the averaged ones.
        series: Its values, thinned out if there are many.
        band: Step, lower and upper edge of one standard error either way, where that was logged.
    """

    kind: Kind
    place: int
    name: str
    series: Series
    band: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Its text in a legend."""
        return f"{self.name}, {BAND}" if self.band else self.name

    @property
    def dots(self) -> list[tuple[int, float]]:
        """The values that have a dot."""
        points = [*zip(self.series.steps, self.series.values, strict=True)]
        return [one for one in points if math.isfinite(one[1])] if self.kind.dotted and len(points) <= 60 else []

    @property
    def extent(self) -> list[float]:
        """The finite values, and the edges of the band."""
        values = [value for value in self.series.values if math.isfinite(value)]
        return [*values, *(edge for _, low, high in self.band for edge in (low, high))]


@dataclass(frozen=True)
class Panel:
    """One small plot.

    Args:
        title: What is plotted, with its unit.
        lines: Whose completions each training metric is about, where there are several; its counterpart under `eval/`
            is drawn with it.
        level: Value of a dashed line that marks no difference; None for no such line.
        share: True for shares, whose axis runs from 0 to 1.
    """

    title: str
    lines: dict[str, str]
    level: float | None = None
    share: bool = False

    def lines_of(self, metrics: Metrics) -> list[Line]:
        """Return the lines of a run, in the order in which they are drawn; [] if it has no finite value."""
        lines = [line for kind in KINDS for line in self._lines(kind, metrics)]
        return lines if any(line.extent for line in lines) else []

    def _lines(self, kind: Kind, metrics: Metrics) -> Iterator[Line]:
        for place, (name, writer) in enumerate(self.lines.items()):
            series = metrics.get(f"eval/{name}" if kind is HELD_OUT else name)
            if series:
                shown = thin(Series(series.steps, smooth(series.values)) if kind is TRAINING else series)
                errors = metrics.get(f"eval/{name}_stderr") if kind is HELD_OUT else None
                yield Line(kind, place, "" if kind is RAW else kind.titled(writer), shown, _band(shown, errors))

    def span(self, lines: Sequence[Line]) -> Span:
        """Return the range of the vertical axis: all that is drawn, with a margin, or all shares."""
        levels = [] if self.level is None else [self.level]
        return (-0.03, 1.03) if self.share else _span([*(one for line in lines for one in line.extent), *levels])

    def summary(self, lines: Sequence[Line]) -> str:
        """Return the lines in words, by where each begins and ends."""
        ends = [
            f"{line.name} {line.series.values[0]:.3g} at step {line.series.steps[0]:,} and "
            f"{line.series.values[-1]:.3g} at step {line.series.steps[-1]:,}"
            for line in lines
            if line.name
        ]
        return f"{self.title}: {'; '.join(ends)}."

    def lacking(self, runs: Mapping[str, Metrics]) -> list[str]:
        """Name the runs that lack what others logged: all of the panel, or the lines in brackets."""
        logged = {
            name: {line for line in self.lines if {line, f"eval/{line}"} & one.keys()} for name, one in runs.items()
        }
        texts = []
        for name, lines in logged.items():
            missing = [writer for line, writer in self.lines.items() if line in set().union(*logged.values()) - lines]
            if missing:
                texts.append(f"{name} ({', '.join(missing)})" if lines else name)
        return texts


PANELS = (
    Panel("Win rate against the reference", {"win_rate": ""}, level=0.5, share=True),
    Panel("KL from the reference (nats)", {"objective/kl": ""}, level=0),
    Panel("Preference loss", {"loss/dpo": ""}),
    Panel("Score margin, policy − reference", {"objective/scores_margin": ""}, level=0),
    Panel(
        "Completion length (tokens)",
        {"completions/model_length": "policy", "completions/ref_length": "reference"},
    ),
    Panel(
        "Completions that ended by themselves",
        {"val/model_contain_eos_token": "policy", "val/ref_contain_eos_token": "reference"},
        share=True,
    ),
)


def metrics_to_draw(csv_path: Path) -> Metrics:
    """Read the metrics of a run that has some to draw.

    Raises:
        InputError: The file does not exist, is not a metrics file, or has no finite value of a metric that is drawn.
    """
    metrics = read_metrics(csv_path) if csv_path.is_file() else {}
    if not any(panel.lines_of(metrics) for panel in PANELS):
        raise InputError(f"{csv_path} has no metric to draw; lower trainer.log_every_n_steps for a short run")
    return metrics


def _span(values: Sequence[float]) -> Span:
    """Return the range of the values with a margin of 5 %."""
    low, high = min(values), max(values)
    air = 0.05 * (high - low) or 0.5
    return low - air, high + air


def _band(series: Series, errors: Series | None) -> list[tuple[int, float, float]]:
    known = (
        [(step, value, errors.at(step)) for step, value in zip(series.steps, series.values, strict=True)]
        if errors
        else []
    )
    band = [(step, value - error, value + error) for step, value, error in known if error is not None]
    finite = [edge for edge in band if math.isfinite(edge[1]) and math.isfinite(edge[2])]
    return finite if len(finite) > 1 else []
