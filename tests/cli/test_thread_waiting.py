"""How OpenMP's threads wait is chosen before torch is loaded: by what other processes use, unless the user has said."""

import os
import sys
from pathlib import Path

import pytest

from xpo_lightning.cli import main, thread_waiting

IDLE = "cpu  1000 0 500 90000 100 0 0 0 0 0\n"
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture
def times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file in which a command that is about to load torch reads the machine's times."""
    file = tmp_path / "stat"
    file.write_text(IDLE)
    monkeypatch.setattr(thread_waiting, "_TIMES", file)
    monkeypatch.delitem(sys.modules, "torch")
    for name in CHOICES:
        monkeypatch.setenv(name, "")  # So that what the command sets is taken back.
        monkeypatch.delenv(name)
    return file


def chosen(monkeypatch: pytest.MonkeyPatch, times: Path, later: str) -> dict[str, str]:
    """Return what is set when `xpo fit` loads torch, where the machine's times have become `later` meanwhile."""
    seen: dict[str, str] = {}

    class Run:
        @staticmethod
        def main() -> None:
            seen.update({name: os.environ[name] for name in CHOICES if name in os.environ})

    monkeypatch.setattr(sys, "argv", ["xpo", "fit", "--config", "quickstart"])
    monkeypatch.setattr(main, "import_module", lambda _: Run)
    monkeypatch.setattr(main.mistakes, "check", lambda *_: times.write_text(later))
    main.main()
    return seen


def test_threads_spin_on_a_quiet_machine_but_not_for_long(times: Path, monkeypatch: pytest.MonkeyPatch):
    assert chosen(monkeypatch, times, IDLE) == {"GOMP_SPINCOUNT": "50000"}


def test_threads_sleep_where_another_process_works(times: Path, monkeypatch: pytest.MonkeyPatch):
    # At least 0.2 s pass. 10 s of user time are more than half a core even on a machine that hangs for some seconds.
    assert chosen(monkeypatch, times, IDLE.replace("1000", "2000")) == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7")])
def test_what_the_user_has_set_stays(name: str, value: str, times: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, value)
    assert chosen(monkeypatch, times, IDLE.replace("1000", "2000")) == {name: value}


def test_waiting_for_the_disk_is_not_work(times: Path, monkeypatch: pytest.MonkeyPatch):
    assert chosen(monkeypatch, times, IDLE.replace(" 100 ", " 1100 ")) == {"GOMP_SPINCOUNT": "50000"}


def test_nothing_is_chosen_once_torch_is_there(times: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert chosen(monkeypatch, times, IDLE) == {}
