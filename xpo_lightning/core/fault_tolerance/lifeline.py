"""A connection between the processes of a run, on which they learn that one has failed or is gone."""

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from socket import socket

from xpo_lightning.core.distributed import host, speaks_for_host
from xpo_lightning.core.errors import write_line

GRACE = 5.0
"""Seconds that a process has to exit by itself, once another has failed."""
SETTLE = 1.0
"""Seconds that a failing process waits to learn whether another failed first and caused its failure."""
CLEANUP = 20.0
"""Seconds that a failed process has for its cleanup, and again for its exit."""
GOODBYE = b"goodbye\n"


@dataclass(frozen=True)
class Failure:
    """The failure that ends a run.

    Args:
        rank: The process that failed.
        status: Exit status of all others.
        message: What went wrong.
        host: The machine of the process that reports it.
        is_gone: Whether the process is gone, so that another one reports its failure.
    """

    rank: int
    status: int
    message: str
    host: str
    is_gone: bool = False

    @property
    def line(self) -> str:
        """The line to show."""
        return f"process {self.rank} {self.message}" if self.is_gone else f"process {self.rank}: {self.message}"


class Lifeline:
    """One process's end of the lifeline: rank 0 is connected to all others, each of which is connected to rank 0 only.

    Rank 0 decides which failure was first, and tells all. If a process learns that another failed, and does not leave
    within `GRACE`, a thread ends it, whatever it is blocked in.

    Args:
        rank: The rank of this process.
        ends: A socket for each process that this one is connected to, by rank.
    """

    def __init__(self, rank: int, ends: Mapping[int, socket]) -> None:
        self.rank = rank
        self._ends, self._here = list(ends.values()), set(ends)
        self._failure: Failure | None = None
        self._lock = threading.Lock()
        self._failed, self._left, self._deserted, self._exits = (threading.Event() for _ in range(4))
        for peer, end in ends.items():
            threading.Thread(target=self._listen, args=(peer, end), daemon=True, name="lifeline").start()
        threading.Thread(target=self._end_in_time, daemon=True, name="lifeline").start()

    @property
    def has_left(self) -> bool:
        """Whether this process has said goodbye."""
        return self._left.is_set()

    def fail(self, status: int, message: str, *, at_once: bool = False) -> None:
        """Tell the others that this process has failed; does not return if another failed first.

        Args:
            status: Exit status of all others.
            message: What went wrong.
            at_once: Do not wait to learn whether another failed first.
        """
        own = Failure(self.rank, status, message, host())
        if self._left.is_set():
            return
        if not self._failed.wait(0 if at_once else SETTLE):
            if self.rank == 0:
                self._settle(own)
            else:
                self._send(json.dumps(asdict(own)).encode() + b"\n")
                self._failed.wait(GRACE)
        self._wait_if_another_failed()
        atexit.register(self._exits.set)

    def leave(self, patience: float | None = None) -> None:
        """Say goodbye, and wait for rank 0's goodbye, which follows once all others have said theirs or are gone.

        Args:
            patience: How many seconds to wait; None waits for ever.
        """
        if self._left.is_set():
            return
        if self.rank:
            self._send(GOODBYE)
        self._deserted.wait(patience)
        if patience is None:
            self._wait_if_another_failed()
        if self.rank == 0:
            self._send(GOODBYE)
        self._left.set()
        self._failed.set()

    def _listen(self, peer: int, end: socket) -> None:
        said_goodbye = False
        with suppress(OSError), end.makefile("rb") as lines:
            for line in lines:
                if line == GOODBYE:
                    said_goodbye = True
                    break
                if line.endswith(b"\n"):
                    self._settle(Failure(**json.loads(line)))
        if not (said_goodbye or self._left.is_set()):
            gone = "is gone: it was killed, or its machine is down; go on with `--ckpt_path last`"
            self._settle(Failure(peer, 1, gone, host(), is_gone=True))
        with self._lock:
            self._here.discard(peer)
            if not self._here:
                self._deserted.set()

    def _settle(self, failure: Failure) -> None:
        with self._lock:
            if self._failure is not None or self._left.is_set():
                return
            self._failure = failure
        if self.rank == 0:
            self._send(json.dumps(asdict(failure)).encode() + b"\n")
        self._failed.set()

    def _send(self, message: bytes) -> None:
        for end in self._ends:
            with suppress(OSError):
                end.sendall(message)

    def _wait_if_another_failed(self) -> None:
        """Block the main thread for ever if another process failed; `_end_in_time` then ends this process."""
        if self._failure is not None and self._failure.rank != self.rank:
            threading.Event().wait()

    def _end_in_time(self) -> None:
        self._failed.wait()
        failure = self._failure
        if failure is None:
            return
        is_own = failure.rank == self.rank
        if not self._left.wait(CLEANUP if is_own else 0 if failure.is_gone or failure.status == 130 else GRACE):
            self._end(failure)
        elif is_own:  # Code that closes connections at exit may wait for the others too.
            self._exits.wait()
            time.sleep(CLEANUP)
            os._exit(failure.status)

    def _end(self, failure: Failure) -> None:
        """End the process at once; the main thread may be blocked in a call that cannot be interrupted."""
        first_left = failure.is_gone and self.rank == (1 if failure.rank == 0 else 0)
        if failure.rank == self.rank or first_left or speaks_for_host(failure.host):
            write_line(failure.line)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(failure.status)
