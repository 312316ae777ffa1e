"""Where TRL 1.13.0 and this package differ on the same pairs, and what is right, worked out in a third way.

The third way is plain: each row by itself, without padding, in float64; sums over the vocabulary; counting.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.parity.pairs import (
    EOS,
    REWARD_TOKENIZERS,
    Case,
    cases,
    make_tokenizer,
    next_token,
    reward_model,
    text_of,
)

Side = Mapping[str, Tensor]
Results = Mapping[str, Side]


@dataclass(frozen=True)
class Finding:
    """A difference, as numbers.

    Args:
        what: What is measured.
        trl: What TRL has.
        ours: What this package has.
        right: What is right.
        why: Where the difference comes from.
    """

    what: str
    trl: str
    ours: str
    right: str
    why: str


def findings(theirs: Results, ours: Results) -> list[Finding]:
    """Return every difference that given pairs can show."""
    return [
        *_positions(theirs, ours),
        *_penalties(theirs, ours),
        *_accumulation(theirs, ours),
        *_equals(theirs, ours),
        *_adapters(theirs, ours),
        *_rewards(theirs, ours),
        *_metrics(theirs, ours),
    ]


def row_logps(model: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
    """Score completions row by row, without padding, in float64; one sum a row (B,)."""
    model = model.double().eval()
    sums = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(1)
        own = logps[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])
        sums.append(own.sum())
    return torch.stack(sums)


def logp_error(case: Case, side: Side) -> float:
    """Return by how much the log-probability of a completion under policy or reference is off at most, in nats."""
    policy, reference = case.models()
    errors = []
    for who, model in (("policy", policy), ("reference", reference)):
        for writer, rows in (("by_policy", case.by_policy), ("by_sampler", case.by_sampler)):
            errors.append(side[f"{who}_logps.{writer}"].double() - row_logps(model, case.prompts, rows))
    return float(torch.cat(errors).abs().max())


def penalized(case: Case, side: Side) -> int:
    """Count the completions that a penalty was taken from."""
    raw = torch.tensor([*case.policy_scores, *case.sampler_scores])
    return int((torch.cat([side["scores.by_policy"], side["scores.by_sampler"]]) < raw).sum())


def gradient_ratio(side: Side, whole: Side) -> float:
    """Return how many times as large a gradient is as the gradient of the batch in one piece."""
    names = [name for name in whole if name.startswith("gradient.")]
    both = [torch.cat([each[name].flatten().double() for name in names]) for each in (side, whole)]
    return float(both[0] @ both[1] / both[1].square().sum())


def _positions(theirs: Results, ours: Results) -> Iterator[Finding]:
    why = "padding on the left and no `position_ids`: learned positions count the padding"
    name = "gpt2, prompts of unequal length"
    errors = [f"{logp_error(cases()[name], side[name]):.2g}" for side in (theirs, ours)]
    yield Finding("GPT-2, unequal prompts: largest error of log pi or log ref, nats a completion", *errors, "0", why)


def _penalties(theirs: Results, ours: Results) -> Iterator[Finding]:
    whys = {
        "llama": "",
        "llama, pad is EOS": "EOS is looked for in the padding before shorter prompts, too",
        "llama, BOS is EOS": "it is looked for in the prompt, which begins with it",
        "llama, EOS in the prompt": "it is looked for in the prompt, as of a chat template",
    }
    for name, why in whys.items():
        case = cases()[name]
        cut = sum(row[-1] != EOS for row in (*case.by_policy, *case.by_sampler))
        counts = [str(penalized(case, side[name])) for side in (theirs, ours)]
        what = "pad, BOS and EOS differ" if name == "llama" else name.removeprefix("llama, ")
        yield Finding(f"missing-EOS penalty, {what}: completions that lose it", *counts, str(cut), why)


def _accumulation(theirs: Results, ours: Results) -> Iterator[Finding]:
    for name in ("llama, 2 batches", "llama, 6 batches"):
        ratios = [f"{gradient_ratio(side[name], side['llama']):.3f}" for side in (theirs, ours)]
        why = "the loss is not divided by `gradient_accumulation_steps` before the backward pass"
        yield Finding(f"gradient in {name.removeprefix('llama, ')}, as a multiple of that in one", *ratios, "1", why)


def _equals(theirs: Results, ours: Results) -> Iterator[Finding]:
    case = cases()["llama, equal scores"]
    policy, reference = case.models()
    margins = row_logps(policy, case.prompts, case.by_policy) - row_logps(reference, case.prompts, case.by_policy)
    margins -= row_logps(policy, case.prompts, case.by_sampler) - row_logps(reference, case.prompts, case.by_sampler)
    half = -(nn.functional.logsigmoid(case.beta * margins) + nn.functional.logsigmoid(-case.beta * margins)) / 2
    why = "the policy's completion wins every tie; here each has half, unless `model.labels.ties: policy`"
    losses = [f"{side[case.name]['dpo'].mean():.4f}" for side in (theirs, ours)]
    yield Finding("equal scores: `loss/dpo`", *losses, f"{half.mean():.4f}, if nobody wins", why)
    name = "llama, identical pairs"
    losses = [f"{side[name]['dpo'].mean():.4f}" for side in (theirs, ours)]
    why = "a constant, log 2, that says nothing; gradients agree"
    yield Finding("identical completions: `loss/dpo`", *losses, "0 by our definition", why)


def _adapters(theirs: Results, ours: Results) -> Iterator[Finding]:
    right = theirs["reference samples"]["without_adapters"]
    same = [
        f"{_same(side['reference samples']['by_reference'], right)}; the policy's, "
        f"{_same(side['reference samples']['by_reference'], side['reference samples']['by_policy'])}"
        for side in (theirs, ours)
    ]
    why = "`get_base_model()` has the adapters in it, switched on"
    yield Finding("LoRA, greedy: is the reference's sample the base model's?", *same, "yes; the policy's, no", why)


def _same(a: Tensor, b: Tensor) -> str:
    return "yes" if a.tolist() == b.tolist() else "no"


def _rewards(theirs: Results, ours: Results) -> Iterator[Finding]:
    case, model = cases()["llama"], reward_model()
    whys = {
        "its own tokenizer": "the reward model gets the policy's token ids; `reward_processing_classes` is ignored",
        "pad is EOS": "EOS is taken for padding, so the score is read a token early",
    }
    for name, kind, shift in REWARD_TOKENIZERS:
        tokenizer = make_tokenizer(kind, shift)
        texts = [f"{prompt} {text_of(row)}" for prompt, row in zip(case.texts(), case.by_policy, strict=True)]
        with torch.no_grad():
            right = [float(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits) for text in texts]
        off = [
            sum(
                abs(score - true) > 1e-3
                for score, true in zip(side["reward scores"][name].tolist(), right, strict=True)
            )
            for side in (theirs, ours)
        ]
        counts = [f"{count} of {len(right)}" for count in off]
        yield Finding(
            f"reward model, {name}: completions with another score than the model's", *counts, "0", whys[name]
        )


def _metrics(theirs: Results, ours: Results) -> Iterator[Finding]:
    case = cases()["llama"]
    policy = case.models()[0]
    logps = [row_logps(policy, case.prompts, rows) for rows in (case.by_policy, case.by_sampler)]
    side = ours[case.name]
    wins = side["scores.by_policy"] > side["scores.by_sampler"]
    chosen = torch.where(wins, *logps).mean()
    numbers = [f"{each[case.name]['logged.logps/chosen']:.2f}" for each in (theirs, ours)]
    yield Finding("`logps/chosen`, nats", *numbers, f"{chosen:.2f}", "log pi plus log ref")
    case = cases()["llama, one token"]
    policy, reference = case.models()
    pi, ref = next_token(policy, case.prompts), next_token(reference, case.prompts)
    kl, entropy = (pi.exp() * (pi - ref)).sum(1), -(pi.exp() * pi).sum(1)
    for name, right, why in (
        ("objective/kl", kl, "E_pi[log pi/ref] and E_ref[log pi/ref], of opposite sign, are averaged"),
        ("objective/entropy", entropy, "half of it is of the reference's completions: a cross-entropy"),
    ):
        numbers = [f"{each[case.name][f'logged.{name}']:.3f}" for each in (theirs, ours)]
        yield Finding(
            f"`{name}` of {len(right)} pairs of one token, nats", *numbers, f"{right.mean():.3f}, summed", why
        )
