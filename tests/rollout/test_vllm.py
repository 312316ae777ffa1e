"""Completions by a vLLM server, against a stand-in that speaks its protocol: what is asked, and what comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, prompts_of
from vllm_rollouts import ROWS, Engine, Serve, begun, both, uniforms, worst_gap

from xpo_lightning.rollout.engine import GenerationRequest


def test_request_has_every_setting_so_that_the_server_fills_no_gap(serve_vllm: Serve, engine: Engine) -> None:
    server = serve_vllm()
    sampling = {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "stop_strings": ["ab"]}
    rollout = begun(engine(server), eos=[7, 9], **sampling)
    rollout._vocabulary = 304
    rollout.write(prompts_of([[3, 4, 5]]), [GenerationRequest("reference", [torch.tensor([[0.25] + [0.9] * 5])])])
    assert server.asked("/v1/completions") == [
        {
            "model": server.folder,
            "prompt": [3, 4, 5],
            "seed": 2**30,  # a quarter of 2**32
            "max_tokens": 6,
            "min_tokens": 0,
            "temperature": 0.7,
            "top_k": 5,
            "top_p": 1.0,
            "min_p": 0.1,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": ["ab"],
            "stop_token_ids": [7, 9],
            "ignore_eos": True,
            "skip_special_tokens": False,
            "watermarking": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
    ]


def test_token_ids_come_back_as_they_were_written(serve_vllm: Serve, engine: Engine, policy: Any) -> None:
    server = serve_vllm()
    rollout = begun(engine(server), policy)
    written = both(rollout)
    asked = server.asked("/v1/completions")
    assert sorted(payload["prompt"] for payload in asked) == sorted(ROWS + ROWS)
    tokenizer = make_tokenizer()
    changed = 0
    for completions in written:
        for ids, mask, text in zip(completions.ids, completions.mask, completions.texts, strict=True):
            row = ids[mask].tolist()
            assert text == tokenizer.decode(row, skip_special_tokens=True)
            changed += tokenizer(text, add_special_tokens=False)["input_ids"] != row
        assert completions.lengths.tolist() == [6] * len(ROWS)
        assert not completions.ended.any()
    assert changed > 0  # Tokenizing the texts anew would have given other ids.


def test_each_side_is_written_by_its_own_weights(serve_vllm: Serve, engine: Engine, policy: Any) -> None:
    rollout = begun(engine(serve_vllm()), policy)
    by_policy, by_reference = both(rollout)
    assert worst_gap(policy, by_policy) < 1e-4
    with policy.disable_adapter():
        assert worst_gap(policy, by_reference) < 1e-4
        assert worst_gap(policy, by_policy) > 0.1


def test_server_follows_the_policy_when_it_changes(
    serve_vllm: Serve, engine: Engine, policy: Any, tmp_path: Path
) -> None:
    server = serve_vllm()
    rollout = begun(engine(server), policy)
    rollout.sync(policy)
    assert len(server.asked("/v1/load_lora_adapter")) == 1  # Nothing had changed.
    first = both(rollout)
    with torch.no_grad():  # The last of its numbers alone.
        [weight for name, weight in policy.named_parameters() if "lora_B" in name][-1].view(-1)[-1] += 3
    rollout.sync(policy)
    second = both(rollout)
    assert worst_gap(policy, second[0]) < 1e-4
    assert worst_gap(policy, first[0]) > 1e-3
    assert torch.equal(first[1].ids, second[1].ids)
    names = [load["lora_name"] for load in server.asked("/v1/load_lora_adapter")]
    assert len(set(names)) == 2
    assert list(server.adapters) == names[1:]
    assert [folder.name for folder in (tmp_path / "adapters").iterdir()] == names[1:]
    rollout.close()
    assert not server.adapters
    assert not list((tmp_path / "adapters").iterdir())


def test_asking_again_gives_the_same_samples_and_no_row_depends_on_those_beside(
    serve_vllm: Serve, engine: Engine, policy: Any
) -> None:
    rollout = begun(engine(serve_vllm()), policy)
    first, again = both(rollout), both(rollout)
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(first, again, strict=True))
    (alone,) = rollout.write(prompts_of(ROWS[2:3]), [GenerationRequest("policy", [uniforms(0)[2:3]])])
    assert torch.equal(alone[0].ids, first[0].select([2]).ids)
    (other,) = rollout.write(prompts_of(ROWS), [GenerationRequest("policy", [uniforms(5)])])
    assert not torch.equal(other[0].ids, first[0].ids)


def test_completion_ends_at_eos_or_at_a_stop_string(serve_vllm: Serve, engine: Engine, load_model: Any) -> None:
    rollout = begun(engine(serve_vllm()))
    rollout._vocabulary = 304
    (whole,) = rollout.write(prompts_of(ROWS), [GenerationRequest("reference", [uniforms()])])
    eos = int(whole[0].ids[0, 2])
    (ended,) = begun(rollout, eos=[eos]).write(prompts_of(ROWS), [GenerationRequest("reference", [uniforms()])])
    cut = whole[0].ids[0].tolist().index(eos) + 1
    assert ended[0].ids[0][ended[0].mask[0]].tolist() == whole[0].ids[0, :cut].tolist()
    assert bool(ended[0].ended[0])
    tokenizer = make_tokenizer()
    kept = whole[0].ids[1].tolist()
    stop = tokenizer.decode(kept[3:5])
    (stopped,) = begun(rollout, stop_strings=[stop]).write(
        prompts_of(ROWS), [GenerationRequest("reference", [uniforms()])]
    )
    assert bool(stopped[0].ended[1])
    assert stopped[0].texts[1] == tokenizer.decode(kept, skip_special_tokens=True).partition(stop)[0]
    assert stop in tokenizer.decode(stopped[0].ids[1][stopped[0].mask[1]])


@pytest.mark.parametrize("together", [True, False])
def test_models_write_together_or_one_after_the_other(
    serve_vllm: Serve, engine: Engine, policy: Any, together: bool
) -> None:
    server = serve_vllm()
    both(begun(engine(server, together=together), policy))
    assert any(len(names) == 2 for names in server.together) is together
