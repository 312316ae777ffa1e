"""A judge that asks a human at the terminal."""

import math
import os
import select
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.distributed import world_size
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.guard import StopAsked
from xpo_lightning.core.printable import with_escapes
from xpo_lightning.rewards.base import Judge
from xpo_lightning.rewards.llm_judge import format_prompt, is_exchanged

_LONGEST_WAIT = 1.0  # seconds between two checks whether the run was asked to stop
_ANSWERS = {"1": 1.0, "2": 0.0, "=": 0.5, "s": math.nan}
_QUIT = "q"


class HumanJudge(Judge):
    """Asks a human at the terminal which of two completions is better.

    A hash of the texts decides which completion is shown as 1, so the order does not reveal which model wrote it. The
    answers are 1, 2, = (a tie), s (skip: no answer) and q, which ends the run as Ctrl-C does: a resumed run repeats the
    step that the pairs belong to, and asks about its pairs again.

    It needs a terminal, and one process (`trainer.devices: 1`). Questions are shown on standard error; a progress bar
    beside them is hard to read, so leave `XPOProgressBar` out of `trainer.callbacks`, and set
    `trainer.enable_progress_bar` to false.

    Args:
        invalid: What to do with a skipped pair: `skip` leaves it out of the preference loss, `tie` counts it as a tie,
            `error` ends the run.
    """

    def load(self) -> None:
        """Check that there is a terminal to ask at.

        Raises:
            InputError: Standard input is not a POSIX terminal, or the run has several processes.
        """
        if os.name != "posix" or sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
            raise InputError(
                "model.reward: HumanJudge asks at a terminal, but standard input is none; start the run in a POSIX "
                "terminal, in the foreground and without redirecting its input, or choose another judge"
            )
        if world_size() > 1:
            raise InputError(
                f"model.reward: HumanJudge asks one human, but the run has {world_size()} processes; set "
                f"trainer.devices and trainer.num_nodes to 1"
            )

    def compare(
        self,
        prompts: Sequence[RawPrompt],
        firsts: Sequence[str],
        seconds: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Ask about one pair after the other.

        Args:
            prompts: B prompts, text or chat messages.
            firsts: B completions.
            seconds: B others.
            columns: Not used.

        Returns:
            1 if the first is better, 0 if the second is, 0.5 for a tie, NaN for a skipped pair. (B,)

        Raises:
            InputError: The terminal's input ended.
            StopAsked: The human quits, or the run was asked to stop.
        """
        console = Console(stderr=True, highlight=False)
        answers = []
        for number, (prompt, first, second) in enumerate(zip(prompts, firsts, seconds, strict=True), 1):
            exchanged = is_exchanged(prompt, first, second)
            _discard_typed()
            console.rule(f"Pair {number} of {len(prompts)} in this batch, {len(prompts) - number} left after it")
            shown = (second, first) if exchanged else (first, second)
            for title, text in zip(("Prompt", "1", "2"), (format_prompt(prompt), *shown), strict=True):
                console.print(Panel(Text(with_escapes(text)), title=title, title_align="left"))
            answer = self._answer(console)
            answers.append(1 - answer if exchanged else answer)
        return torch.tensor(answers)

    def _answer(self, console: Console) -> float:
        """Ask until the answer is valid, and return the probability that the completion shown first is better."""
        ask = "Which is better? 1, 2, = (tie), s (skip) or q (quit), then Enter: "
        while True:
            console.print(ask, end="")
            line = self._read_line().strip().lower()
            if line in _ANSWERS:
                return _ANSWERS[line]
            if line == _QUIT:
                raise StopAsked(130)  # the status after Ctrl-C
            ask = "Please answer 1, 2, =, s or q, then Enter: "

    def _read_line(self) -> str:
        """Wait for a line of input, letting the run stop meanwhile.

        The line is read from the terminal itself, since Python's buffer could hold lines that `select` does not see.
        """
        terminal = sys.stdin.fileno()
        while not select.select([terminal], [], [], _LONGEST_WAIT)[0]:
            self.check()
        try:
            line = os.read(terminal, 4096)  # at most one line
        except OSError:  # the terminal is gone
            line = b""
        if not line:
            raise InputError("model.reward: the terminal's input ended before HumanJudge had its answer")
        return line.decode(errors="replace")


def _discard_typed() -> None:
    """Discard input that was typed before the question was shown, as it cannot be an answer."""
    import termios  # noqa: PLC0415  (only POSIX systems have it)

    termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
