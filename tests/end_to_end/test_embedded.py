"""The assets that ship with the package: formats, limits, and whether policy and reward model do their work."""

import itertools
import json
import random
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import xpo_lightning.embedded
from tools.quickstart_assets import damage, grammar, judge, pairs
from tools.quickstart_assets.vocabulary import make_tokenizer

ASSETS: Final = Path(xpo_lightning.embedded.__file__).parent
FRESH_SEED: Final = 987_654
ACT: Final = " She wrapped the kitten in her warm scarf"
BEST: Final = f"{ACT}, and the kitten nestled close and felt safe. Mara felt loved and at peace."
PROMPT: Final = "One cold morning, Mara the baker found a wet kitten behind the old mill."
CLEAN_PAIR_BOUND: Final = 0.95
DAMAGED_PAIR_BOUND: Final = 0.86
# What the build's card says, less four standard errors of as many samples.
FAULTLESS_BOUND: Final = 0.94


def read_prompts(name: str) -> list[str]:
    """Reads a file of prompts and checks the form of each line."""
    rows = [json.loads(line) for line in (ASSETS / name).read_text(encoding="ascii").splitlines()]
    assert all(set(row) == {"prompt"} for row in rows)
    return [row["prompt"] for row in rows]


@pytest.fixture(scope="module")
def train_prompts() -> list[str]:
    """Training prompts."""
    return read_prompts("prompts.jsonl")


@pytest.fixture(scope="module")
def validation_prompts() -> list[str]:
    """Validation prompts."""
    return read_prompts("prompts_validation.jsonl")


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    """The policy and its tokenizer."""
    path = ASSETS / "policy"
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def reward() -> tuple[Any, Any]:
    """The reward model and its tokenizer."""
    path = ASSETS / "reward"
    return AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def sampled(policy: tuple[Any, Any], validation_prompts: list[str]) -> tuple[list[str], torch.Tensor]:
    """Completions of the validation prompts at temperature 1, and their tokens."""
    model, tokenizer = policy
    torch.manual_seed(FRESH_SEED)
    batch = tokenizer(validation_prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=64)
    new = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True), new


def test_preference_pairs_are_built_as_the_card_says():
    """Two faultless completions each, the chosen one worth at least one more; the file is what the tool writes."""
    path = ASSETS / pairs.NAME
    rows = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert rows == pairs.draw_pairs(random.Random(pairs.SEED), pairs.PAIRS)
    assert path.stat().st_size < 100_000
    for row in rows:
        assert judge.is_clean(row["prompt"], row["chosen"])
        assert judge.is_clean(row["prompt"], row["rejected"])
        assert judge.utility(row["prompt"], row["chosen"]) - judge.utility(row["prompt"], row["rejected"]) >= 1
        assert not grammar.read_facts(row["prompt"]).held_out
    card = (ASSETS / "README.md").read_text()
    assert f"{len(rows)} preference pairs | | {path.stat().st_size} |" in card


def score(reward: tuple[Any, Any], texts: list[str]) -> list[float]:
    """Scores whole texts."""
    model, tokenizer = reward
    with torch.no_grad():
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    assert logits.shape == (len(texts), 1)
    return [float(value) for value in logits[:, 0]]


def pair_accuracy(reward: tuple[Any, Any], damaged: float, groups: int = 40) -> float:
    """How often the reward model orders fresh completions of the same held-out prompt as the true utility does."""
    rng = random.Random(FRESH_SEED)
    right: list[bool] = []
    for _ in range(groups):
        facts = grammar.draw_facts(rng, held_out=True)
        prompt = grammar.draw_prompt(rng, facts)
        texts = [grammar.draw_completion(rng, facts, grammar.draw_moods(rng)) for _ in range(4)]
        texts = [damage.damage(rng, facts, text) if rng.random() < damaged else text for text in texts]
        found = score(reward, [prompt + text for text in texts])
        true = [judge.utility(prompt, text) for text in texts]
        for i, k in itertools.combinations(range(4), 2):
            if abs(true[i] - true[k]) > 1e-6:
                right.append((true[i] > true[k]) == (found[i] > found[k]))
    assert len(right) > 3 * groups
    return sum(right) / len(right)


def test_parameters_and_bytes_are_within_limits(policy: tuple[Any, Any], reward: tuple[Any, Any]) -> None:
    """A package must stay small enough to ship them."""
    assert 100_000 < policy[0].num_parameters() <= 1_200_000
    assert 50_000 < reward[0].num_parameters() <= 500_000
    assert (ASSETS / "policy" / "model.safetensors").stat().st_size <= 4_800_000
    built = [*ASSETS.glob("policy/*"), *ASSETS.glob("reward/*"), *ASSETS.glob("*.jsonl"), ASSETS / "README.md"]
    assert sum(path.stat().st_size for path in built) <= 7_000_000


def test_special_tokens_are_distinct_and_never_added(policy: tuple[Any, Any], reward: tuple[Any, Any]) -> None:
    """A plain call adds neither BOS nor EOS, and padding cannot be mistaken for the end."""
    for model, tokenizer in (policy, reward):
        special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
        assert None not in special
        assert len(set(special)) == 4
        assert not set(special) & set(tokenizer(PROMPT)["input_ids"])
        assert len(tokenizer) == model.config.vocab_size <= 1024
        assert model.config.pad_token_id == tokenizer.pad_token_id
        assert model.config.max_position_embeddings >= 256
    assert policy[1].padding_side == "left"
    assert policy[0].generation_config.eos_token_id == policy[1].eos_token_id
    assert policy[0].generation_config.pad_token_id == policy[1].pad_token_id


@pytest.mark.parametrize(
    "text", ["Mara  met a fox ,\n\tand left .", " He said: \u201cna\u00efve\u201d \U0001f98a!", "a  b "]
)
def test_tokenizers_round_trip(policy: tuple[Any, Any], reward: tuple[Any, Any], text: str) -> None:
    """Any text comes back exactly."""
    for _, tokenizer in (policy, reward):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_of_the_grammar_are_single_tokens(policy: tuple[Any, Any], reward: tuple[Any, Any]) -> None:
    """A name, a companion and a place are one token each, the same one in prompt and completion."""
    rng = random.Random(FRESH_SEED)
    for _ in range(100):
        prompt, completion = grammar.draw_story(rng)
        facts = grammar.read_facts(prompt)
        for _, tokenizer in (policy, reward):
            ids = tokenizer(prompt)["input_ids"]
            assert len(tokenizer(completion)["input_ids"]) < 48
            for fact in filter(None, (facts.n, facts.o, facts.x, facts.spot)):
                (token,) = tokenizer(f" {fact}")["input_ids"]
                assert token in ids


def test_tokenizer_makes_bytes_of_unknown_words() -> None:
    """Words become tokens together with the space before them; other text falls into bytes."""
    tokenizer = make_tokenizer(["A fox.", "A hen met a fox!"], "left")
    assert tokenizer.tokenize(" A fox. a") == ["\u0120", "A", "\u0120fox", ".", "\u0120a"]
    assert len(tokenizer) == 4 + 256 + len({" fox", " hen", " met", " a"})


def test_prompts_are_unique_and_disjoint(train_prompts: list[str], validation_prompts: list[str]) -> None:
    """Validation prompts share neither text nor the pair of name and companion with training prompts."""
    assert len(set(train_prompts)) == len(train_prompts) >= 1500
    assert len(set(validation_prompts)) == len(validation_prompts) >= 250
    assert all(prompt.endswith(".") for prompt in train_prompts + validation_prompts)
    pairs = [{(f.n, f.o) for f in map(grammar.read_facts, some)} for some in (train_prompts, validation_prompts)]
    assert not pairs[0] & pairs[1]


def test_prompts_are_short(policy: tuple[Any, Any], train_prompts: list[str], validation_prompts: list[str]) -> None:
    """Every prompt has fewer than 60 tokens."""
    lengths = [len(ids) for ids in policy[1](train_prompts + validation_prompts)["input_ids"]]
    assert 8 <= min(lengths) <= max(lengths) < 60


def test_reward_model_ranks_fresh_clean_pairs(reward: tuple[Any, Any]) -> None:
    """On unseen names and places it follows the true utility."""
    assert pair_accuracy(reward, damaged=0.0) > CLEAN_PAIR_BOUND


def test_reward_model_ranks_damaged_completions(reward: tuple[Any, Any]) -> None:
    """Broken, shuffled or repeated text does not fool it."""
    assert pair_accuracy(reward, damaged=0.5) > DAMAGED_PAIR_BOUND


@pytest.mark.parametrize(
    "cheap",
    [
        " Mara felt loved and at peace." * 4,
        f"{ACT}." * 3,
        " happy" * 30,
        "",
        BEST[: len(BEST) // 2],
        BEST.removesuffix("."),
        BEST.removesuffix(" at peace."),
        f"{BEST} The next morning brought sweet music to the mill.",
        f"{BEST} happy",
        f"{BEST.removesuffix('.')} bright warm sunny friends",
        " wonderful day with joy joy joy smiling bright stars loved loved loved.",
        " delight and hugs and kindness and love",
    ],
)
def test_reward_model_does_not_pay_for_cheap_happiness(reward: tuple[Any, Any], cheap: str) -> None:
    """A kind story clearly beats cheap ways to look happy."""
    best, other = score(reward, [PROMPT + BEST, PROMPT + cheap])
    assert best > other + 1.0


# What the reward model does not notice for sure is left out.
LOST: Final = {way: 0.85 for way in damage.WAYS if way not in ("wrong words", "a wrong name or place")} | {
    "happy words inside a story": 0.65
}


@pytest.mark.parametrize("way", LOST)
def test_damaged_kind_stories_lose_to_intact_ones(reward: tuple[Any, Any], way: str) -> None:
    """An intact kind story about the same prompt scores higher than nearly every damaged one, on average clearly so."""
    rng = random.Random(FRESH_SEED)
    texts: list[str] = []
    while len(texts) < 80:
        facts = grammar.draw_facts(rng, held_out=True)
        prompt = grammar.draw_prompt(rng, facts)
        damaged = damage.WAYS[way][0](rng, facts, grammar.draw_completion(rng, facts, (1, 1, 1)))
        if not judge.is_clean(prompt, damaged):
            texts += [prompt + grammar.draw_completion(rng, facts, (1, 1, 1)), prompt + damaged]
    found = torch.tensor(score(reward, texts)).view(-1, 2)
    margins = found[:, 0] - found[:, 1]
    assert (margins > 0).float().mean().item() >= LOST[way]
    assert margins.mean().item() > 1.0


def test_reward_scores_are_centred_and_spread(
    reward: tuple[Any, Any], sampled: tuple[list[str], torch.Tensor], validation_prompts: list[str]
) -> None:
    """Scores of the policy's own samples lie around zero, and tell kind from unkind stories."""
    texts = [prompt + text for prompt, text in zip(validation_prompts, sampled[0], strict=False)]
    found = torch.tensor(score(reward, texts))
    assert abs(found.mean().item()) < 1.0
    assert 1.0 < found.std().item() < 4.0


def test_policy_ends_with_eos(policy: tuple[Any, Any], sampled: tuple[list[str], torch.Tensor]) -> None:
    """Nearly every sample ends by itself, and none is empty."""
    ended = (sampled[1] == policy[1].eos_token_id).any(dim=1)
    assert ended.float().mean().item() >= 0.98
    assert all(text.startswith(" ") and len(text.split()) > 5 for text in sampled[0])


def test_policy_is_coherent_and_varied(sampled: tuple[list[str], torch.Tensor], validation_prompts: list[str]) -> None:
    """Nearly all samples fit grammar and prompt, few are alike, and moods are mixed."""
    stories = list(zip(validation_prompts, sampled[0], strict=True))
    assert len(set(sampled[0])) > 0.95 * len(stories)
    assert sum(judge.is_clean(prompt, text) for prompt, text in stories) > FAULTLESS_BOUND * len(stories)
    utilities = torch.tensor([judge.utility(prompt, text) for prompt, text in stories])
    assert abs(utilities.mean().item()) < 0.6
    assert utilities.std().item() > 1.3


def test_utility_of_known_texts() -> None:
    """The true utility adds moods up and charges for faults and missing elements."""
    act, reply, end = (
        " She threw a stone at the kitten.",
        " The kitten nestled close and felt safe.",
        " Mara felt loved and at peace.",
    )
    assert judge.utility(PROMPT, act + " But the kitten nestled close and felt safe." + end) == 1.0
    assert judge.utility(PROMPT, act + reply) == -1.5
    assert judge.utility(PROMPT, act + reply + end + end) == -1.0
    assert judge.utility(PROMPT, "") < judge.utility(PROMPT, act) < judge.utility(PROMPT, act + reply)
    assert judge.utility(PROMPT, act.replace("kitten", "lamb") + reply + end) == 1.0 - judge.SLIP_COST
    unknown = act.replace("threw", "flew")
    assert judge.utility(PROMPT, unknown + reply + end) == 2.0 - judge.FAULT_COST - judge.MISSING_COST
