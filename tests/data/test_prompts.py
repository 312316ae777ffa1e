"""How prompts become token ids, and what a batch from somebody else's loader must hold."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from transformers import PreTrainedTokenizerFast

from xpo_lightning import InputError, LoadedModel
from xpo_lightning.data.prompts import PromptTokenizer, as_prompts

USER = {"role": "user", "content": "the cat"}
CPU = torch.device("cpu")


def encoder(kind: str = "distinct", limit: int | None = None) -> PromptTokenizer:
    return PromptTokenizer(make_tokenizer(kind), limit)


def test_text_is_tokenized_as_the_tokenizer_does_by_default():
    """One tokenizer puts BOS first, the other adds nothing; neither is second-guessed."""
    for kind in ("distinct", "no_pad"):
        assert encoder(kind)("the cat") == make_tokenizer(kind)("the cat")["input_ids"]


def test_an_eos_that_the_tokenizer_appends_is_taken_off_and_one_in_the_text_is_kept():
    tokenizer = make_tokenizer()
    from tokenizers.processors import TemplateProcessing

    ends = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ends
    bare = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert PromptTokenizer(tokenizer)("the cat") == bare
    assert PromptTokenizer(tokenizer)("the cat<eos>")[-1] == tokenizer.eos_token_id


def test_conversation_goes_through_the_template_and_asks_for_an_answer():
    tokenizer = make_tokenizer("chat")
    expected = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encoder("chat")([USER])) == expected


def test_conversation_that_ends_with_the_assistant_is_continued():
    text = make_tokenizer("chat").decode(encoder("chat")([USER, {"role": "assistant", "content": "red"}]))
    assert text.endswith("assistant\nred")


def test_template_that_refuses_names_the_row():
    tokenizer = make_tokenizer("chat")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"x\.jsonl, line 3: .*roles must alternate"):
        PromptTokenizer(tokenizer)([USER], "x.jsonl, line 3")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"text": ["a"]}, "needs the key 'prompt'"),
        ("the cat", "must be a list"),
        ({"prompt": "the cat"}, "'prompt' of a batch must be a list"),
        ({"prompt": ["the cat"], "source": "tldr"}, "'source' of a batch must be a list"),
        ({"prompt": ["the cat", "red"], "source": ["tldr"]}, "'source' of a batch has 1 entries for 2 prompts"),
        ({"prompt": ["the cat"], "prompt_ids": [[]]}, "prompt 1 of a batch has no tokens"),
        ({"prompt": ["a", "b"], "prompt_ids": [[1], [1] * 9]}, "prompt 2 of a batch: .*9 tokens"),
        ({"prompt": ["a", None]}, "prompt 2 of a batch: the prompt is null"),
        ({"prompt": ["the cat " * 20]}, "prompt 1 of a batch: .*context"),
        ([], "a batch has no prompts"),
        ({"prompt": ["a", "b"], "prompt_ids": [[1, 2], [304]]}, "prompt 2 of a batch has the token 304 .*embeds 304"),
        ({"prompt": ["a"], "prompt_ids": [[1, -1]]}, "prompt 1 of a batch has the token -1"),
    ],
)
def test_batch_that_is_malformed_is_refused(batch: Any, expected: str):
    with pytest.raises(InputError, match=expected):
        as_prompts(batch, replace(encoder(limit=8), embedded=304), CPU)


def test_module_knows_how_many_tokens_its_model_embeds(make_module: Any):
    assert make_module().prompt_encoder.embedded == 304


def test_batch_keeps_given_ids_and_columns():
    prompts = as_prompts({"prompt": ["a", "b"], "prompt_ids": [[5], [6, 7]], "source": ["x", "y"]}, encoder(), CPU)
    assert prompts.ids.tolist() == [[0, 5], [6, 7]]
    assert prompts.mask.tolist() == [[False, True], [True, True]]
    assert prompts.columns == {"source": ("x", "y")}


def test_policy_that_has_adapters_already_is_refused(
    make_module: Any, load_model: Any, tokenizer: PreTrainedTokenizerFast
):
    """Its reference would be the base model without them, and not the policy before training."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="has adapters already"):
        make_module(policy=LoadedModel(model, tokenizer)).configure_model()
