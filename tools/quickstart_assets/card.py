"""Writes the README that goes with the built assets."""

from dataclasses import dataclass
from pathlib import Path
from string import Template

from tools.quickstart_assets.judge import FAULT_COST, LABEL_SCALE, MISSING_COST, PATIENCE_WORDS, SLIP_COST, WORD_COST
from tools.quickstart_assets.pairs import LEAST, NAME
from tools.quickstart_assets.reward_training import Accuracy, Margin

CARD = Template("""\
# Embedded assets

A tiny policy, a tiny reward model and prompts, so that a first run needs no download. They are toys: they know one
small grammar of little stories and nothing else. All of it is made from nothing by
`python -m tools.quickstart_assets.build`, which also writes this file. The text was written for this project, and
text and weights are under the licence of the project, Apache-2.0.

| what | parameters | bytes |
| --- | --- | --- |
| `policy/`: `LlamaForCausalLM` | $policy_parameters | $policy_bytes |
| `reward/`: `LlamaForSequenceClassification`, one label | $reward_parameters | $reward_bytes |
| `prompts.jsonl`: $prompts prompts | | $prompts_bytes |
| `prompts_validation.jsonl`: $validation prompts | | $validation_bytes |
| `preferences.jsonl`: $pairs preference pairs | | $pairs_bytes |

## Text

A prompt is the opening of a story and ends without a space; a completion is the rest of it, carries the joining space
in its first token, and is followed by EOS. A completion has three elements: what the main person did, how the animal
or the other person answered, and how the day ended. Each has a mood, +1 (warm), 0 (plain) or -1 (gloomy or unkind).
A name is never the first word of a prompt, so that it is the same token in the prompt as in the completion. No pair of
a name and an animal or person in a validation prompt occurs in a training prompt, or in the stories that the models
were trained on.

A preference pair has a training prompt and two completions of the grammar, without a fault, whose true utilities (see
below) differ by at least $least; the higher is chosen.

Both directories hold a copy of one byte-level tokenizer of $vocabulary tokens: one token for each word of the grammar,
with the space before it, and the 256 bytes for everything else, so that any text comes back exactly. `<pad>`, `<bos>`,
`<eos>` and `<unk>` are distinct; a plain call adds neither BOS nor EOS, and the models were trained without BOS. The
policy's copy pads on the left, the reward model's on the right.

## Policy

Trained by supervised learning on fresh stories for $policy_steps steps. On completions of validation prompts its loss
is then $loss per token (perplexity $perplexity). At last its logits are scaled by $sharpness, in the weight of the last
norm: choices of the grammar that are equally likely stay so, and words that do not belong become rarer. Of $samples
samples at temperature 1 for validation prompts, with no top-k, $ended % end with EOS within 64 tokens, $clean % are
free of any fault against the grammar and the prompt, and $distinct are distinct; their mean true utility is
$mean_utility with a standard deviation of $sd_utility.

## Reward model

The hidden true utility is the sum of the three moods, less $word_cost for each word after number $patience,
$slip_cost for each clause that names a wrong person, thing or place, $fault_cost for each fault (a clause that is
unknown, repeated, out of order or broken off) and $missing_cost for each missing element, and at least -6. Labels are
Bradley-Terry draws with $scale times the difference in utility. The model was trained for $reward_steps steps on
grammar completions, damaged ones and samples of the policy. It reads prompt and completion as one string, without EOS.

| held-out pairs | pairs | noisy labels | ceiling (true utility) | noise-free true utility |
| --- | --- | --- | --- | --- |
| clean grammar completions | $clean_row |
| policy samples at temperature 1 | $policy_row |
| a quarter damaged | $damaged_row |

Scores of the policy's samples: mean $mean_score, standard deviation $sd_score, from $min_score to $max_score;
correlation with the true utility $correlation.

Damaged kind stories against intact kind stories of the same prompt: by how much the damaged ones score lower.

| damage | share that loses | margin of 95 % | mean margin |
| --- | --- | --- | --- |
$margins

Its weak spots: it does not notice a wrong name or place, and hardly a happy end told twice or drawn out with happy
words. A policy that is trained on it long enough will find them; read the KL beside the win rate.

## Samples of the policy

$stories
""")


@dataclass(frozen=True)
class Measured:
    """What the build measured.

    Attributes:
        plain: Values that go into the card as they are.
        rows: Accuracy by the kind of held-out pairs: ``clean``, ``policy`` and ``damaged``.
        margins: Margins by the kind of damage.
        stories: Prompts and completions to show.
    """

    plain: dict[str, str]
    rows: dict[str, Accuracy]
    margins: dict[str, Margin]
    stories: list[tuple[str, str]]


def bytes_below(path: Path) -> int:
    """Returns the size of a file, or of all files below a directory."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def write_card(out: Path, measured: Measured) -> None:
    """Writes ``README.md`` beside the assets."""
    rows = {
        f"{name}_row": f"{row.pairs} | {row.noisy:.3f} | {row.ceiling:.3f} | {row.true:.3f}"
        for name, row in measured.rows.items()
    }
    sizes = {
        "policy_bytes": bytes_below(out / "policy"),
        "reward_bytes": bytes_below(out / "reward"),
        "prompts_bytes": bytes_below(out / "prompts.jsonl"),
        "validation_bytes": bytes_below(out / "prompts_validation.jsonl"),
        "pairs_bytes": bytes_below(out / NAME),
    }
    costs = {
        "least": LEAST,
        "scale": LABEL_SCALE,
        "word_cost": WORD_COST,
        "patience": PATIENCE_WORDS,
        "slip_cost": SLIP_COST,
        "fault_cost": FAULT_COST,
        "missing_cost": MISSING_COST,
    }
    shown = "\n".join(f"> **{prompt}**{completion}\n" for prompt, completion in measured.stories).rstrip()
    lost = "\n".join(
        f"| {name} | {100 * one.lost:.0f} % | {one.low:.1f} | {one.mean:.1f} |"
        for name, one in measured.margins.items()
    )
    text = CARD.substitute(measured.plain, stories=shown, margins=lost, **costs, **rows, **sizes)
    (out / "README.md").write_text(text, encoding="ascii")
