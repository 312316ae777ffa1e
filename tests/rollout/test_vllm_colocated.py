"""A vLLM server on the GPU of the run, which sleeps except while it writes; a stand-in writes awake only."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Recorder, fit_quietly
from vllm_stand_in import Handler, StandIn, standing_in

from xpo_lightning import InputError, LoRASpec, VLLMRollout, XPOLightningModule

MakeModule = Callable[..., XPOLightningModule]
Serve = Callable[..., StandIn]
PROMPTS = ["the cat", "a dog ran away from the hat and", "red", "on the mat today"]
WORK = {"/v1/completions", "/collective_rpc", "/v1/load_lora_adapter"}


@pytest.fixture
def serve(model_folder: Callable[..., str]) -> Iterator[Serve]:
    """Give a function that starts a stand-in in vLLM's mode for developers."""
    with ExitStack() as servers:
        yield lambda **options: servers.enter_context(standing_in(model_folder("llama"), **{"dev": True, **options}))


def build(make_module: MakeModule, server: StandIn, folder: Path, way: str, **options: Any) -> XPOLightningModule:
    adapter = way == "adapter"
    where = {"adapter_folder" if adapter else "weights_folder": str(folder)}
    given = {"weights": way, "retries": 2, "backoff": 0.01, "colocate": True, **where, **options}
    return make_module(
        rollout=VLLMRollout(server.url, **given), lora=LoRASpec(r=4) if adapter else None, learning_rate=1e-2
    )


@pytest.mark.parametrize("way", ["adapter", "full"])
def test_server_is_awake_while_it_is_sent_the_policy_and_writes_and_at_no_other_time(
    serve: Serve, make_module: MakeModule, tmp_path: Path, way: str
) -> None:
    server = serve()
    asleep: list[bool] = []

    def look(request: Handler, number: int) -> bool:
        asleep.append(server.sleeps)
        return False

    server.misbehave = look
    steps: list[bool] = []

    class Watch(Recorder):
        def on_pairs_collected(self, *_: Any) -> None:
            steps.append(server.sleeps)  # about to train

    fit_quietly(build(make_module, server, tmp_path, way), PROMPTS * 3, batch_size=4, callbacks=[watch := Watch()])
    assert steps == [True] * 3
    assert server.sleeps
    work = [slept for (path, _), slept in zip(server.seen, asleep, strict=True) if path in WORK]
    assert len(work) > 12
    assert not any(work)
    assert len(server.asked("/wake_up")) == 3
    assert len(server.asked("/sleep")) == 4  # once when the run begins
    assert max(watch.of("rollout/policy_logp_drift")) < 1e-4


def test_server_that_is_started_anew_while_it_sleeps_is_brought_up_to_date(
    serve: Serve, make_module: MakeModule, tmp_path: Path
) -> None:
    server = serve()

    class Restart(Recorder):
        def on_pairs_collected(self, *_: Any) -> None:
            server.start_anew()

    fit_quietly(build(make_module, server, tmp_path, "full"), PROMPTS * 2, batch_size=4, callbacks=[seen := Restart()])
    assert max(seen.of("rollout/policy_logp_drift")) < 1e-4
    assert len(seen.of("rollout/policy_logp_drift")) == 2


def test_server_that_cannot_sleep_is_one_clear_error(serve: Serve, make_module: MakeModule, tmp_path: Path) -> None:
    server = serve(dev=False)
    with pytest.raises(InputError, match=r"/sleep .*404.*colocate needs .*--enable-sleep-mode, and VLLM_SERVER_DEV"):
        fit_quietly(build(make_module, server, tmp_path, "adapter"), PROMPTS, batch_size=4)


def test_writing_ahead_is_refused_beside_a_server_that_sleeps(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"init_args\.ahead=1 .*init_args\.colocate .* set one of the two"):
        VLLMRollout("http://localhost:8000", str(tmp_path), colocate=True, ahead=1)
