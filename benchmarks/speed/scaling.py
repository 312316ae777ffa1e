"""Measures our seconds a prompt against prompt length, completion length, and the prompts of a rollout; plots them.

    python -m benchmarks.speed.scaling --plot scaling.png --json scaling.json

Suite pythia's model. Run it with an interpreter that has this package. Every point is a process of its own.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.speed.environments import start
from benchmarks.speed.measuring import Prompt
from benchmarks.speed.options import make_assets, make_parser
from benchmarks.speed.suites import SUITES, our_spec

SUITE = SUITES["pythia"]
WARM_UP_PROMPTS = 8
BATCH, PROMPT, COMPLETION = 32, 256, 53
PROMPTS = (64, 128, 256, 512, 1024)
COMPLETIONS = (16, 32, 64, 128, 256)
BATCHES = (8, 16, 32, 64, 128, 256)

Point = dict[str, Any]


def main() -> None:
    """Measure every point, write the JSON file and the plot."""
    args = _arguments()
    python = Path(sys.executable)
    assets = make_assets(python, SUITE, args)
    stream = token_stream(assets)
    points = [_measured(point, stream, assets, args) for point in planned(args.batch, args.quick)]
    if args.json:
        args.json.write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    from benchmarks.speed.scaling_plot import save_plot  # noqa: PLC0415  (slow to import, for the end alone)

    save_plot(points, args.plot)
    print(f"{args.plot}")


def _arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--plot", type=Path, default=Path("scaling.png"), help="the plot, as PNG")
    parser.add_argument("--batch", type=int, default=BATCH, help="prompts of a step in the first two panels")
    parser.add_argument("--options", type=json.loads, default={}, help="our module's further arguments, as JSON")
    parser.add_argument("--quick", action="store_true", help="few small points: shows that it runs, measures nothing")
    return parser.parse_args()


def planned(batch: int, quick: bool) -> list[Point]:
    """List the points: each panel moves one number and keeps the other two."""
    few = 2 if quick else None
    points = [_point("prompt", length, COMPLETION, batch) for length in PROMPTS[:few]]
    points += [_point("completion", PROMPT, length, batch) for length in COMPLETIONS[:few]]
    points += [_point("batch", PROMPT, COMPLETION, size) for size in BATCHES[:few]]
    return points


def token_stream(assets: Path) -> list[int]:
    """Lay the suite's prompts end to end, so that prompts of any length can be cut from them."""
    lines = (assets / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [token for line in lines for token in json.loads(line)["prompt_ids"][1:]]


def windows(stream: list[int], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> list[Prompt]:
    """Cut `count` prompts of exactly `length` tokens from the stream, no two alike."""
    stride = (len(stream) - length) // count
    pieces = [stream[number * stride : number * stride + length] for number in range(count)]
    return [{"prompt": str(tokenizer.decode(piece)), "prompt_ids": piece} for piece in pieces]


def _point(panel: str, prompt: int, completion: int, batch: int) -> Point:
    return {"panel": panel, "prompt": prompt, "completion": completion, "batch": batch}


def _measured(point: Point, stream: list[int], assets: Path, args: argparse.Namespace) -> Point:
    tokenizer = AutoTokenizer.from_pretrained(assets / "policy")
    rows = windows(stream, tokenizer, point["prompt"], point["batch"] + WARM_UP_PROMPTS)
    file = assets / "scaling_prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = our_spec(SUITE, assets, point["batch"], args.options)
    spec |= {"prompts": str(file), "step_prompts": point["batch"], "new_tokens": point["completion"]}
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    output = start(sys.executable, "speed.worker_ours", json.dumps(spec), cwd=args.work, env=environment)
    result = json.loads(output.splitlines()[-1])
    print(f"{point}: {result['seconds_per_prompt']:.3f} s a prompt", file=sys.stderr, flush=True)
    return {**point, **result}


if __name__ == "__main__":
    main()
