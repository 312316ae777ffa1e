"""One XPO step of a module against the naive loop, and what came of it."""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from conftest import randomize_adapters
from torch import Tensor, nn

from xpo_lightning import InputError
from xpo_lightning.models.forward.capabilities import Sharing, sharing_of
from xpo_lightning.models.forward.capabilities import rows_of as way_of_rows
from xpo_lightning.models.forward.cpu import speed_up_linears
from xpo_lightning.models.forward.unshared import Rows
from xpo_lightning.rollout.opening import writing_of
from xpo_lightning.rollout.writing import Memory
from zoo.naive import NaiveStep, count_not_greedy, logits_of, rows_of, take_step
from zoo.step import ALPHA, BETA, FULL, LENGTHS, LORA, NOISE, Build, Mode, Taken, sample_greedily, take_module_step

LONGEST = max(LENGTHS) + 8  # tokens of a row, prompt and completion
LOGPS, GRADIENTS = 1e-4, 1e-3  # how far a float32 step may be off: in nats, and relative
FLOOR = 3.0  # how many times as far off as the naive loop in bfloat16 a bfloat16 step may be, on average


@dataclass
class Outcome:
    """What came of one step: `right`, `refused`, `WRONG` or `CRASH`.

    Args:
        kind: The outcome in a word.
        path: The way that the model was run.
        kept: Largest error of a log-probability that sampling kept, nats a token.
        reference: Largest error of the reference's log-probability of a completion, nats.
        gradients: Largest error of a gradient, relative to the largest of its tensor.
        floor: The same three of the naive loop in bfloat16.
        score: Largest error of a score, of a reward model.
        message: The refusal, the error, or what else is wrong.
    """

    kind: str
    path: str = "?"
    kept: float = math.nan
    reference: float = math.nan
    gradients: float = math.nan
    floor: tuple[float, float, float] | None = None
    score: float = math.nan
    message: str = ""

    def __str__(self) -> str:
        """Say it in one line."""
        if self.kind not in ("right", "WRONG"):
            return f"{self.kind:8s} {self.message}"
        if not math.isnan(self.score):
            return f"{self.kind:8s} {self.path:10s} score {self.score:.1e}  {self.message}"
        numbers = f"kept {self.kept:.1e}  reference {self.reference:.1e}  gradients {self.gradients:.1e}"
        if self.floor is not None:
            numbers += "  (naive bfloat16: {:.1e} {:.1e} {:.1e})".format(*self.floor)
        return f"{self.kind:8s} {self.path:10s} {numbers}  {self.message}".rstrip()


@dataclass
class Measured:
    """What is compared of a step.

    Args:
        kept: The log-probability of each token under its writer; a tensor a completion.
        reference: The reference's log-probability of each completion.
        gradients: By the name of the weight.
    """

    kept: list[Tensor]
    reference: list[Tensor]
    gradients: dict[str, Tensor]


def compare(build: Build, mode: Mode = FULL) -> Outcome:
    """Take one step with a model, and compare it with the naive loop.

    Args:
        build: Builds the model.
        mode: How it is trained.
    """
    build = partial(build, noise=NOISE) if mode.dropout else build
    check_context(build())
    try:
        taken = take_module_step(build, mode)
        greedy = sample_greedily(build) if mode == FULL else None
    except InputError as error:
        return Outcome("CRASH" if "\n" in str(error) else "refused", message=str(error))
    except Exception as error:
        return Outcome("CRASH", message=describe(error))
    policy, reference = _models(build, mode, torch.float32)
    truth = take_step(policy, reference, taken.pairs, ALPHA, BETA)
    if mode.dtype == torch.float32:
        outcome = Outcome("right", path_of(taken.policy), *_errors(_of_module(taken), _of_loop(truth), torch.max))
        limits, wrong = (LOGPS, LOGPS, GRADIENTS), _wrong_metrics(taken.logged, truth)
    else:  # Rounding may send a token to another expert, so errors are judged by their mean.
        coarse = take_step(*_models(build, mode, mode.dtype), taken.pairs, ALPHA, BETA)
        outcome = Outcome("right", path_of(taken.policy), *_errors(_of_module(taken), _of_loop(truth), torch.mean))
        outcome.floor = _errors(_of_loop(coarse), _of_loop(truth), torch.mean)
        limits, wrong = tuple(FLOOR * error for error in outcome.floor), []
    if greedy is not None and (missed := count_not_greedy(reference, rows_of(greedy).by_policy)):
        wrong.append(f"{missed} greedy samples are not the likeliest token")
    errors = (outcome.kept, outcome.reference, outcome.gradients)
    if wrong or not all(error <= limit for error, limit in zip(errors, limits, strict=True)):
        outcome.kind, outcome.message = "WRONG", "; ".join(wrong)
    return outcome


def path_of(model: nn.Module) -> str:
    """Name the way that rows of the zoo's longest go through a model.

    `static` writes as a GPU replays it. `fast` shares prompts, `plain` pads rows, `even` puts rows of equal length
    together; the last two of them write with a cache or a state. `row by row` reads everything again for each token.
    """
    writing = writing_of(model, LONGEST)
    if writing.is_static:
        return "static"
    if writing.memory is Memory.NOTHING:
        return "row by row"
    if writing.is_shared and sharing_of(model, LONGEST) is not Sharing.NOT:
        return "fast"
    padded = (Rows.PADDED_LEFT, Rows.PADDED_RIGHT)
    return "plain" if writing.rows in padded and way_of_rows(model, LONGEST) in padded else "even"


@torch.no_grad()
def check_context(model: nn.Module) -> None:
    """See that the next token depends on more than the last one, or errors would not show.

    Raises:
        ValueError: It does not.
    """
    one, other = (logits_of(model, [token, 20, 30])[-1] for token in (10, 40))
    if not (one - other).abs().max() > 1e-3:
        raise ValueError("expected logits that depend on the context; give the family other values in OVERRIDES")


def _models(build: Build, mode: Mode, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Build policy and reference as the module has them before its step, in a type of their own."""
    policy, reference = build(dtype), build(dtype)
    if mode.dtype != dtype:  # weights are rounded before they are made float32 again
        for model in (policy, reference):
            model.load_state_dict(build(mode.dtype).state_dict())
    if mode.lora:
        policy = LORA.wrap(policy)
        randomize_adapters(policy, 0.1)
        for weight in policy.parameters():  # peft keeps the adapters of a bfloat16 model in float32
            weight.data = weight.data.to(dtype)
    speed_up_linears(policy, reference)  # the same library as the module's, or some models amplify the rounding of two
    return policy.eval(), reference


def _of_loop(step: NaiveStep) -> Measured:
    kept = [*step.policy.by_policy, *step.reference.by_sampler]
    sums = [logps.sum() for logps in (*step.reference.by_policy, *step.reference.by_sampler)]
    return Measured(kept, sums, step.gradients)


def _of_module(taken: Taken) -> Measured:
    sides, logps = (taken.pairs.completions.by_policy, taken.pairs.completions.by_sampler), taken.pairs.reference_logps
    kept = [row[mask] for side in sides for row, mask in zip(side.token_logps, side.mask, strict=True)]
    return Measured(kept, [*logps.by_policy, *logps.by_sampler], taken.gradients)


def _errors(ours: Measured, truth: Measured, over: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """Return the errors of kept log-probabilities, of the reference's, and of gradients, as a maximum or a mean."""
    # A tensor whose gradient is all rounding is judged by the size of the others; one without a gradient has zeros.
    least, none = 0.01 * max(float(gradient.abs().max()) for gradient in truth.gradients.values()), torch.zeros(())
    relative = []
    for name in {**truth.gradients, **ours.gradients}:
        one, other = ours.gradients.get(name, none), truth.gradients.get(name, none).float()
        relative.append(over((one - other).abs()) / over(other.abs()).clamp(min=least))
    kept, reference = (
        torch.cat(ours.kept) - torch.cat(truth.kept),
        torch.stack(ours.reference) - torch.stack(truth.reference),
    )
    return float(over(kept.abs())), float(over(reference.abs())), float(over(torch.stack(relative)))


def _wrong_metrics(logged: dict[str, float], truth: NaiveStep) -> list[str]:
    """Say which metrics of the step are not those of the naive loop."""
    sums = [each.by_policy for each in (truth.policy, truth.reference)]
    own, fixed = (sum(float(logps.sum()) for logps in side) / len(side) for side in sums)
    expected = {"objective/kl": own - fixed, "loss/dpo": truth.preference}
    return [
        f"{name} is {logged[name]:.3f}, not {value:.3f}"
        for name, value in expected.items()
        if not abs(logged[name] - value) <= 2 * LOGPS
    ]


def describe(error: Exception) -> str:
    """Say in one line what was raised and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/xpo_lightning/" in frame.filename]
    places = " < ".join(f"{frame.filename.split('/')[-1]}:{frame.lineno}" for frame in (place, *ours[-1:]))
    return f"{type(error).__name__}: {' '.join(str(error).split()):.150} [{places}]"
