"""Generates completions on a vLLM server, over HTTP: its base model is the reference, with an adapter the policy."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.core.distributed import all_gather_guarded, own_rank, world_size
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import RequestError
from xpo_lightning.rollout.engine import GenerationRequest, RolloutEngine, Writer
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.vllm.client import VLLMServer
from xpo_lightning.rollout.vllm.lora_sync import AdapterFolder, ServedAdapter, mark_of
from xpo_lightning.rollout.vllm.protocol import (
    OPTIONS,
    Answer,
    BaseModel,
    chosen_model,
    read_answer,
    read_models,
    read_version,
    sampling_fields,
    seeds_of,
)

_COMPLETIONS = "/v1/completions"


class VLLMRollout(RolloutEngine):
    """Generates completions on a vLLM server that holds the base model; needs `model.lora`.

    The server's base model is the reference. The policy is a LoRA adapter of it, which the run saves to
    `adapter_folder` and has the server load whenever the policy has changed. Start the server with `--enable-lora`,
    `--max-lora-rank` at least `model.lora.r`, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment; it must see
    `adapter_folder` under the same path. `docs/vllm.md` shows how.

    The run sends prompts and receives completions as token ids. `model.rollout_batch_size` then limits how many prompts
    are scored together in this process. All processes of a run share one server.

    Args:
        url: URL of the server, such as http://localhost:8000. Messages show it: put no secret there.
        adapter_folder: Folder for the policy's adapter.
        model: Name of the base model on the server; null takes the only one that it has.
        api_key_env: Name of the environment variable that holds the API key; null sends none.
        timeout: How many seconds one completion may take, its time in the server's queue included.
        retries: How often a request is retried when the server cannot be reached, is too slow or too busy, or answers
            with a server error or something unusable. 8 retries, two minutes of waiting, let a server restart;
            requests for the server's version and models are retried at most 3 times.
        backoff: Seconds before the first retry; each later wait is twice as long, up to 30 seconds.
        concurrency: Maximum number of completions in flight, for each process of the run.
        together: Whether to request the completions of both models at the same time. A server on a CPU needs false, and
            one process: there, vLLM 0.32 applies the adapter also to completions of the reference in the same batch. A
            server that does so is refused.
        max_logp_drift: Largest allowed difference, in nats per token, between the server's log-probabilities and those
            computed here; a larger one means that the server has other weights, and ends the run. null compares without
            a limit.

    Raises:
        InputError: An option is invalid.
    """

    needs_adapters = True

    def __init__(
        self,
        url: str,
        adapter_folder: str,
        model: str | None = None,
        api_key_env: str | None = None,
        timeout: float = 600.0,
        retries: int = 8,
        backoff: float = 1.0,
        concurrency: int = 256,
        together: bool = True,
        max_logp_drift: float | None = 0.5,
    ) -> None:
        super().__init__(max_logp_drift)
        self.server = VLLMServer(url, api_key_env, timeout, retries, backoff, concurrency)
        self.model, self.together = model, together
        self._served = ServedAdapter(self.server, AdapterFolder(adapter_folder))
        self._base: BaseModel | None = None
        self._adapter: str | None = None
        self._mark, self._vocabulary, self._tried = "", 0, False

    def context_length(self) -> int | None:
        """See `RolloutEngine.context_length`."""
        return self._base_model().context

    def begin(self, rollout: LocalRollout) -> None:
        """See `RolloutEngine.begin`."""
        super().begin(rollout)
        self._fields = sampling_fields(rollout.sampling, rollout.eos_token_ids)

    def sync(self, policy: nn.Module) -> None:
        """See `RolloutEngine.sync`; rank 0 has the server load the adapter, and the other ranks wait for its name."""
        mark = mark_of(policy)
        if mark == self._mark:
            return
        processes = world_size()
        if not self.together and processes > 1:
            raise InputError(
                f"{OPTIONS}.together=false has one model write at a time, and the {processes} processes of this run "
                f"would have several; set trainer.devices to 1, or use a server that can do both"
            )
        self._vocabulary = policy.get_input_embeddings().num_embeddings  # type: ignore[operator]
        name = None
        if own_rank() == 0:
            if self.together and not self._tried:
                self._served.try_beside(policy, self._base_model(), self._posted, self.check)
            name, self._tried = self._served.replace(policy, self._adapter, self.check), True
        self._adapter, self._mark = all_gather_guarded(name)[0], mark

    def write(self, prompts: Prompts, asked: Sequence[GenerationRequest]) -> list[list[Completions]]:
        """See `RolloutEngine.write`; send one request per completion, because a seed applies to a request."""
        ids, mask = prompts.ids.cpu(), prompts.mask.cpu()
        self.measured = {}
        rows: list[list[int]] = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        lots = [(self._name(each.who), numbers) for each in asked for numbers in each.uniforms]
        payloads = [
            {**self._fields, "model": name, "prompt": row, "seed": seed}
            for name, numbers in lots
            for row, seed in zip(rows, seeds_of(numbers), strict=True)
        ]
        answers = self._answers(payloads)
        lists = [answers[start : start + len(rows)] for start in range(0, len(answers), len(rows))]
        written = iter([self._completions(some, prompts) for some in lists])
        return [[next(written) for _ in each.uniforms] for each in asked]

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        if self._adapter is not None and own_rank() == 0:
            self._served.forget(self._adapter)
        self._adapter, self._mark = None, ""

    def advice(self, who: Writer) -> str:
        """See `RolloutEngine.advice`."""
        base = self._base_model().name
        return (
            f"check that {base!r} on the vLLM server at {self.server.url} is the model of model.policy in a similar "
            f"precision, and that the server was not started with another --logprobs-mode than raw_logprobs"
        )

    def _base_model(self) -> BaseModel:
        """Return the server's base model; at first use, check the server's version and list its models."""
        if self._base is None:
            self.server.look("/version", read_version, self.check)
            models = self.server.look("/v1/models", read_models, self.check)
            self._base = chosen_model(models, self.model, self.server.url)
        return self._base

    def _name(self, who: Writer) -> str:
        if who == "reference":
            return self._base_model().name
        if self._adapter is None:
            raise RuntimeError("the engine was asked to write before it had the policy's weights")
        return self._adapter

    def _answers(self, payloads: list[dict[str, Any]]) -> list[Answer]:
        """Request completions: all at once, or without `together` those of one model after the other's."""
        answers: dict[int, Answer] = {}
        for name in [None] if self.together else dict.fromkeys(payload["model"] for payload in payloads):
            rows = [row for row, payload in enumerate(payloads) if name in (None, payload["model"])]
            asked = [payloads[row] for row in rows]
            answers.update(zip(rows, self._posted(asked), strict=True))
        for row, payload in enumerate(payloads):
            self._check_answer(payload, answers[row])
        return [answers[row] for row in range(len(payloads))]

    def _posted(self, payloads: list[dict[str, Any]]) -> list[Answer]:
        adapter = self._adapter
        try:
            return self.server.post(_COMPLETIONS, payloads, read_answer, self.check)
        except RequestError as error:
            if error.status != 404 or adapter is None or adapter not in {payload["model"] for payload in payloads}:
                raise
        # The server has restarted, perhaps with another model: each process that notices checks it and loads the
        # adapter again.
        self._base = None
        self._base_model()
        self._served.load(adapter, self.check)
        return self.server.post(_COMPLETIONS, payloads, read_answer, self.check)

    def _check_answer(self, payload: dict[str, Any], answer: Answer) -> None:
        """Refuse a completion of another prompt, by another model or under other settings."""
        sampling, ends = self.rollout.sampling, self.rollout.eos_token_ids
        said = f"{OPTIONS}.url: the vLLM server at {self.server.url}"
        highest = max(answer.ids)
        if answer.prompt != payload["prompt"]:
            raise InputError(f"{said} has read other prompt tokens than it was sent; start it without truncation")
        if answer.model != payload["model"]:
            raise InputError(f"{said} had {answer.model!r:.100} write in place of {payload['model']!r}")
        if highest >= self._vocabulary:
            raise InputError(
                f"{said} wrote token {highest}, and model.policy has {self._vocabulary}; {self.advice('policy')}"
            )
        if answer.reason == "length" and len(answer.ids) != sampling.max_new_tokens:
            raise InputError(
                f"{said} cut a completion after {len(answer.ids)} tokens, and model.sampling.max_new_tokens is "
                f"{sampling.max_new_tokens}; start it with --max-model-len as large as the model's context"
            )
        if answer.reason == "stop" and answer.stopped_by is None and answer.ids[-1] not in ends:
            raise InputError(
                f"{said} ended a completion with token {answer.ids[-1]}, which is not among {list(ends)}; name it in "
                f"model.sampling.eos_token_ids, or start the server with --generation-config vllm"
            )

    def _completions(self, answers: Sequence[Answer], prompts: Prompts) -> Completions:
        ids, logps = ([getattr(answer, name) for answer in answers] for name in ("ids", "logps"))
        return self.completions(ids, logps, prompts, [answer.stopped_by is not None for answer in answers])
