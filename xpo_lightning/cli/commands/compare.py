"""`xpo compare`: measures how often one policy beats another."""

import json as json_format
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xpo_lightning.callbacks.base import print_lines
from xpo_lightning.core.atomic_files import replacing_file
from xpo_lightning.core.batch import Pair
from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.data.preprocessing import PromptPreprocessor
from xpo_lightning.data.readers import LocatedRow
from xpo_lightning.data.sources import Source, read
from xpo_lightning.data.splits import first_rows
from xpo_lightning.evaluation.compare import Comparison, Outcome, compare_completions, tokenize_for
from xpo_lightning.evaluation.policies import device_named, find_policy
from xpo_lightning.evaluation.run_config import RunConfig, override_sampling
from xpo_lightning.evaluation.saved_run import named_policies
from xpo_lightning.evaluation.win_rate import check_level, win_rate_interval
from xpo_lightning.rewards.base import Feedback, Judge
from xpo_lightning.rollout.sampling import Sampling


def compare(
    a: str,
    b: str = "reference",
    /,
    *,
    config: str | None = None,
    prompts: str | None = None,
    prompt_column: str | None = None,
    max_prompts: int | None = None,
    reward: Feedback | None = None,
    missing_eos_penalty: float | None = None,
    sampling: dict[str, Any] | None = None,
    samples: int = 1,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    json: str | None = None,
) -> None:
    """Measure how often the completions of A are better than those of B, with a confidence interval.

    Both sample completions of the same prompts, each with its own random numbers, and a reward or a judge decides which
    completion is better; a tie is half a win. The interval is over prompts. With A and B exchanged, the result is one
    minus this one.

    Args:
        a: An exported folder, a hub id, `package:name/path`; a run's folder, of which the newest checkpoint is taken;
            or a checkpoint or `reference`, which need `config` unless a run's folder is named.
        b: The policy to compare with, given like `a`.
        config: The config of a run, whose reward, missing-EOS penalty, sampling and validation prompts are used unless
            the options below replace them. By default, that of the first run's folder.
        prompts: The prompts: a file, or the name of a dataset, of which the split `train` is used.
        prompt_column: The column of the prompts; by default that of the config, or `prompt` if there is no config.
        max_prompts: Use only the first so many prompts.
        reward: The reward or the judge.
        missing_eos_penalty: Subtracted from the score of a completion that was cut at `sampling.max_new_tokens`.
        sampling: How both sample: `--sampling.temperature 0.7`, and so on for each option of `model.sampling`.
        samples: Completions of a prompt by each policy; more of them narrow the interval, except for the part of its
            width that comes from the choice of prompts.
        level: Confidence level of the interval.
        seed: Seed of the random numbers.
        batch_size: Most prompts that are sampled together; null chooses a number for the device.
        device: The device of the models; `auto` is a GPU if there is one.
        json: Write the result to this file as well.
    """
    _check(samples=samples, max_prompts=max_prompts, batch_size=batch_size)
    if json is not None and not Path(json).parent.is_dir():
        raise InputError(f"--json: there is no folder '{Path(json).parent}'")
    check_level(level)
    (a, run_of_a), (b, run_of_b) = named_policies([a, b], config)
    run = run_of_a or run_of_b
    feedback, penalty = _feedback(reward, missing_eos_penalty, run)
    how = override_sampling(run.module.sampling if run else Sampling(), sampling)
    if penalty and how.eos_token_ids == [] and not how.stop_strings:
        raise InputError("--missing_eos_penalty: --sampling.eos_token_ids names no EOS token; leave one of them out")
    rows, encoding, where = _prompts(prompts, prompt_column, run)
    # The two sample and are judged in sorted order, so that exchanging A and B mirrors the result exactly.
    runs = {a: run_of_a, b: run_of_b}
    order = sorted((a, b))
    writers = [find_policy(name, runs[name]) for name in order]
    try:
        encoded = tokenize_for([one.encoder(how) for one in writers], first_rows(rows, max_prompts), encoding, where)
    except InputError as error:
        raise InputError(f"--prompts, --prompt_column: {error}" if prompts else str(error)) from error
    where_to = device_named(device)
    feedback.load()
    contest = Comparison(how, samples, seed, where_to, batch_size)
    written = [contest.write(one, rows, n) for n, (one, rows) in enumerate(zip(writers, encoded, strict=True))]
    found = compare_completions(feedback.to(where_to), penalty, encoded[0], Pair(*written))
    found = found if order[0] == a else found.exchanged()
    result = _result(found, level)
    settings = {"a": a, "b": b, "prompts_from": where, "samples": samples, "seed": seed, "sampling": asdict(how)}
    _show(result, a, b, where, samples)
    if json is not None:
        named = {**result, **settings, "reward": type(feedback).__name__}
        with replacing_file(Path(json)) as file:
            file.write(json_format.dumps(named, indent=2) + "\n")


def _check(**counts: int | None) -> None:
    for name, count in counts.items():
        check_range(f"--{name}", count, least=1)


def _feedback(reward: Feedback | None, penalty: float | None, run: RunConfig | None) -> tuple[Feedback, float | None]:
    """Return the reward and its penalty; the run's penalty is used only with the run's reward."""
    if reward is None:
        if run is None:
            raise InputError("xpo compare needs --reward, or the --config of a run with one")
        reward, penalty = run.module.reward, run.module.missing_eos_penalty if penalty is None else penalty
    if penalty is not None and isinstance(reward, Judge):
        raise InputError("--missing_eos_penalty is taken from scores, and a judge gives none; leave it out")
    check_range("--missing_eos_penalty", penalty, least=0)
    return reward, penalty


def _prompts(
    name: str | None, column: str | None, run: RunConfig | None
) -> tuple[Sequence[LocatedRow], PromptPreprocessor, str]:
    """Return the prompts, how they are preprocessed, and their name in messages."""
    if name is not None:
        source = Source(name, key="--prompts", split_key="--prompts")
        encoding = PromptPreprocessor(column or (run.data.encoding.prompt_column if run else "prompt"))
        return read(source), encoding, name
    if run is None:
        raise InputError("xpo compare needs --prompts, or the --config of a run with validation prompts")
    if column is not None:
        raise InputError("--prompt_column is for --prompts; the config's own prompts have data.prompt_column")
    source = run.data.validation_source or run.data.source
    return run.data.held_out(), run.data.encoding, f"validation prompts of {source.name}"


def _result(found: Outcome, level: float) -> dict[str, Any]:
    """Return the numbers of the result by name."""
    shares = found.by_prompt
    if not len(shares):
        raise InputError("the judge gave no usable answer for any prompt")
    low, high = win_rate_interval(shares, level)
    answers = found.wins[~found.wins.isnan()]
    counts = {name: int((answers == value).sum()) for name, value in (("wins", 1), ("ties", 0.5), ("losses", 0))}
    scores = {} if found.scores is None else {"score_a": found.scores.by_policy, "score_b": found.scores.by_sampler}
    return {
        "win_rate": float(shares.mean()),
        "low": low,
        "high": high,
        "level": level,
        "prompts": len(shares),
        **counts,
        "unanswered": int(found.wins.isnan().sum()),
        **scores,
    }


def _show(result: dict[str, Any], a: str, b: str, where: str, samples: int) -> None:
    each = f"{samples} completions" if samples > 1 else "1 completion"
    lines = {
        "A": a,
        "B": b,
        "prompts": f"{result['prompts']} ({where}), {each} each",
        "A wins": f"{result['win_rate']:.3f}, {100 * result['level']:g} % interval {result['low']:.3f} to "
        f"{result['high']:.3f}",
        "": f"{result['wins']} wins, {result['ties']} ties, {result['losses']} losses"
        + (f", {result['unanswered']} without an answer" if result["unanswered"] else ""),
    }
    if "score_a" in result:
        lines["mean score"] = f"{result['score_a']:.4g} for A, {result['score_b']:.4g} for B"
    print_lines(lines)
