"""Generates completions on vLLM servers, over HTTP, with the policy as an adapter or with all of its weights."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.core.distributed import all_gather_guarded, own_rank, world_size
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.http.client import RequestError
from xpo_lightning.rollout.engine import GenerationRequest, RolloutEngine, Writer
from xpo_lightning.rollout.local import LocalRollout
from xpo_lightning.rollout.vllm.client import Check, VLLMServer
from xpo_lightning.rollout.vllm.direct import Backend, DirectTransfer
from xpo_lightning.rollout.vllm.lora_sync import AdapterTransfer
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
from xpo_lightning.rollout.vllm.servers import ServerPool, run_together
from xpo_lightning.rollout.vllm.transfer import PolicyTransfer
from xpo_lightning.rollout.vllm.weights import SHARED_MEMORY, SavedWeightsTransfer

Request = tuple[Writer, dict[str, Any]]
"""Who is to write a completion, and the request without the model's name."""
_COMPLETIONS = "/v1/completions"
_MOST_REPEATS = 10  # of a batch that a server wrote with other weights, because it was started anew meanwhile


class VLLMRollout(RolloutEngine):
    """Generates completions on a vLLM server.

    With `weights: adapter` the server's base model is the reference, and the policy is a LoRA adapter of it
    (`model.lora`), which the run saves to `adapter_folder` and has the server load whenever the policy has changed.
    Start the server with `--enable-lora`, `--max-lora-rank` at least `model.lora.r`, and
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment.

    With `weights: full` the policy takes the place of the server's model, with all of its weights, which go through
    `weights_folder`. The reference is then on the server at `reference_url`, or writes in this process. Start the
    policy's server with VLLM_SERVER_DEV_MODE=1 in its environment.

    The server must see the folder under the same path. `docs/vllm.md` shows how, and `xpo serve` prints the commands.

    The run sends prompts and receives completions as token ids. `model.rollout_batch_size` then limits how many prompts
    are scored together in this process. All processes of a run share the servers.

    Args:
        url: URL of the server, such as http://localhost:8000, or a list, over whose servers the requests are spread.
            One that fails is left out, and its requests go to the others until it answers again. Messages show a URL:
            put no secret there.
        adapter_folder: Folder for the policy's adapter; with `weights: full` it is not needed.
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
        weights: What of the policy is sent: its `adapter`, or its weights in `full`.
        weights_folder: Folder for the policy's weights with `weights: full`, which needs room for them; null is
            /dev/shm, the machine's shared memory.
        reference_url: URL of a server that has the reference, with `weights: full`, or a list of them; null has the
            reference write in this process.
        sync_every: How many training batches the server writes with the same weights: they are sent before the first of
            them. 1 sends the weights before each batch.
        ahead: 1 has the server write the next batch while the policy is trained on this one, with the weights from
            before; 0 has it wait.
        colocate: Whether the server is on the GPU of this run, which then has one process: it sleeps, with its weights
            in main memory and no keys and values, except while it writes.
        weights_backend: How the weights go with `weights: full`: through a `folder`, or by vLLM's own transfer, with
            `nccl` between GPUs or CUDA `ipc` on the same one, which needs vLLM in this environment too and has not been
            tried on GPUs.

    Raises:
        InputError: An option is invalid.
    """

    copies_weights = True

    def __init__(
        self,
        url: str | list[str],
        adapter_folder: str | None = None,
        model: str | None = None,
        api_key_env: str | None = None,
        timeout: float = 600.0,
        retries: int = 8,
        backoff: float = 1.0,
        concurrency: int = 256,
        together: bool = True,
        max_logp_drift: float | None = 0.5,
        weights: Literal["adapter", "full"] = "adapter",
        weights_folder: str | None = None,
        reference_url: str | list[str] | None = None,
        sync_every: int = 1,
        ahead: int = 0,
        colocate: bool = False,
        weights_backend: Literal["folder", "nccl", "ipc"] = "folder",
    ) -> None:
        super().__init__(max_logp_drift, sync_every, ahead)
        if colocate and ahead:
            raise InputError(
                f"{OPTIONS}.ahead=1 has the server write while the policy is trained, and {OPTIONS}.colocate has it "
                f"sleep then; set one of the two"
            )
        self.colocate, self._sleeps = colocate, False
        is_adapter = weights == "adapter"
        self.needs_adapters = self.takes_adapters = is_adapter
        self.has_reference = is_adapter or reference_url is not None
        self.model, self.together = model, together
        self.weights_backend = weights_backend
        backend = None if weights_backend == "folder" else weights_backend
        of_weights = {"weights_folder": weights_folder, "reference_url": reference_url, "weights_backend": backend}
        _refuse_of_the_other_way(is_adapter, of_weights, {"adapter_folder": adapter_folder})
        if backend is not None and (sync_every > 1 or ahead):
            raise InputError(
                f"{OPTIONS}.weights_backend={backend} sends the policy as it is, and keeps nothing; "
                f"sync_every={sync_every} and ahead={ahead} have the server write with earlier weights, so set it to "
                f"folder, or leave them out"
            )
        if is_adapter:
            self._transfer: PolicyTransfer = _adapter_transfer(adapter_folder, together)
        elif backend is not None:
            self._transfer = _direct_transfer(backend, weights_folder, timeout)
        else:
            self._transfer = _saved_transfer(weights_folder)
        options = (api_key_env, timeout, retries, backoff, concurrency)
        self.servers = self.reference_servers = ServerPool(_listed(url), *options)
        if reference_url is not None:
            self.reference_servers = ServerPool(_listed(reference_url), *options, key=f"{OPTIONS}.reference_url")
            _refuse_shared(self.servers, self.reference_servers)
        self._bases: dict[VLLMServer, BaseModel] = {}
        self._policy: str | None = None
        self._mark, self._vocabulary, self._tried = "", 0, False

    def context_length(self) -> int | None:
        """See `RolloutEngine.context_length`."""
        servers = {*self.servers.servers, *self.reference_servers.servers}
        lengths = [self._base_model(server, self.check).context for server in servers]
        return min((length for length in lengths if length is not None), default=None)

    def begin(self, rollout: LocalRollout) -> None:
        """See `RolloutEngine.begin`; with `colocate`, send the servers to sleep."""
        super().begin(rollout)
        self._sleep()
        self._fields = sampling_fields(rollout.sampling, rollout.eos_token_ids)

    def sync(self, policy: nn.Module) -> None:
        """See `RolloutEngine.sync`; rank 0 has the server load the weights, and the other ranks wait for their name."""
        mark = self._transfer.mark(policy)
        if mark == self._mark:
            return
        processes = world_size()
        if not self.together and processes > 1:
            raise InputError(
                f"{OPTIONS}.together=false has one model write at a time, and the {processes} processes of this run "
                f"would have several; set trainer.devices to 1, or use a server that can do both"
            )
        if self.colocate and processes > 1:
            raise InputError(
                f"{OPTIONS}.colocate has the server sleep while one process trains, and the {processes} processes of "
                f"this run do not write at the same time; set trainer.devices to 1"
            )
        if self.weights_backend != "folder" and processes > 1:
            raise InputError(
                f"{OPTIONS}.weights_backend={self.weights_backend} sends the policy from one process, and this run has "
                f"{processes}; set trainer.devices to 1, or weights_backend to folder"
            )
        self._wake()
        self._vocabulary = policy.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if own_rank() == 0:
            self._policy = all_gather_guarded(self._replace(policy))[0]
        else:
            self._policy = self._transfer.follow(policy)
        self._mark = mark

    def write(self, prompts: Prompts, asked: Sequence[GenerationRequest]) -> list[list[Completions]]:
        """See `RolloutEngine.write`; send one request per completion, because a seed applies to a request."""
        ids, mask = prompts.ids.cpu(), prompts.mask.cpu()
        self.servers.take_back()
        self.reference_servers.take_back()
        self._wake()
        rows: list[list[int]] = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        lots = [(each.who, numbers) for each in asked for numbers in each.uniforms]
        requests = [
            (who, {**self._fields, "prompt": row, "seed": seed})
            for who, numbers in lots
            for row, seed in zip(rows, seeds_of(numbers), strict=True)
        ]
        answers = self._answers(requests)
        self._sleep()
        lists = [answers[start : start + len(rows)] for start in range(0, len(answers), len(rows))]
        written = iter([self._completions(some, prompts) for some in lists])
        return [[next(written) for _ in each.uniforms] for each in asked]

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        if self._policy is not None and own_rank() == 0:
            self._forget(self._policy)
        self._policy, self._mark = None, ""

    def _sleep(self) -> None:
        if self.colocate and not self._sleeps:
            self._tell_all("/sleep")
            self._sleeps = True

    def _wake(self) -> None:
        if self._sleeps:
            self._tell_all("/wake_up")
            self._sleeps = False

    def _tell_all(self, path: str) -> None:
        """Post to a path of all living servers, which have it if they can sleep."""

        def tell(server: VLLMServer, check: Check) -> None:
            server.post(path, [{}], lambda _: None, check)

        try:
            for pool in dict.fromkeys((self.servers, self.reference_servers)):
                pool.on_each(tell, self.check)
        except RequestError as error:
            raise InputError(
                f"{error}; {OPTIONS}.colocate needs a server on a GPU that was started with --enable-sleep-mode, and "
                f"VLLM_SERVER_DEV_MODE=1 in its environment"
            ) from None

    def advice(self, who: Writer) -> str:
        """See `RolloutEngine.advice`."""
        servers = self.servers if who == "policy" else self.reference_servers
        base = self._base_model(servers.servers[0], self.check).name
        return (
            f"check that {base!r} on the vLLM server at {servers.urls} is the model of model.policy in a similar "
            f"precision, and that the server was not started with another --logprobs-mode than raw_logprobs"
        )

    def _base_model(self, server: VLLMServer, check: Check) -> BaseModel:
        """Return a server's base model; at first use, check the server's version and list its models."""
        if server not in self._bases:
            server.look("/version", partial(read_version, key=server.key), check)
            models = server.look("/v1/models", read_models, check)
            self._bases[server] = chosen_model(models, self.model, server.url)
        return self._bases[server]

    def _replace(self, policy: nn.Module) -> str:
        """Have the servers drop the weights that they have, and load the policy's current ones; return their name."""
        if not self._tried:
            for server in self.servers.living:
                base = self._base_model(server, self.check)
                self._transfer.try_out(server, policy, base, partial(self._post, server, check=self.check), self.check)
            self._tried = True
        old = self._policy
        if old is not None:
            self._transfer.remove(old)  # Before the new files are written, so that there need not be room for both.
        name = self._transfer.save(policy)
        try:
            self.servers.on_each(lambda server, check: self._transfer.load(server, name, check), self.check)
        except BaseException:
            self._transfer.remove(name)
            raise
        if old is not None:
            self._forget(old)
        return name

    def _forget(self, name: str) -> None:
        """Have the servers drop weights, and delete their files."""
        for server in self.servers.living:
            self._transfer.forget(server, name)
        self._transfer.remove(name)

    def _answers(self, requests: list[Request]) -> list[Answer]:
        """Request completions: all at once, or without `together` those of one model after the other's."""
        is_one = self.together and self.servers is self.reference_servers
        kinds: list[set[Writer]] = [{"policy", "reference"}] if is_one else [{"policy"}, {"reference"}]
        lots = [[row for row, (who, _) in enumerate(requests) if who in kind] for kind in kinds]
        pools = [self.servers, self.reference_servers]
        tasks = [
            partial(pool.spread, [requests[row] for row in lot], self._ask)
            for pool, lot in zip(pools, lots, strict=False)
            if lot
        ]
        turns = [tasks] if self.together else [[task] for task in tasks]
        answers: dict[int, Answer] = {}
        outcomes = [outcome for turn in turns for outcome in run_together(turn, self.check)]
        for lot, outcome in zip([lot for lot in lots if lot], outcomes, strict=True):
            if isinstance(outcome, RequestError):
                raise outcome
            answers.update(zip(lot, outcome, strict=True))
        return [answers[row] for row in range(len(requests))]

    def _ask(self, server: VLLMServer, requests: list[Request], check: Check) -> list[Answer]:
        """Request completions from one server, again if it was started anew before it had written them all."""
        base = self._base_model(server, check).name
        names = {"reference": base}
        if any(who == "policy" for who, _ in requests):
            if self._policy is None:
                raise RuntimeError("the engine was asked to write before it had the policy's weights")
            names["policy"] = self._transfer.served_name(base, self._policy)
        payloads = [{**payload, "model": names[who]} for who, payload in requests]
        for _ in range(_MOST_REPEATS):
            copy = self._copy(server, check) if "policy" in names else None
            answers = self._post(server, payloads, check)
            if copy is None or self._copy(server, check) == copy:
                break
        else:
            raise InputError(f"{server.key}: the vLLM server at {server.url} keeps losing the policy; see its log")
        for payload, answer in zip(payloads, answers, strict=True):
            self._check_answer(server, payload, answer)
        return answers

    def _copy(self, server: VLLMServer, check: Check) -> str:
        return self._transfer.ensure(server, str(self._policy), check)

    def _post(self, server: VLLMServer, payloads: list[dict[str, Any]], check: Check) -> list[Answer]:
        adapter = self._policy
        try:
            return server.post(_COMPLETIONS, payloads, read_answer, check)
        except RequestError as error:
            if error.status != 404 or adapter is None or adapter not in {payload["model"] for payload in payloads}:
                raise
        # The server has restarted, perhaps with another model: each process that notices checks it and loads the
        # adapter again.
        del self._bases[server]
        self._base_model(server, check)
        self._transfer.load(server, adapter, check)
        return server.post(_COMPLETIONS, payloads, read_answer, check)

    def _check_answer(self, server: VLLMServer, payload: dict[str, Any], answer: Answer) -> None:
        """Refuse a completion of another prompt, by another model or under other settings."""
        sampling, ends = self.rollout.sampling, self.rollout.eos_token_ids
        said = f"{server.key}: the vLLM server at {server.url}"
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


def _refuse_of_the_other_way(is_adapter: bool, of_weights: dict[str, Any], of_adapters: dict[str, Any]) -> None:
    way, other = ("adapter", "full") if is_adapter else ("full", "adapter")
    for name in (name for name, value in (of_weights if is_adapter else of_adapters).items() if value is not None):
        raise InputError(f"{OPTIONS}.{name} is for {OPTIONS}.weights={other}, and that is {way}; set one of the two")


def _adapter_transfer(folder: str | None, together: bool) -> AdapterTransfer:
    if folder is None:
        raise InputError(
            f"{OPTIONS}.adapter_folder is not set; give a folder that the server can read, or set {OPTIONS}.weights to "
            f"full"
        )
    return AdapterTransfer(folder, together=together)


def _direct_transfer(backend: Backend, folder: str | None, timeout: float) -> DirectTransfer:
    if folder is not None:
        raise InputError(
            f"{OPTIONS}.weights_folder is for {OPTIONS}.weights_backend=folder, and that is {backend}; set one of the "
            f"two"
        )
    return DirectTransfer(backend, timeout)


def _saved_transfer(folder: str | None) -> SavedWeightsTransfer:
    if folder is None and not Path(SHARED_MEMORY).is_dir():
        raise InputError(f"{OPTIONS}.weights_folder must be set, as this machine has no {SHARED_MEMORY}")
    return SavedWeightsTransfer(SHARED_MEMORY if folder is None else folder)


def _listed(urls: str | list[str]) -> list[str]:
    return [urls] if isinstance(urls, str) else urls


def _refuse_shared(policy: ServerPool, reference: ServerPool) -> None:
    for url in {server.url for server in policy.servers} & {server.url for server in reference.servers}:
        raise InputError(
            f"{OPTIONS}.reference_url is {url}, which is in {OPTIONS}.url too: with weights=full the policy takes the "
            f"place of that server's model; name another server, or null to have the reference write in this process"
        )
