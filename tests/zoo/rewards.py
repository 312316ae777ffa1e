"""Every sequence classifier of transformers as a reward model, against each of its rows alone and unpadded."""

import tempfile
import zlib
from typing import Any

import torch
from conftest import make_tokenizer
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from xpo_lightning import InputError, SequenceClassifierReward
from zoo.compare import Outcome, describe
from zoo.families import LATENT, MARK, OVERRIDES, PAD, randomize, tiny_config

SCORES = 1e-4  # how far a score may be off
SENTENCE = "the cat sat on the mat and the dog ran away from the red hat today"
# Of 4 to 85 tokens: one row is longer than the context, and one is as long but for a few tokens.
PROMPTS = [SENTENCE, "and " + SENTENCE[:30], f"the {SENTENCE} {SENTENCE}"[:130], f"{SENTENCE} {SENTENCE} {SENTENCE}"]
PROMPTS += [SENTENCE[20:] + " " + SENTENCE, "the hat"]
COMPLETIONS = [[" a red cat ran", " the dog"], [" away", " on the red mat today and"], [" sat", " ran"]] * 2

OWN: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 64, "hidden_dim": 48},
    "esmc": LATENT,
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "lilt": {"hidden_size": 96},
    "longformer": {"attention_window": MARK},
    "markuplm": {"max_depth": 4},
    "mistral4": LATENT,
    "perceiver": {"d_latents": 32, "num_latents": MARK, "num_blocks": 1, "num_self_attends_per_block": 1},
    "t5": {"decoder_start_token_id": PAD},
    "luke": {"entity_vocab_size": 10},
    "t5gemma": {"decoder": {"bos_token_id": PAD, "pad_token_id": PAD}, "encoder": {"pad_token_id": PAD}},
    "t5gemma2": {"decoder": {"bos_token_id": PAD, "pad_token_id": PAD}},
    "xlm": {"causal": False},
}
"""What a classifier needs besides what its family needs."""

UNBUILDABLE = {
    "layoutlmv2": "its visual backbone needs the package detectron2",
    "mra": "its attention is a CUDA kernel, and without it a row's score does not depend on the row",
}
CLASSIFIERS = [name for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if name not in UNBUILDABLE]


def build_classifier(name: str) -> nn.Module:
    """Build the classifier of a family, the same each time, in eval mode."""
    torch.manual_seed(zlib.crc32(name.encode()))
    own = {"num_labels": 1, "pad_token_id": PAD, "eos_token_id": make_tokenizer().eos_token_id, **OWN.get(name, {})}
    if "is_decoder" in OVERRIDES.get(name, {}):
        own["is_decoder"] = False
    model = AutoModelForSequenceClassification.from_config(tiny_config(CONFIG_MAPPING[name], own))
    randomize(model)
    return model.eval()


def compare_reward(name: str) -> Outcome:
    """Score completions, two a prompt, and compare each score with that of its row alone."""
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    completions = [text for texts in COMPLETIONS for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        build_classifier(name).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        reward = SequenceClassifierReward(folder, append_eos=True)
        try:
            reward.load()
            scores = reward(prompts, completions, {})
        except InputError as error:
            return Outcome("CRASH" if "\n" in str(error) or " raised " in str(error) else "refused", message=str(error))
        except Exception as error:
            return Outcome("CRASH", message=describe(error))
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [reward.encoder(prompt + text, False, 0) for prompt, text in zip(prompts, completions, strict=True)]
    truth = torch.stack([score_alone(model, row) for row in rows])
    error = float((scores - truth).abs().max())
    return Outcome("right" if error <= SCORES else "WRONG", score=error, message=f"of a spread of {truth.std():.2f}")


@torch.no_grad()
def score_alone(model: nn.Module, row: list[int]) -> torch.Tensor:
    """Score one row, no token of which is padding."""
    if model.config.pad_token_id in row:
        raise ValueError(f"expected the pad id {model.config.pad_token_id} nowhere in the row")
    return model(input_ids=torch.tensor([row])).logits[0, 0]
