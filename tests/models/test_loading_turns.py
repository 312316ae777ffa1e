"""Processes of one machine load whole models one after another, or as many at a time as its memory has room for."""

import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from two_processes import in_two

from xpo_lightning.core import main_memory
from xpo_lightning.core.main_memory import available, forget_peak, peak, taken
from xpo_lightning.models import loading_turns
from xpo_lightning.models.loading_turns import load_in_turns
from xpo_lightning.models.sharding import shard

MIB = 2**20


def in_threads(hosts: list[str], monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> None:
    """Call a function in a thread for each process, which gather from each other as processes do."""
    ranks, barrier, box = threading.local(), threading.Barrier(len(hosts), timeout=20), [None] * len(hosts)

    def all_gather(value: Any) -> list[Any]:
        box[ranks.own] = value
        barrier.wait()
        values = list(box)
        barrier.wait()
        return values

    monkeypatch.setattr(loading_turns, "all_gather", all_gather)
    monkeypatch.setattr(loading_turns, "own_rank", lambda: ranks.own)
    monkeypatch.setattr(loading_turns, "host", lambda: hosts[ranks.own])

    def be(rank: int) -> None:
        ranks.own = rank
        work()

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(
    ("hosts", "room", "groups"),
    [
        ("aaaaa", 99, [1, 1, 1, 1, 1]),  # less than one needs: one at a time
        ("aaaaa", 250, [1, 1, 1, 1, 1]),  # 0.8 times 250 is room for one of 100, and for the parts of all
        ("aaaaa", 380, [1, 2, 2]),
        ("aaaaa", None, [1, 4]),  # unknown: all at a time after the first
        ("aabbb", 99, [2, 2, 1]),  # each of two machines has a turn of its own
    ],
)
def test_as_many_load_at_a_time_as_have_room(monkeypatch, hosts, room, groups):
    """Each needs 100. Those of a group wait for each other, and find that all others are done or have not begun."""
    lock, begun, done, found = threading.Lock(), [], [], []
    gates = [gate for size in groups for gate in [threading.Barrier(size, timeout=20)] * size]
    monkeypatch.setattr(loading_turns, "available", lambda: room)
    monkeypatch.setattr(loading_turns, "taken", lambda: 1000)
    monkeypatch.setattr(loading_turns, "peak", lambda: 1100)
    monkeypatch.setattr(loading_turns, "forget_peak", lambda: None)

    def load() -> None:
        with lock:
            gate = gates[len(begun)]
            begun.append(gate)
        gate.wait()
        time.sleep(0.05)
        with lock:
            found.append((len(begun), gate))
        gate.wait()
        with lock:
            done.append(gate)

    in_threads(list(hosts), monkeypatch, lambda: load_in_turns(load))
    assert done == begun == gates
    before = {gate: place for place, gate in enumerate(gates, start=1)}
    assert all(count == before[gate] for count, gate in found)


def test_a_process_keeps_its_part_and_gives_the_rest_back(tmp_path: Path):
    """Of two processes, each of which loads 64 MiB of weights, the second begins when the first has 32 left."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, vocab_size=128
    )
    weight_bytes = 4 * sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert weight_bytes > 60 * MIB

    def in_one(rank: int, mesh: Any) -> tuple[float, float, float]:
        before, times, models = taken(), [], []

        def load() -> None:
            times.append(time.monotonic())
            models.append(LlamaForCausalLM(config))
            shard(models[0], mesh)
            times.append(time.monotonic())

        load_in_turns(load)
        return (*times, (taken() - before) / weight_bytes)

    (_, end, first), (begin, _, second) = in_two(in_one)
    assert end <= begin
    assert max(first, second) < 0.75


def test_memory_is_that_of_the_process_and_of_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = taken()
    forget_peak()
    with mmap.mmap(-1, 64 * MIB) as block:
        for page in range(0, len(block), mmap.PAGESIZE):  # a text of that size would stay in the process's heap
            block[page] = 1
    after = taken()
    assert peak() - before > 60 * MIB
    assert after < before + 60 * MIB
    everything = available(tmp_path)
    assert 0 < everything <= 1024 * int(Path("/proc/meminfo").read_text().split()[1])
    (tmp_path / "memory.max").write_text("max\n")
    assert available(tmp_path) > everything / 2
    (tmp_path / "memory.max").write_text(f"{300 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {100 * MIB}\nfile {150 * MIB}\n")
    assert available(tmp_path) == 200 * MIB
    monkeypatch.setattr(main_memory, "_MACHINE", tmp_path / "missing")
    assert available(tmp_path) == 200 * MIB
    assert available(tmp_path / "missing") is None
