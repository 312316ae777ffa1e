"""The picture and the page draw the same charts: titles, legends, colours, values, bands and ranges."""

import html
import json
import re
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from test_cli import refused

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.reporting.metrics_file import read_metrics
from xpo_lightning.reporting.picture import figure_of

USUAL = """\
epoch,eval/win_rate,eval/win_rate_stderr,loss/dpo,step,win_rate
0,0.5,0.1,,0,
0,,,0.75,0,0.25
0,,,0.5,1,0.75
0,0.625,0.05,,1,
"""
# A divergence that is infinite once and whose error was not logged at first, lengths of one writer alone, held-out
# shares alone, a loss that never was finite, and a metric of the user's own.
UNUSUAL = """\
step,objective/kl,eval/objective/kl,eval/objective/kl_stderr,completions/ref_length,eval/val/model_contain_eos_token,loss/dpo,mine
0,,0.0,,,0.25,,
1,inf,,,12.0,,nan,7
2,-1.0,,,14.0,,inf,8
2,,0.5,0.25,,0.5,,
4,3.0,,,,,,
4,,2.5,0.5,,1.0,,
"""
MANY = "step,loss/dpo\n" + "".join(f"{step},{(step * 7919) % 1000}\n" for step in range(2000))


def page_of(run: Path) -> str:
    main(["report", str(run), "--out", str(run / "page.html")])
    return (run / "page.html").read_text()


def legend_of(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


@pytest.mark.parametrize("text", [USUAL, UNUSUAL, MANY], ids=["usual", "unusual", "many"])
def test_picture_and_page_draw_the_same(tmp_path: Path, text: str):
    (tmp_path / "metrics.csv").write_text(text)
    page = page_of(tmp_path)
    drawn = [axes for axes in figure_of({"": read_metrics(tmp_path / "metrics.csv")}).axes if axes.get_yticks().size]
    figures = re.findall(r"<figure .*?</figure>", page, re.DOTALL)
    charts = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [axes.get_title(loc="left") for axes in drawn] == re.findall(r"<figcaption>(.*?)</figcaption>", page)
    for axes, figure, chart in zip(drawn, figures, charts, strict=True):
        items = re.findall(r'<li>.*?class="c(\d)"><path class="(.*?)".*?</svg>(.*?)</li>', figure)
        assert legend_of(axes) == [html.unescape(label) for _, _, label in items]
        named = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
        for line, (place, kind, _), numbers in zip(named, items, chart["lines"], strict=True):
            assert f"--c{place}: {to_hex(line.get_color())};" in page
            assert f".{kind} {{ stroke-width: {line.get_linewidth()}; opacity: {line.get_alpha()}; }}" in page
            assert line.get_xdata().tolist() == numbers["steps"]
            values = [float("nan") if value is None else value for value in numbers["values"]]
            assert [x if abs(x) < 1e9 else float("nan") for x in line.get_ydata()] == pytest.approx(
                values, nan_ok=True, rel=1e-4
            )
        assert len(axes.collections) == figure.count('class="band"')
        low, high = axes.get_ylim()
        for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">(.*?)<', figure):
            assert 190 - 180 * (float(label) - low) / (high - low) == pytest.approx(float(y) - 4, abs=0.1)


def test_unusual_metrics_are_drawn_as_they_are(tmp_path: Path):
    """One standard error either way where it was logged: 0.5 ± 0.25 and 2.5 ± 0.5, the highest value 3 and the lowest
    -1, so that the axis runs from -1 - 0.05 * 4 = -1.2 to 3.2."""
    (tmp_path / "metrics.csv").write_text(UNUSUAL)
    page = page_of(tmp_path)
    assert "Not logged: win rate against the reference, preference loss, score margin, policy − reference." in page
    _, divergence, loss, _, length, ended = figure_of({"": read_metrics(tmp_path / "metrics.csv")}).axes
    (band,) = divergence.collections
    corners = {(float(x), float(y)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(2, 0.25), (2, 0.75), (4, 2.0), (4, 3.0)}
    assert divergence.get_ylim() == pytest.approx((-1.2, 3.2))
    assert [text.get_text() for text in loss.texts] == ["not logged"]
    assert legend_of(length) == ["reference, training"]
    assert legend_of(ended) == ["policy, held out"]


def test_run_without_a_finite_value_is_refused_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.csv").write_text("step,loss/dpo\n1,nan\n2,inf\n")
    for command, file in {"plot": "curves.png", "report": "page.html"}.items():
        line = refused(capsys, command, str(tmp_path), "--out", str(tmp_path / file))
        assert f"{tmp_path / 'metrics.csv'} has no metric to draw" in line
        assert not (tmp_path / file).exists()
