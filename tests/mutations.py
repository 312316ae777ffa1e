"""Breaks the package in one place at a time, and sees that a test fails each time.

    python tests/mutations.py
    python tests/mutations.py --list
    python tests/mutations.py --only "mixture: the share is the policy's"

`mutation_table.py` lists what is broken, and the tests that are to notice. The package is copied once, and only the
copy is changed. The tests of a mutation run in a process that is forked from one with all libraries imported, so that a
mutation costs seconds. A mutation that no test notices is printed as SURVIVED, and makes the exit status 1.
"""

import argparse
import compileall
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import NoReturn

import pytest
from mutation_table import MUTATIONS, Mutation

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "xpo_lightning"
LIMIT = 900
"""Seconds that the tests of a mutation may take; one that makes them endless is noticed, too."""
LIBRARIES = ("datasets", "jsonargparse", "lightning.pytorch.cli", "matplotlib.pyplot", "peft", "torch")
MODELS = ("gemma2", "gpt2", "gpt_neox", "llama", "mistral", "qwen2")


def faults(mutation: Mutation) -> list[str]:
    """Say what is wrong with an entry of the table: one that no longer fits the code would test nothing."""
    text = (PACKAGE / mutation.file).read_text(encoding="utf-8")
    found = []
    if text.count(mutation.old) != 1:
        found.append(f"{mutation.name}: its old text is {text.count(mutation.old)} times in {mutation.file}, not once")
    if mutation.new == mutation.old:
        found.append(f"{mutation.name}: its new text is the old one")
    try:
        compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    except SyntaxError as error:
        found.append(f"{mutation.name}: its new text does not parse ({error})")
    missing = [word for word in mutation.tests.split() if not places_of(word)]
    return found + [f"{mutation.name}: there is no {word} in tests" for word in missing]


@cache
def places_of(word: str) -> list[str]:
    """Find a path inside the tests' folder, or all tests of a name, wherever they are; return pytest's words for it."""
    if not word.startswith("test_"):
        return [str(TESTS / word)] if (TESTS / word).exists() else []
    definition = re.compile(rf"^def {word}\(", re.MULTILINE)
    return [f"{file}::{word}" for file, text in _texts().items() if definition.search(text)]


@cache
def _texts() -> dict[Path, str]:
    return {file: file.read_text(encoding="utf-8") for file in sorted(TESTS.rglob("test_*.py"))}


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended.

    Args:
        failed: The first test that failed; None if all passed.
        is_broken: Whether tests could not be run at all.
        seconds: Time on the CPU, processes that the tests started included.
        output: What pytest printed.
    """

    failed: str | None
    is_broken: bool
    seconds: float
    output: str


class FirstFailure:
    """A plugin of pytest that remembers the first test that fails, or the first file that cannot be imported."""

    def __init__(self) -> None:
        self.test: str | None = None
        self.is_broken = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.test is None:
            self.test = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.is_broken = True


class Copy:
    """A copy of the package in a temporary folder, in which files are changed and restored.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=skipped)
        shutil.copytree(PACKAGE.parent / "configs", folder / "configs", ignore=skipped)
        # Compiled code that is used by the hash of its source: two changes within a second may be of equal length.
        compileall.compile_dir(folder, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)

    def run(self, tests: Iterable[str], mutation: Mutation | None = None) -> Outcome:
        """Run tests with a mutation, or with the package as it is."""
        if mutation is None:
            return self._run(tests, slow=False)
        file = self.folder / PACKAGE.name / mutation.file
        text = file.read_text(encoding="utf-8")
        try:
            file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            return self._run(tests, slow=mutation.slow)
        finally:
            file.write_text(text, encoding="utf-8")

    def _run(self, tests: Iterable[str], *, slow: bool) -> Outcome:
        before = _seconds_of_children()
        output, report = self.folder / "output.txt", self.folder / "report.json"
        report.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._be_pytest([place for word in tests for place in places_of(word)], output, report, slow=slow)
        deadline = time.monotonic() + LIMIT
        has_ended = False
        try:
            while not has_ended and time.monotonic() < deadline:
                has_ended = os.waitpid(child, os.WNOHANG) != (0, 0)
                time.sleep(0.05)
        finally:  # also if this process is told to end
            if not has_ended:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
        shutil.rmtree(self.folder / "pytest", ignore_errors=True)
        seconds, text = _seconds_of_children() - before, output.read_text(errors="replace")
        if not has_ended:
            return Outcome(f"none within {LIMIT} s", False, seconds, text)
        if not report.exists():
            return Outcome("the process died", False, seconds, text)
        told = json.loads(report.read_text())
        is_broken = told["is_broken"] or (told["status"] != 0 and told["test"] is None)
        return Outcome(told["test"], is_broken, seconds, text)

    def _be_pytest(self, tests: list[str], output: Path, report: Path, *, slow: bool) -> NoReturn:
        """Be the process that runs the tests."""
        try:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.dont_write_bytecode = True
            sys.path[:] = [str(self.folder), *sys.path, str(TESTS.parent)]
            os.environ |= {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
            first = FirstFailure()
            options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={self.folder / 'pytest'}"]
            options += ["-o", f"pythonpath={' '.join(_test_folders())}"]
            options += ["-m", "not vllm and not gpu and not trl"] if slow else []
            status = pytest.main([*options, f"--rootdir={TESTS.parent}", *tests], plugins=[first])
            told = {"status": int(status), "test": first.test, "is_broken": first.is_broken}
            used = sys.modules["xpo_lightning"].__file__
            if used is None or not Path(used).is_relative_to(self.folder):
                told["is_broken"] = True
                print(f"the tests ran with the package in {used}, not with the copy")
            report.write_text(json.dumps(told))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)


def _test_folders() -> list[str]:
    """Return the folders that tests import from, but for the repository's root, whose package is not the copy."""
    settings = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    folders: list[str] = settings["tool"]["pytest"]["ini_options"]["pythonpath"]
    return [folder for folder in folders if folder != "."]


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def import_libraries() -> None:
    """Import what the package and its tests import, but neither of these: they are imported for each mutation."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in (*LIBRARIES, *(f"transformers.models.{model}.modeling_{model}" for model in MODELS)):
        importlib.import_module(name)


def try_all(mutations: Sequence[Mutation], copy: Copy, *, checks_first: bool) -> int:
    """Run the tests of each mutation and print a line each; return how many were not noticed."""
    if checks_first:
        tests = dict.fromkeys(path for mutation in mutations for path in mutation.tests.split())
        clean = copy.run(tests)
        if clean.failed or clean.is_broken:
            print(clean.output)
            raise SystemExit(f"the tests fail without any mutation ({clean.failed})")
        print(f"without a mutation, all pass ({clean.seconds:.0f} s)", flush=True)
    survived, total = [], 0.0
    for mutation in mutations:
        outcome = copy.run(mutation.tests.split(), mutation)
        total += outcome.seconds
        verdict = "SURVIVED" if outcome.failed is None else f"caught by {outcome.failed}"
        if outcome.is_broken:
            verdict = f"NOT TRIED, because no test ran:\n{outcome.output}"
        if outcome.failed is None or outcome.is_broken:
            survived.append(mutation.name)
        print(f"{mutation.name}: {verdict} ({outcome.seconds:.0f} s)", flush=True)
    print(f"{len(mutations)} mutations, {len(survived)} survived, {total:.0f} s of CPU time")
    return len(survived)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the names of all mutations, and run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or beginnings of names; without it, all")
    parser.add_argument("--unchecked", action="store_true", help="do not first run the tests without a mutation")
    options = parser.parse_args(words)
    wrong = [fault for mutation in MUTATIONS for fault in faults(mutation)]
    if wrong:
        print(*wrong, sep="\n")
        return 2
    mutations = [one for one in MUTATIONS if options.only is None or one.name.startswith(tuple(options.only))]
    if not mutations:
        parser.error(f"--only: no mutation has a name that begins with one of {options.only}; see --list")
    if options.list:
        print(*(f"{one.name} ({one.file}; {one.tests})" for one in mutations), sep="\n")
        return 0
    import_libraries()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder:
        return int(try_all(mutations, Copy(Path(folder)), checks_first=not options.unchecked) > 0)


if __name__ == "__main__":
    sys.exit(main())
