"""A stand-in for vLLM's trainer-side client of its weight transfer, which has no GPU to send from."""

from types import ModuleType, SimpleNamespace
from typing import Any

import httpx2
from vllm_stand_in import StandIn

PACKAGE = "vllm.distributed.weight_transfer"


class HTTPError(OSError):
    """An error as vLLM's client has them, those of requests."""

    def __init__(self, response: httpx2.Response) -> None:
        super().__init__(f"{response.status_code} {response.reason_phrase}")
        self.response = response


class Client:
    """Posts to the endpoints of a server, once, as vLLM's client does."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout

    def post(self, path: str, payload: Any = None) -> None:
        response = httpx2.post(f"{self.url}/{path}", json=payload, timeout=self.timeout)
        if response.is_error:
            raise HTTPError(response)


class Engine:
    """Sends weights as vLLM's trainer-side engine does, but for the way that they take."""

    shut: int = 0

    def __init__(self, server: StandIn, client: Client, source: Any, init_info: dict[str, Any]) -> None:
        self.server, self.client, self.source = server, client, source
        client.post("init_weight_transfer_engine", {"init_info": init_info})

    def send_weights(self) -> None:
        self.client.post("start_weight_update")
        self.server.broadcast = {name: weight.detach().clone() for name, weight in self.source.named_parameters()}
        self.client.post("update_weights", {"update_info": {"names": list(self.server.broadcast)}})
        self.client.post("finish_weight_update")

    def shutdown(self) -> None:
        Engine.shut += 1


def client_modules(servers: dict[str, StandIn]) -> dict[str, ModuleType]:
    """Return modules under the names of vLLM's, for `sys.modules`; they send to these servers, by their URLs."""

    def trainer_init(info: SimpleNamespace, *, client: Client, source: Any) -> Engine:
        wire = {name: value for name, value in vars(info).items() if name != "rank"}
        return Engine(servers[client.url], client, source, wire)

    package: Any = ModuleType(PACKAGE)
    package.WeightTransferTrainerFactory = SimpleNamespace(trainer_init=trainer_init)
    package.HTTPVLLMWeightSyncClient, package.ModuleSource = Client, lambda module: module
    nccl: Any = ModuleType("nccl")
    nccl.NCCLTrainerInitInfo = SimpleNamespace
    ipc: Any = ModuleType("ipc")
    ipc.IPCTrainerInitInfo = lambda rank: SimpleNamespace(rank=rank, packed=False)
    parents = {name: ModuleType(name) for name in ("vllm", "vllm.distributed")}
    return {**parents, PACKAGE: package, f"{PACKAGE}.nccl_engine": nccl, f"{PACKAGE}.ipc_engine": ipc}
