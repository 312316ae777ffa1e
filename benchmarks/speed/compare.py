"""Compares our optimizer step with that of TRL 1.13.0's XPOTrainer: same models, same prompts, same machine.

    python -m benchmarks.speed.compare --suite pythia --repeats 3

Needs nothing but Python 3.11 and pip; it makes both environments itself. Let nothing else run meanwhile.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed.busy import busy_processes
from benchmarks.speed.environments import our_python, start, trl_python
from benchmarks.speed.options import absolute_path, make_assets, make_parser
from benchmarks.speed.report import comparison, floor_table, header, tuning
from benchmarks.speed.suites import SUITES, SYSTEMS, Suite, as_record, our_spec, trl_spec
from xpo_lightning.cli.thread_waiting import OtherProcesses, choose_waiting

Run = dict[str, Any]
TUNED_BATCHES = (2, 4, 8, 16)


def main() -> None:
    """Run what the command line asks for, print tables, write the JSON file."""
    args = _arguments()
    pythons = {
        "ours": args.ours_python or our_python(args.work),
        "trl": args.trl_python or trl_python(args.work),
    }
    record: dict[str, Any] = {"suites": {}}
    for name in SUITES if args.suite == "all" else [args.suite]:
        suite = SUITES[name]
        assets = make_assets(pythons["ours"], suite, args)
        if args.tune_trl:
            runs = list(_tuning_runs(suite, assets, args, pythons["trl"]))
            record["suites"][name] = {"suite": as_record(suite), "tuning": runs}
            print(header(runs), tuning(suite, runs), sep="\n\n", flush=True)
        else:
            runs = list(_comparison_runs(suite, assets, args, pythons))
            floor = _floor(suite, assets, runs, pythons["ours"])
            record["suites"][name] = {"suite": as_record(suite), "runs": runs, "floor": floor}
            print(header(runs), comparison(suite, runs), floor_table(floor), sep="\n\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="pythia")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of each system, taking turns")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--others", type=int, default=0, help="processes that keep a core busy during each measurement")
    parser.add_argument("--quick", action="store_true", help="few prompts, once: shows that it runs, measures nothing")
    parser.add_argument("--trl-prompts", type=int, help="prompts to time of TRL's step, a multiple of its batch")
    parser.add_argument("--tune-trl", action="store_true", help="look for TRL's fastest settings, and do nothing else")
    parser.add_argument("--options", type=json.loads, default={}, help="our module's further arguments, as JSON")
    parser.add_argument("--ours-python", type=absolute_path, help="use this interpreter, which has this package")
    parser.add_argument("--trl-python", type=absolute_path, help="use this interpreter, which has TRL")
    args = parser.parse_args()
    if args.quick:
        args.repeats = 1
    return args


def _comparison_runs(suite: Suite, assets: Path, args: argparse.Namespace, pythons: dict[str, Path]) -> Iterator[Run]:
    few = 4 if args.quick else None
    trl_prompts = {"trl-best": suite.trl_prompts, "trl-shipped": suite.shipped_prompts}
    for repeat in range(args.repeats):
        for system in args.systems:
            if system == "ours":
                spec = our_spec(suite, assets, few or suite.prompts, args.options)
                measured = _measure(pythons["ours"], "speed.worker_ours", spec, args)
            else:
                spec = trl_spec(suite, assets, system, args.trl_prompts or few or trl_prompts[system])
                measured = _measure(pythons["trl"], "speed.worker_trl", spec, args)
            _tell(f"{suite.name} {repeat + 1}/{args.repeats}", measured)
            yield {"repeat": repeat, "spec": spec, **measured}


def _tuning_runs(suite: Suite, assets: Path, args: argparse.Namespace, python: Path) -> Iterator[Run]:
    """Try batch sizes, each with and without bfloat16 autocast, on as many prompts as the largest batch."""
    prompts = args.trl_prompts or (4 if args.quick else max(TUNED_BATCHES))
    for batch in TUNED_BATCHES:
        for autocast in (False, True):
            if batch <= prompts:
                spec = trl_spec(suite, assets, "trl-best", prompts, batch, bf16=autocast)
                measured = _measure(python, "speed.worker_trl", spec, args)
                _tell(f"{suite.name} batch {batch}, autocast {autocast}", measured)
                yield {"spec": spec, **measured}


def _measure(python: Path, worker: str, spec: dict[str, Any], args: argparse.Namespace) -> Run:
    """Run a worker in a process of its own; its result is its last line."""
    # Both sides keep PyTorch's own number of threads; the tokenizers' threads would only get in their way.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with busy_processes(args.others):
        # As `xpo` does before it loads torch; TRL's users set that themselves, in the environment of this command.
        waiting = choose_waiting(OtherProcesses()) if spec["system"] == "ours" else {}
        output = start(python, worker, json.dumps(spec), cwd=args.work, env={**os.environ, **quiet, **waiting})
    measured: Run = json.loads(output.splitlines()[-1])
    return measured


def _floor(suite: Suite, assets: Path, runs: list[Run], python: Path) -> dict[str, Any]:
    floor: dict[str, Any] = json.loads(start(python, "speed.floor", suite.name, str(assets)).splitlines()[-1])
    ours = sorted(run["seconds_per_prompt"] for run in runs if run["system"] == "ours")
    return {**floor, "ours": ours[len(ours) // 2] if ours else None}


def _tell(label: str, run: Run) -> None:
    print(f"{label}: {run['system']} {run['seconds_per_prompt']:.3f} s a prompt", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
