"""A stand-in for a vLLM server: its protocol as vLLM 0.32.0 speaks it, over a tiny model that really samples."""

import copy
import json
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
from transformers import MinPLogitsWarper as MinP
from transformers import RepetitionPenaltyLogitsProcessor as Penalty
from transformers import TemperatureLogitsWarper as Temperature
from transformers import TopKLogitsWarper as TopK
from transformers import TopPLogitsWarper as TopP

LOADING = threading.Lock()
"""Loading a model patches transformers for all threads; two that do so at once leave it patched."""


class ServerError(Exception):
    """An answer that is an error, worded as vLLM words it."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        error = {"message": message, "type": kind, "param": None, "code": status}
        self.status, self.body = status, {"error": error}


@dataclass(eq=False)
class Job:
    """A completion that is asked for."""

    payload: dict[str, Any]
    done: threading.Event = field(default_factory=threading.Event)
    choice: dict[str, Any] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "StandIn"

    def do_GET(self) -> None:
        self.handle_one(None)

    def do_POST(self) -> None:
        self.handle_one(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null"))

    def handle_one(self, payload: Any) -> None:
        server = self.server
        with server.lock:
            server.seen.append((self.path, payload))
            number = sum(path == self.path for path, _ in server.seen)
        self.key = self.headers.get("Authorization")
        try:
            if server.misbehave is not None and server.misbehave(self, number):
                return
            self.answer(200, server.serve(self.path, payload))
        except ServerError as error:
            self.answer(error.status, error.body)
        except OSError:  # the client has hung up
            self.close_connection = True

    def answer(self, status: int, value: Any) -> None:
        """Answer with JSON, or with text as it is."""
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class StandIn(ThreadingHTTPServer):
    """Serves a model folder, and adapters of it that it reads from disk.

    Args:
        folder: The model and its tokenizer.
        version: The version that it claims to be.
        context: Most tokens of prompt and completion.
        leaks: Let an adapter into what the base model writes beside it, as vLLM 0.32 does on a CPU.
        dev: Whether it was started with VLLM_SERVER_DEV_MODE=1, and so loads other weights when told.
        kept: Parts of the names of weights that it does not take over when it loads others.
        backend: That of --weight-transfer-config; None if it was started without.
        workers: How many processes it has.

    Attributes:
        seen: Path and payload of each request.
        misbehave: Called with each request and its number among those of its path; where it returns True, it has
            answered, or will not.
        broadcast: Weights on their way, of the transfer that a test puts in place of vLLM's.
        together: How often which models had completions under way at once.
    """

    request_queue_size = 256
    daemon_threads = True

    def __init__(
        self,
        folder: str,
        version: str = "0.32.0",
        context: int = 64,
        leaks: bool = False,
        dev: bool = False,
        kept: tuple[str, ...] = (),
        backend: str | None = None,
        workers: int = 1,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.version, self.context, self.leaks = folder, version, context, leaks
        self.dev, self.kept, self.backend, self.workers = dev, kept, backend, workers
        self.start_anew()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.misbehave: Callable[[Handler, int], bool] | None = None
        self.seen: list[tuple[str, Any]] = []
        self.together: Counter[frozenset[str]] = Counter()
        self.under_way: Counter[str] = Counter()
        self.lock, self.release = threading.Lock(), threading.Event()
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True).start()
        threading.Thread(target=self.work, daemon=True).start()

    def start_anew(self) -> None:
        """Forget what it was sent, as a server that was started again."""
        self.sleeps = False
        with LOADING:
            self.base = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.adapters: dict[str, nn.Module] = {}
        self.weight_version = "default"
        self.group: dict[str, Any] | None = None
        self.broadcast: dict[str, torch.Tensor] = {}
        self.computed: dict[tuple[str, tuple[int, ...]], nn.Module] = {}

    def handle_error(self, *_: Any) -> None:
        """Print nothing: clients hang up in the middle of what they ask."""

    def asked(self, path: str) -> list[Any]:
        return [payload for seen, payload in self.seen if seen == path]

    def stop(self) -> None:
        self.release.set()
        self.jobs.put(None)
        self.shutdown()
        self.server_close()

    def serve(self, path: str, payload: Any) -> Any:
        routes = {"/version": lambda _: {"version": self.version}, "/v1/models": self.models}
        routes |= {"/v1/load_lora_adapter": self.load, "/v1/unload_lora_adapter": self.unload}
        routes |= {"/v1/completions": self.complete}
        if self.dev:
            routes |= {"/collective_rpc": self.reload, "/reset_prefix_cache": self.reset}
            routes |= {"/update_weight_version": self.note, "/weight_info": self.info}
            routes |= {"/get_world_size": lambda _: {"world_size": self.workers}}
            routes |= {"/init_weight_transfer_engine": self.connect, "/update_weights": self.update}
            routes |= dict.fromkeys(["/start_weight_update", "/finish_weight_update"], lambda _: {})
            routes |= {"/sleep": self.sleep, "/wake_up": self.wake_up}
        if path not in routes:
            raise ServerError(404, "Not Found")
        return routes[path](payload)

    def models(self, _: Any) -> dict[str, Any]:
        cards = [{"id": self.folder, "object": "model", "parent": None, "max_model_len": self.context}]
        cards += [{"id": name, "parent": self.folder, "max_model_len": None} for name in self.adapters]
        return {"object": "list", "data": cards}

    def load(self, payload: Any) -> str:
        name, path = payload["lora_name"], payload["lora_path"]
        if name in self.adapters:
            raise ServerError(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not Path(path, "adapter_config.json").exists():
            raise ServerError(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        with LOADING:
            self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.base), path).eval()
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, payload: Any) -> str:
        if self.adapters.pop(payload["lora_name"], None) is None:
            raise ServerError(404, f"The lora adapter '{payload['lora_name']}' cannot be found.", "NotFoundError")
        return f"Success: LoRA adapter '{payload['lora_name']}' removed successfully."

    def reload(self, payload: Any) -> dict[str, Any]:
        path = payload["kwargs"]["weights_path"]
        if payload["method"] != "reload_weights" or not any(Path(path).glob("*.safetensors")):
            raise ServerError(500, f"Cannot find any model weights with `{path}`", "InternalServerError")
        if self.sleeps:
            raise ServerError(500, "EngineCore is sleeping", "InternalServerError")
        with LOADING:
            fresh = AutoModelForCausalLM.from_pretrained(path).eval()
        old = dict(self.base.named_parameters())
        with torch.no_grad():
            for name, weight in fresh.named_parameters():
                if any(part in name for part in self.kept):
                    weight.copy_(old[name])
        self.base = fresh
        return {"results": [None]}

    def connect(self, payload: Any) -> dict[str, Any]:
        if self.backend is None:
            raise ServerError(500, "Weight transfer is not configured", "InternalServerError")
        self.group = payload["init_info"]
        return {"message": "Weight transfer initialized"}

    def update(self, payload: Any) -> dict[str, Any]:
        """Take weights over as the test's transfer has them, which stands for a broadcast or shared memory."""
        if self.group is None:
            raise ServerError(500, "Weight transfer engine not initialized", "InternalServerError")
        fresh = copy.deepcopy(self.base)
        with torch.no_grad():
            for name, weight in fresh.named_parameters():
                if not any(part in name for part in self.kept):
                    weight.copy_(self.broadcast[name])
        self.base = fresh
        return {"message": "Weights updated"}

    def reset(self, _: Any) -> dict[str, Any]:
        self.computed.clear()
        return {"success": True}

    def note(self, payload: Any) -> dict[str, Any]:
        self.weight_version = payload["new_version"]
        return {"success": True, "new_version": self.weight_version}

    def info(self, _: Any) -> dict[str, Any]:
        return {"weight_version": self.weight_version}

    def sleep(self, _: Any) -> dict[str, Any]:
        self.sleeps = True
        return {"status": "sleeping", "level": 1}

    def wake_up(self, _: Any) -> dict[str, Any]:
        self.sleeps = False
        return {"status": "awake", "tags": None}

    def complete(self, payload: Any) -> dict[str, Any]:
        if self.sleeps:
            raise ServerError(500, "EngineCore is sleeping", "InternalServerError")
        name, prompt = payload["model"], payload["prompt"]
        if name != self.folder and name not in self.adapters:
            raise ServerError(404, f"The model `{name}` does not exist.", "NotFoundError")
        if max(prompt) >= self.base.config.vocab_size:
            raise ServerError(400, f"Token id {max(prompt)} is out of vocabulary")
        if len(prompt) + payload["max_tokens"] > self.context:
            raise ServerError(400, f"This model's maximum context length is {self.context} tokens.")
        job = Job(payload)
        with self.lock:
            self.under_way[name] += 1
            self.together[frozenset(+self.under_way)] += 1
        self.jobs.put(job)
        job.done.wait(60)
        with self.lock:
            self.under_way[name] -= 1
        return {"object": "text_completion", "model": name, "choices": [job.choice]}

    def work(self) -> None:
        """Write completions, those of one model and of equally long prompts together."""
        while (job := self.jobs.get()) is not None:
            jobs = [job]
            self.release.wait(0.005)
            while not self.jobs.empty() and (job := self.jobs.get()) is not None:
                jobs.append(job)
            names = {job.payload["model"] for job in jobs} - {self.folder}
            groups = defaultdict(list)
            for job in jobs:
                name, prompt = job.payload["model"], tuple(job.payload["prompt"])
                leaked = self.leaks and name == self.folder and names
                model = self.adapters.get(min(names) if leaked else name, self.base)
                if self.dev:  # What it has computed of a prompt, it takes again.
                    model = self.computed.setdefault((name, prompt), model)
                groups[id(model), len(prompt)].append((model, job))
            for members in groups.values():
                self.write(members[0][0], [job for _, job in members])

    @torch.no_grad()
    def write(self, model: nn.Module, jobs: list[Job]) -> None:
        ids = torch.tensor([job.payload["prompt"] for job in jobs])
        width = ids.shape[1]
        generators = [torch.Generator().manual_seed(job.payload["seed"]) for job in jobs]
        logps: list[list[float]] = [[] for _ in jobs]
        while not all(job.done.is_set() for job in jobs):
            raw = model(input_ids=ids).logits[:, -1].float()
            tokens = [
                self.draw(job.payload, row[None], logits[None], generator)
                for job, row, logits, generator in zip(jobs, ids, raw, generators, strict=True)
            ]
            ids = torch.cat([ids, torch.tensor(tokens)[:, None]], 1)
            for job, row, log_row, some in zip(jobs, ids, raw.log_softmax(-1), logps, strict=True):
                if not job.done.is_set():
                    some.append(float(log_row[row[-1]]))
                    self.end(job, row[width:].tolist(), some)

    def draw(self, payload: Any, row: torch.Tensor, logits: torch.Tensor, generator: torch.Generator) -> int:
        """Draw a token, the filters in vLLM's order."""
        if "allowed_token_ids" in payload:
            return int(payload["allowed_token_ids"][int(logits[0, payload["allowed_token_ids"]].argmax())])
        steps = [Penalty(payload["repetition_penalty"])]
        if payload["temperature"] == 0:
            return int(LogitsProcessorList(steps)(row, logits).argmax())
        steps.append(Temperature(float(max(payload["temperature"], 0.01))))
        steps += [MinP(payload["min_p"])] if payload["min_p"] > 0 else []
        steps += [TopK(payload["top_k"])] if payload["top_k"] > 0 else []
        steps += [TopP(payload["top_p"])] if payload["top_p"] < 1 else []
        shares = LogitsProcessorList(steps)(row, logits).softmax(-1)
        return int((shares / torch.empty_like(shares).exponential_(generator=generator)).argmax())

    def end(self, job: Job, ids: list[int], logps: list[float]) -> None:
        """Hand a completion over where it has ended."""
        payload, text = job.payload, self.tokenizer.decode(ids)
        stops = [stop for stop in payload["stop"] if stop in text]
        stopped = ids[-1] in payload["stop_token_ids"]
        if stopped or stops or len(ids) == payload["max_tokens"]:
            job.choice.update(
                index=0,
                text=text,
                token_ids=list(ids),
                prompt_token_ids=payload["prompt"],
                logprobs={"token_logprobs": list(logps)},
                finish_reason="stop" if stopped or stops else "length",
                stop_reason=ids[-1] if stopped else stops[0] if stops else None,
            )
            job.done.set()


@contextmanager
def standing_in(folder: str, **options: Any) -> Iterator[StandIn]:
    """Serve a model folder for a while."""
    server = StandIn(folder, **options)
    try:
        yield server
    finally:
        server.stop()
