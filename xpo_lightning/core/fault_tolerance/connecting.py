"""Connects the processes of a run by a lifeline."""

import hmac
import os
import secrets
import socket
import time
from contextlib import suppress

from xpo_lightning.core.distributed import all_gather, own_rank
from xpo_lightning.core.fault_tolerance.lifeline import Lifeline

PATIENCE = 30.0
"""Seconds that all processes have to connect."""
LOOPBACK = "127.0.0.1"
Address = tuple[str, int, str]
"""A host, a port, and the shared secret."""


def connect(*, is_one_machine: bool) -> Lifeline | None:
    """Connect all processes (collective).

    Args:
        is_one_machine: Whether all are on the same machine; then no other machine can connect.

    Returns:
        This process's end, or None on all processes if one of them could not connect.
    """
    rank, others = own_rank(), len(all_gather(None)) - 1
    server, address = _listen(is_one_machine) if rank == 0 else (None, None)
    address = all_gather(address)[0]
    ends: dict[int, socket.socket] | None = None
    with suppress(OSError):
        if server is not None and address is not None:
            with server:
                ends = _accept(server, others, address[2])
        elif address is not None:
            ends = {0: _dial(address, rank)}
    if all(all_gather(ends is not None)) and ends is not None:
        return Lifeline(rank, ends)
    for end in (ends or {}).values():
        end.close()
    return None


def _listen(is_one_machine: bool) -> tuple[socket.socket | None, Address | None]:
    host = LOOPBACK if is_one_machine else os.environ.get("MASTER_ADDR", LOOPBACK)
    try:
        server = socket.create_server((LOOPBACK if is_one_machine else "", 0), backlog=1024)
    except OSError:
        return None, None
    return server, (host, server.getsockname()[1], secrets.token_hex())


def _accept(server: socket.socket, others: int, word: str) -> dict[int, socket.socket]:
    """Accept the connections of all other processes; refuse any connection without the shared secret."""
    end_of_patience, ends = time.monotonic() + PATIENCE, dict[int, socket.socket]()
    while len(ends) < others:
        server.settimeout(max(0.01, end_of_patience - time.monotonic()))
        end, _ = server.accept()
        end.settimeout(PATIENCE)
        with suppress(OSError, ValueError):
            said, _, rank = _read_line(end).partition(" ")
            if hmac.compare_digest(said.encode(), word.encode()):
                ends[int(rank)] = _kept_alive(end)
                continue
        end.close()
    return ends


def _dial(address: Address, rank: int) -> socket.socket:
    host, port, word = address
    end = socket.create_connection((host, port), timeout=PATIENCE)
    end.sendall(f"{word} {rank}\n".encode())
    return _kept_alive(end)


def _read_line(end: socket.socket) -> str:
    """Read one line, and no byte after it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 200:
        byte = end.recv(1)
        if not byte:
            break
        line += byte
    return line.decode(errors="replace").strip()


def _kept_alive(end: socket.socket) -> socket.socket:
    """Set TCP keep-alive, so that the system notices within half a minute that the other machine is down."""
    end.settimeout(None)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}.items():
        if hasattr(socket, name):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return end
