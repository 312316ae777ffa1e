"""Stops a run before harm is done, on all of its processes together."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from xpo_lightning.core.batch import RawPrompt
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.distributed import Midway, Origin, all_gather, host, is_out_of_step, own_rank, set_origin
from xpo_lightning.core.errors import ConsequentError, InputError, NonFiniteError
from xpo_lightning.core.explanations import explanation

CONSEQUENT, NOT_FINITE, STOP, BAD_INPUT, BROKEN = 1, 2, 3, 4, 5
"""Outcomes of guarded work other than success, the worst last."""
SHOWN = 3
"""Most prompts that a message shows."""


class StopAsked(SystemExit):
    """Raised to stop the run on request; nothing has changed since the last step. `code` is the exit status."""


Problem = Exception | StopAsked
Report = tuple[int, str, str]
"""The severity, the message, and the machine of the process."""


class Stop:
    """A request to stop the run; checked wherever the run can stop cleanly.

    Attributes:
        status: Exit status of the stopped run; None without a request. A signal handler may set it at any moment.
    """

    def __init__(self) -> None:
        self.status: int | None = None

    def check(self) -> None:
        """Raise an error if a stop is requested; call it in work that can be repeated.

        Raises:
            StopAsked: A stop is requested.
        """
        if self.status is not None:
            raise StopAsked(self.status)


class Guard:
    """Lets a piece of work succeed on all processes, or on none.

    A process that fails alone would leave the others waiting for it. So each says how it fared before the run goes on,
    and an error of one is an error of all, with the message of the one. The work must talk to other processes only by
    `all_gather_guarded` and `take_turn`, and must change nothing that lasts.

        with guard.together():
            losses = evaluate(batch)

    Args:
        max_skipped: Steps in a row that may be skipped because of numbers that are not finite.

    Attributes:
        stop: The request to stop the run, if any.
        in_a_row: Steps skipped since the last one that was taken.
        skipped: Steps skipped in total.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        check_range("model.max_skipped_steps", max_skipped, least=0)
        self.max_skipped = max_skipped
        self.stop = Stop()
        self.in_a_row = self.skipped = 0

    def together(self) -> "Together":
        """Guard a block: it succeeds on all processes, or the error of one is raised on all (collective).

        Raises:
            StopAsked: A process is asked to stop.
            InputError: The block raised it, in this process or in another.
        """
        return Together(self)

    def step(self, *, may_stop: bool = True) -> "StepWork":
        """Guard a block that is part of a step, which may be skipped if its numbers are not finite (collective).

        Afterwards `is_skipped` of the returned object tells whether the step is skipped; the block was then interrupted
        on some process.

        Args:
            may_stop: Whether the run can stop cleanly before and after the block.

        Raises:
            StopAsked: A process is asked to stop.
            InputError: The block raised it, in this process or in another. This includes numbers that are not finite,
                unless the step may be skipped.
        """
        return StepWork(self, may_stop=may_stop)

    def record_step(self) -> None:
        """Record that a step was taken."""
        self.in_a_row = 0

    def counts(self) -> dict[str, float]:
        """Return what to log: the steps skipped so far, if any may be skipped."""
        return {"skipped_steps": float(self.skipped)} if self.max_skipped else {}

    def skips(self, worst: int) -> bool:
        """Tell whether a step may be skipped after its worst outcome, and if so count it as skipped."""
        if not 0 < worst <= NOT_FINITE or self.in_a_row >= self.max_skipped:
            return False
        self.in_a_row += 1
        self.skipped += 1
        return True


class _Work:
    """A block that succeeds on all processes, or on none."""

    def __init__(self, guard: Guard, *, may_stop: bool = True) -> None:
        self.guard, self.may_stop = guard, may_stop

    def __enter__(self) -> Self:
        """Start the block, unless the run is asked to stop."""
        if self.may_stop and self.guard.stop.status is not None:
            self._raise_worst(*self._gather(StopAsked(self.guard.stop.status)))
        return self

    def _gather(self, error: BaseException | None) -> tuple[Problem | None, list[Report | None]]:
        """Exchange reports of success or failure with the other processes (collective)."""
        if error is not None and is_out_of_step(error):
            raise error  # The others cannot gather; the lifeline tells them.
        if isinstance(error, StopIteration):  # It would end Lightning's training loop without a word.
            error = RuntimeError(f"StopIteration was raised: {error}")
        elif error is None and self.may_stop and self.guard.stop.status is not None:
            error = StopAsked(self.guard.stop.status)
        elif error is not None and not isinstance(error, Exception | StopAsked):
            raise error  # An interrupt, say, which its sender sends to all processes.
        return error, _reports(None if error is None else _report(error))

    def _raise_worst(self, problem: Problem | None, reports: list[Report | None]) -> None:
        worst = _worst(reports)
        if worst == 0:
            return
        rank, report = next((rank, one) for rank, one in enumerate(reports) if one and one[0] == worst)
        is_here = problem is not None and rank == own_rank()
        error = problem if problem is not None and is_here else _error_of_another(rank, report)
        set_origin(error, Origin(rank, report[2], is_here))
        raise error


class Together(_Work):
    """A block that succeeds on all processes, or raises the worst error of any on all of them."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Raise the worst error of any process."""
        self._raise_worst(*self._gather(error))


class StepWork(_Work):
    """A block that succeeds, skips its step, or raises the worst error of any, on all processes alike.

    Attributes:
        is_skipped: Whether the step is skipped.
    """

    is_skipped = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        """Skip the step if the worst outcome allows that; otherwise raise the worst error of any process."""
        problem, reports = self._gather(error)
        self.is_skipped = self.guard.skips(_worst(reports))
        if not self.is_skipped:
            self._raise_worst(problem, reports)
        return True


def check_finite(values: Sequence[tuple[str, Tensor]], prompts: Sequence[RawPrompt], consequence: str) -> None:
    """Refuse numbers that are not finite.

    Args:
        values: The name of each number, and its value for each prompt. (B,) each
        prompts: B prompts.
        consequence: What happens then, for the message.

    Raises:
        NonFiniteError: Some are not finite; the message shows their prompts.
    """
    finite = torch.stack([value.isfinite() for _, value in values])  # (numbers, B)
    if bool(finite.all()):
        return
    number, row = (int(index) for index in (~finite).nonzero()[0])
    rows = (~finite[number]).nonzero()[:, 0].tolist()
    what, value = values[number]
    raise NonFiniteError(
        f"{what} is {float(value[row])} for {len(rows)} of {len(prompts)} prompts: "
        f"{format_prompts([prompts[row] for row in rows])}; {consequence}",
        rows,
    )


def format_prompts(prompts: Sequence[RawPrompt]) -> str:
    """Format some prompts for a message, long ones by their end, where prompts differ."""
    texts = [prompt if isinstance(prompt, str) else f"{prompt[-1]['content']}" for prompt in prompts[:SHOWN]]
    ends = [text if len(text) <= 80 else "..." + text[-77:] for text in texts]
    return ", ".join(map(repr, ends)) + ", ..." * (len(prompts) > SHOWN)


def _reports(own: Report | None) -> list[Report | None]:
    """Gather the report of every process, in order of rank (collective)."""
    reports = all_gather(own)
    while any(isinstance(report, Midway) for report in reports):  # Others are still in the guarded work.
        reports = all_gather(own)
    return reports


def _report(problem: Problem) -> Report:
    return _severity(problem), explanation(problem) or str(problem), host()


def _error_of_another(rank: int, report: Report) -> Problem:
    severity, message, _ = report
    if severity == STOP:
        return StopAsked(int(message))
    return (RuntimeError if severity == BROKEN else InputError)(f"process {rank}: {message}")


def _severity(problem: Problem) -> int:
    if isinstance(problem, ConsequentError):
        return CONSEQUENT
    if isinstance(problem, NonFiniteError):
        return NOT_FINITE
    if isinstance(problem, StopAsked):
        return STOP
    return BROKEN if explanation(problem) is None else BAD_INPUT


def _worst(reports: list[Report | None]) -> int:
    return max((report[0] for report in reports if report), default=0)
