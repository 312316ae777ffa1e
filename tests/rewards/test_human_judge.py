"""A judge that is a human at a terminal."""

import contextlib
import math
import os
import pty
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from judging import BAD, GOOD, PROMPTS, ask

from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.guard import Guard, StopAsked
from xpo_lightning.rewards.human_judge import HumanJudge
from xpo_lightning.rewards.llm_judge import is_exchanged


class Terminal:
    """A terminal, and a human who waits to be asked before each answer."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        self.input, self.output = os.fdopen(slave, "r"), os.fdopen(os.dup(slave), "w")
        self.shown = ""

    def answer(self, *lines: str) -> threading.Thread:
        thread = threading.Thread(target=self._answer, args=(lines,), daemon=True)
        thread.start()
        return thread

    def _answer(self, lines: Sequence[str]) -> None:
        for number, line in enumerate(lines, 1):
            while self.shown.count("then Enter: ") < number:
                self.shown += os.read(self.master, 4096).decode()
            os.write(self.master, line.encode())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", terminal.input)
    yield terminal
    terminal.input.close()
    terminal.output.close()
    os.close(terminal.master)


def ask_human(terminal: Terminal, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
    judge = HumanJudge()
    judge.load()
    with contextlib.redirect_stderr(terminal.output):  # in the test itself, since pytest replaces what a fixture sets
        return ask(judge, prompts, firsts, seconds)


@pytest.mark.timeout(60)
def test_a_human_is_asked_about_each_pair_and_never_learns_whose_it_is(terminal: Terminal):
    thread = terminal.answer("1\n", " 2 \n", "=\n", "S\n", "1\n")
    said = ask_human(terminal, PROMPTS[:5], GOOD[:5], BAD[:5])
    thread.join(10)
    swapped = [is_exchanged(*pair) for pair in zip(PROMPTS[:5], GOOD[:5], BAD[:5], strict=True)]
    assert len(set(swapped)) == 2, "all pairs are shown in one order, so the test would not see an error"
    on_first = [1.0, 0.0, 0.5, math.nan, 1.0]
    expected = [1 - one if swap else one for one, swap in zip(on_first, swapped, strict=True)]
    assert said == pytest.approx(expected, nan_ok=True)
    assert "Pair 2 of 5 in this batch, 3 left after it" in terminal.shown
    second = terminal.shown.split("Pair 2 of 5")[1].split("Pair 3 of 5")[0]
    shown = (BAD[1], GOOD[1]) if swapped[1] else (GOOD[1], BAD[1])
    assert second.index(PROMPTS[1]) < second.index(shown[0]) < second.index(shown[1])


@pytest.mark.timeout(60)
def test_a_human_is_asked_again_after_nonsense(terminal: Terminal):
    thread = terminal.answer("3\n", "\n", "yes\n", "=\n")
    assert ask_human(terminal, ["p"], ["a"], ["b"]) == [0.5]
    thread.join(10)
    assert terminal.shown.count("Please answer 1, 2, =, s or q") == 3


@pytest.mark.timeout(60)
def test_what_was_typed_before_the_question_answers_nothing(terminal: Terminal):
    os.write(terminal.master, b"1\n1\n")
    thread = terminal.answer("=\n")
    assert ask_human(terminal, ["p"], ["a"], ["b"]) == [0.5]
    thread.join(10)


@pytest.mark.timeout(60)
def test_a_human_who_quits_stops_the_run_as_ctrl_c_does(terminal: Terminal):
    terminal.answer("q\n")
    with pytest.raises(StopAsked) as stopped, Guard().together():
        ask_human(terminal, ["p"], ["a"], ["b"])
    assert stopped.value.code == 130


@pytest.mark.timeout(60)
def test_a_run_can_stop_while_nobody_answers(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("xpo_lightning.rewards.human_judge._LONGEST_WAIT", 0.05)
    judge, guard = HumanJudge(), Guard()
    judge.load()
    judge.set_check(guard.stop.check)
    threading.Timer(0.1, lambda: setattr(guard.stop, "status", 143)).start()
    start = time.monotonic()
    with pytest.raises(StopAsked) as stopped:
        ask(judge, ["p"], ["a"], ["b"])
    assert stopped.value.code == 143
    assert time.monotonic() - start < 10


@pytest.mark.timeout(60)
def test_the_end_of_the_input_ends_the_run(terminal: Terminal):
    terminal.answer("\x04")  # Ctrl-D
    with pytest.raises(
        InputError, match=r"^model\.reward: the terminal's input ended before HumanJudge had its answer"
    ):
        ask_human(terminal, ["p"], ["a"], ["b"])


@pytest.mark.timeout(60)
def test_completions_cannot_steer_the_terminal(terminal: Terminal):
    thread = terminal.answer("=\n")
    ask_human(terminal, ["p"], ["\x1b]0;owned\x07 [bold]a[/bold]"], ["two\nlines\u202e"])
    thread.join(10)
    assert r"\x1b]0;owned\x07 [bold]a[/bold]" in terminal.shown
    assert r"lines\u202e" in terminal.shown
    assert "\x1b]0;" not in terminal.shown


def test_a_human_needs_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "answers").write_text("1\n")
    for stdin in ((tmp_path / "answers").open(), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(
            InputError, match=r"^model\.reward: HumanJudge asks at a terminal, but standard input is none"
        ):
            HumanJudge().load()
        if stdin is not None:
            stdin.close()
            with pytest.raises(InputError, match=r"standard input is none"):
                HumanJudge().load()


def test_one_human_cannot_sit_at_two_processes(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(
        InputError, match=r"^model\.reward: HumanJudge asks one human, .* 2 processes; set trainer\.dev"
    ):
        HumanJudge().load()
