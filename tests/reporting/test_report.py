"""The page about a run, as a reader sees it in a browser, and what it makes of odd runs."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browsing, find_browser
from test_cli import refused

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.reporting.html_report import HEADLINES, Value, changes
from xpo_lightning.reporting.metrics_file import Series
from xpo_lightning.reporting.panels import PANELS
from xpo_lightning.reporting.samples import samples_of
from xpo_lightning.reporting.svg_chart import chart_of

SCRIPT = "<script>window.broken = 1; console.error('broken')</script><img src=x onerror='window.broken = 1'>"
LONG = "unbreakable" * 60
PLACES = "[...document.querySelectorAll('{}')].map(one => one.getBoundingClientRect().toJSON())"


def row(step: int, prompt: Any, policy: str, **others: Any) -> dict[str, Any]:
    """Write a row as `CompletionsTable` does."""
    texts = {"step": step, "prompt": prompt, "policy": policy, "reference": "The reference sat down."}
    scores = {"policy_score": 1.25, "reference_score": -0.5, "label": 1.0}
    return {**texts, **scores, "policy_ended": True, "reference_ended": True, **others}


def write_run(folder: Path, steps: int = 30) -> Path:
    """Write the files of a run by hand: a validation before and after, and text that would like to be more."""
    folder.mkdir(parents=True)
    names = ["eval/win_rate", "eval/win_rate_stderr", "eval/objective/kl", "eval/objective/kl_stderr"]
    names += ["win_rate", "objective/kl", "loss/dpo", "time/step", "throughput/tokens_per_second"]
    lines = [",".join(["step", *names]), "0,0.5,0.031,0.0,0.0,,,,,"]
    lines += [f"{n},,,,,{0.5 + n / 100},{n / 20},{0.7 - n / 200},2.0,{600 + n}" for n in range(1, steps + 1)]
    lines += [f"{steps},0.8125,0.024,1.5,0.125,,,,,"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    chat = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": SCRIPT}]
    rows = [
        *(row(0, "A cat", "Before, it slept.", label=0.0), row(0, chat, LONG, policy_ended=False)),
        *(row(steps, "A cat", f"After, {SCRIPT}"), row(steps, chat, "bell \a, half \ud83d, \u202eturned", label=0.5)),
    ]
    (folder / "completions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "config.yaml").write_text(f"model:\n  note: {SCRIPT}\n  long: {LONG}\n")
    start = {
        "run": {"policy": f"a/model{LONG}: 1,234 weights"},
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "2"},
    }
    (folder / "start.json").write_text(json.dumps(start))
    event = {"step": 7, "text": f"Warning: the KL {SCRIPT} {LONG}"}
    (folder / "events.jsonl").write_text(
        json.dumps({**event, "text": event["text"] + " \u2028"}, ensure_ascii=False) + "\n"
    )
    return folder


def report(run: Path) -> Path:
    out = run.parent / "page.html"
    main(["report", str(run), "--out", str(out)])
    return out


# ---- in a browser ----


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(write_run(tmp_path_factory.mktemp("report") / "mine" / "version_3"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(page: Page, written: Path) -> Callable[..., Page]:
    """Give a function that opens the report; afterwards nothing may have been asked for, or complained of."""

    def open_it(**options: Any) -> Page:
        page.requests.clear()
        page.complaints.clear()
        page.open(written, **options)
        return page

    yield open_it
    assert page.requests == [written.resolve().as_uri()]
    assert page.complaints == []


def test_browser_sees_requests_and_complaints(page: Page, tmp_path: Path):
    """Else the other tests could not fail."""
    bad = "<img src='https://example.invalid/a.png'><script>console.error('mine'); x.y</script>"
    (tmp_path / "bad.html").write_text(bad)
    page.open(tmp_path / "bad.html")
    page.run("1")
    assert "https://example.invalid/a.png" in page.requests
    assert any("mine" in one for one in page.complaints)
    assert any("x is not defined" in one for one in page.complaints)


def test_without_a_browser_ci_fails_and_others_skip(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        find_browser()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        find_browser()


def test_curves_are_drawn(opened: Callable[..., Page]):
    shown = opened()
    titles = shown.run("[...document.querySelectorAll('figcaption')].map(one => one.textContent)")
    assert titles == ["Win rate against the reference", "KL from the reference (nats)", "Preference loss"]
    assert "a whole step (seconds)\t2" in shown.run("document.body.innerText")
    assert "Not logged: score margin, policy − reference, completion length" in shown.run("document.body.innerText")
    for kind, count in {"raw": 3, "training": 3, "held-out": 2}.items():
        places = shown.run(PLACES.format(f"figure g path.{kind}"))
        assert len(places) == count
        assert all(place["width"] > 200 and place["height"] > 20 for place in places)
    bands = shown.run(PLACES.format("path.band"))
    assert [place["height"] > 2 for place in bands] == [True, True]
    charts, dots = shown.run(PLACES.format("figure.chart > svg")), shown.run(PLACES.format("figure g circle"))
    assert len(dots) == 4
    box = charts[0]
    for dot, (share, value) in zip(dots[:2], [(0, 0.5), (1, 0.8125)], strict=True):
        x = box["x"] + box["width"] * (46 + share * (370 - 46)) / 380
        y = box["y"] + box["height"] * (190 - (190 - 10) * (value + 0.03) / 1.06) / 220
        assert dot["x"] + dot["width"] / 2 == pytest.approx(x, abs=0.5)
        assert dot["y"] + dot["height"] / 2 == pytest.approx(y, abs=0.5)


def test_values_are_shown_under_the_pointer_and_by_arrow_keys(opened: Callable[..., Page]):
    shown = opened()
    shown.run("document.querySelector('figure.chart').scrollIntoView()")
    box = shown.run(PLACES.format("figure.chart > svg"))[0]
    middle = box["x"] + box["width"] * (46 + 0.5 * (370 - 46)) / 380
    shown.call("Input.dispatchMouseEvent", type="mouseMoved", x=middle, y=box["y"] + 60)
    values = "document.querySelector('.values').textContent"
    assert shown.run(values) == "step 15: training 0.64 · held out 0.5 (step 0)"
    shown.run("document.querySelector('figure.chart > svg').focus()")
    assert shown.run(values) == "step 30: training 0.79 · held out 0.8125"
    shown.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    assert shown.run(values) == "step 29: training 0.78 · held out 0.8125 (step 30)"
    assert shown.run("document.querySelector('.cursor line').getBoundingClientRect().height") > 50


def test_completions_are_shown_as_text_side_by_side(opened: Callable[..., Page]):
    shown = opened()
    text = shown.run("document.body.innerText")
    assert shown.run("window.broken === undefined")
    assert f"After, {SCRIPT}" in text
    assert "Before, it slept." in text
    assert "bell �, half �" in text
    assert LONG in text
    assert f"Step 7: Warning: the KL {SCRIPT}" in text
    assert "score 1.25, lost" in text
    assert "score 1.25, won" in text
    assert text.count("cut at the most tokens") == 1
    columns = shown.run(PLACES.format(".sample:first-of-type .completion"))
    assert len(columns) == 3
    assert len({column["y"] for column in columns}) == 1
    assert all(one["width"] > 100 for one in columns)
    headings = shown.run("[...document.querySelectorAll('.sample h4')].map(one => one.textContent)")
    assert headings == ["Policy, step 0", "Policy, step 30", "Reference, both times"] * 2


def test_headline_numbers_come_with_their_errors(opened: Callable[..., Page]):
    numbers = opened().run("[...document.querySelectorAll('.number')].map(one => one.textContent)")
    assert numbers == ["0.500 ± 0.031 → 0.812 ± 0.024", "0.000 ± 0.000 → 1.500 ± 0.125"]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_all_can_be_read(opened: Callable[..., Page], width: int, scheme: str):
    shown = opened(width=width, scheme=scheme)
    shown.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert shown.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    ends = shown.run(PLACES.format("main > section, .card, figure svg, .text, td, h1"))
    assert len(ends) > 30
    assert max(place["right"] for place in ends) <= width
    colors = shown.run(CONTRASTS)
    assert len(colors) > 20
    assert min(colors) >= 4.5, "WCAG AA asks for 4.5 to 1"


CONTRASTS = """
(() => {
  const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('h1, h2, h3, h4, p, th, td, li, svg text, summary, pre, footer, span')]
    .filter((one) => one.textContent.trim() && one.getBoundingClientRect().width)
    .map((one) => {
      const style = getComputedStyle(one);
      const inside = light(one.tagName === 'text' ? style.fill : style.color), outside = light(ground(one));
      return (Math.max(inside, outside) + 0.05) / (Math.min(inside, outside) + 0.05);
    });
})()
"""


def test_structure_serves_those_who_do_not_see_it(opened: Callable[..., Page]):
    shown = opened()
    levels = shown.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(one => +one.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert shown.run("[...document.querySelectorAll('th')].every(one => one.scope)")
    labels = shown.run("[...document.querySelectorAll('.chart > svg')].map(one => one.getAttribute('aria-label'))")
    assert labels[0].startswith("Win rate against the reference: training 0.51 at step 1 and 0.79 at step 30; held out")
    assert shown.run("document.documentElement.lang") == "en"


# ---- odd runs ----


def test_page_has_what_the_run_left_and_says_what_it_did_not(tmp_path: Path):
    run = tmp_path / "bare" / "version_0"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("step,loss/dpo\n1,0.7\n2,nan\n3,0.5\n")
    text = report(run).read_text()
    for hint in ("CompletionsTable", "RunSummary", "Throughput", "No validation was logged", "no config.yaml"):
        assert hint in text
    assert "NaN" not in text.partition('id="data">')[2].partition("</script>")[0]
    assert not re.search(r"[ML][\d.]* ?nan", text)


def test_report_of_a_parent_is_that_of_its_newest_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in (2, 10, 9):
        write_run(tmp_path / "runs" / f"version_{number}", steps=number)
    main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")])
    assert "runs/version_10" in capsys.readouterr().out
    assert "10 steps" in (tmp_path / "page.html").read_text()


def test_report_refuses_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "version_0")
    assert "--out must end with .html" in refused(capsys, "report", str(run), "--out", "page.pdf")
    assert "RUN: there is no nowhere" in refused(capsys, "report", "nowhere")
    out = ("--out", str(tmp_path / "page.html"))
    (run / "completions.jsonl").write_text('{"step": 1}\n')
    assert "completions.jsonl, line 1 is no row of CompletionsTable" in refused(capsys, "report", str(run), *out)
    (run / "completions.jsonl").unlink()
    (run / "start.json").write_text("[1]")
    assert "start.json is no file of RunSummary" in refused(capsys, "report", str(run), *out)
    (run / "start.json").unlink()
    (run / "events.jsonl").write_text('{"text": "of no step"}\n')
    assert "events.jsonl has a line that is no event of a run" in refused(capsys, "report", str(run), *out)
    (run / "metrics.csv").write_text("step,other\n1,2\n")
    assert "has no metric to draw" in refused(capsys, "report", str(run), *out)
    assert not (tmp_path / "page.html").exists()


def test_samples_pair_the_first_validation_with_the_last(tmp_path: Path):
    rows = [row(0, "p", "a0"), row(0, "p", "b0"), row(0, "only before", "c0")]
    rows += [row(5, "p", "lost"), row(9, "p", "lost too")]
    rows += [row(5, "p", "a5"), row(5, "p", "b5", reference="another"), row(5, "only after", "d5")]
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    samples = samples_of(lines + '{"step": 9, "pro')
    written = [[(one.writer, one.text) for one in sample.written] for sample in samples]
    reference = "The reference sat down."
    both = [("Policy, step 0", "a0"), ("Policy, step 5", "a5"), ("Reference, both times", reference)]
    assert written[0] == both
    differing = [("Reference, step 0", reference), ("Reference, step 5", "another")]
    assert written[1] == [("Policy, step 0", "b0"), ("Policy, step 5", "b5"), *differing]
    assert written[2] == [("Policy, step 0", "c0"), ("Reference, step 0", reference)]
    assert written[3] == [("Policy, step 5", "d5"), ("Reference, step 5", reference)]
    assert samples_of("") == []


def test_line_breaks_where_a_value_is_not_finite():
    chart = chart_of(PANELS[2], {"eval/loss/dpo": Series([0, 1, 2, 3], [1.0, float("nan"), 0.5, 0.5])})
    (shape,) = chart.shapes
    assert shape.path.count("M") == 2
    assert shape.path.count("L") == 1
    assert len(shape.dots) == 3
    assert chart.data["lines"][0]["values"] == [1.0, None, 0.5, 0.5]
    assert chart_of(PANELS[2], {"loss/dpo": Series([1], [float("inf")])}) is None


def test_only_validation_stands_alone():
    (change,) = changes({"eval/win_rate": Series([7], [0.5])}, HEADLINES)
    assert (change.steps, change.values) == ([7], [Value(0.5)])
    assert str(Value(-0.0001)) == "0.000"
    assert str(Value(-2.0, 0.5)) == "−2.000 ± 0.500"
