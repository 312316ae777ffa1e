"""Arithmetic for sizes that do not fit here: recipes and pages say what it gives, and small runs agree with it."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from test_configs import CONFIGS as RUNS
from test_configs import parse_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.memory import assets as memory_assets
from benchmarks.memory import cases, worker
from benchmarks.memory.cases import CASES
from benchmarks.scale import floors, public_models, recipes, tables
from benchmarks.scale.floors import flop_shape
from benchmarks.scale.public_models import LLAMA_8B
from benchmarks.scale.shapes import RunInputs, estimate_sharded
from benchmarks.speed import flops
from benchmarks.speed.assets import PYTHIA_14M
from xpo_lightning.reporting.memory.fsdp import Sharding
from xpo_lightning.reporting.memory.model_shape import Shape, weight_count

ROOT = Path(__file__).parents[2]
SCALE = RUNS / "scale"
GIB = 2**30


# ---- recipes ----


def test_every_recipe_is_one_that_is_counted():
    assert {file.stem for file in SCALE.glob("*.yaml")} == set(recipes.NAMES)


@pytest.mark.parametrize("file", sorted(SCALE.glob("*.yaml")), ids=lambda file: file.stem)
def test_header_of_a_recipe_states_the_memory_that_is_worked_out(file: Path):
    memory = recipes.memory_of(recipes.read_recipe(file.stem))
    header = file.read_text().split("\n\n")[0]
    stated = re.search(r"# Memory +([\d.]+) GiB .*, ([\d.]+) of them all the time", header)
    assert stated
    assert stated.groups() == (f"{memory.peak / GIB:.1f}", f"{memory.standing / GIB:.1f}")
    assert "How long       not run" in header


@pytest.mark.parametrize(
    ("name", "gigabytes", "taken_by_others"),
    [
        *(("1b_one_gpu", 48, 1), ("math_one_gpu", 24, 1), ("8b_lora_one_gpu", 80, 1), ("8b_lora_vllm", 80, 1)),
        *(("8b_qlora_small_gpu", 24, 1), ("8b_full_8_gpus", 141, 2), ("8b_full_nodes", 80, 2)),
        *(("8b_full_8_gpus_vllm", 80, 2), ("70b_lora_8_gpus_vllm", 80, 2)),
    ],
)
def test_a_recipe_fits_the_gpu_that_it_asks_for(name: str, gigabytes: int, taken_by_others: int):
    assert f"{gigabytes} GB" in (SCALE / f"{name}.yaml").read_text().split("\n\n")[0]
    room = gigabytes * 1e9 - taken_by_others * GIB
    assert recipes.memory_of(recipes.read_recipe(name)).peak < room


def test_scoring_layer_by_layer_leaves_a_quarter_of_80_gb_free():
    """The room that the page asks for under FSDP2: of the rows of its table with an engine, and of the recipe."""
    room = 0.75 * 80e9
    for name, shape, kind, sharding in tables.WORKED:
        if sharding.engine:
            assert estimate_sharded(tables.worked_plan(shape, kind), sharding).peak < room, name
    for name in ("8b_full_8_gpus_vllm", "70b_lora_8_gpus_vllm"):
        assert recipes.memory_of(recipes.read_recipe(name)).peak < room, name


def test_parts_of_a_sharded_run_with_an_engine_are_worked_by_hand():
    """A policy of 2 layers of 640 weights and 2 x 8 of norms, an embedding and a head of 100 x 8, a last norm of 8.

    1312 + 1608 = 2920 weights, 11,680 bytes in float32; the root has 1608, a layer 656 weights. Over 4 processes, the
    reference in main memory: 11,680 / 4 of the policy, as much of the gradient, twice that of Adam. In a pass, the root
    and 3 layers: 4 x (1608 + 3 x 656) = 14,304. Reduced with each micro-batch, the gradient of root and layer, and a
    buffer as large as the root's.
    """
    shape = Shape(layers=2, hidden=8, heads=4, kv_heads=4, head_dim=2, intermediate=16, vocabulary=100)
    plan = RunInputs(policy=shape)
    foot = estimate_sharded(plan, Sharding(4, engine=True, reduces_each=True, offloads=True))
    assert (foot.parts, foot.gradients, foot.optimizer) == (2920, 2920, 5840)
    assert foot.whole == foot.passing == 14_304
    assert foot.summing == 4 * (1608 + 656) + 4 * 1608
    without = estimate_sharded(plan, Sharding(4))
    assert (without.parts, without.whole, without.summing) == (5840, 2 * 11_680, 11_680 + 4 * 1608)


def test_recipes_are_read_as_the_command_line_reads_them():
    """Overlays too: what the arithmetic takes from the files is what a run would."""
    for name in recipes.NAMES:
        ours, theirs = recipes.read_recipe(name), parse_file(SCALE / f"{name}.yaml")
        model, data = theirs.model, theirs.data
        assert ours["model"]["policy"]["path"] == model.policy.path
        assert ours["model"]["policy"].get("quantize") == model.policy.quantize
        assert ours["model"]["reward"]["init_args"].get("path") == model.reward.init_args.get("path")
        assert ours["model"]["micro_batch_size"] == model.micro_batch_size
        assert ours["model"]["rollout_batch_size"] == model.rollout_batch_size
        assert (ours["data"]["batch_size"], ours["data"]["max_prompt_tokens"]) == (
            data.batch_size,
            data.max_prompt_tokens,
        )
        assert ours["trainer"].get("num_nodes", 1) == theirs.trainer.num_nodes


def test_the_job_script_starts_a_process_for_each_gpu_of_its_recipe():
    script, trainer = (SCALE / "8b_full_nodes.sbatch").read_text(), recipes.read_recipe("8b_full_nodes")["trainer"]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.MULTILINE))
    assert int(options["nodes"]) == trainer["num_nodes"]
    assert int(options["ntasks-per-node"]) == int(options["gpus-per-node"]) == trainer["devices"]
    for file in re.findall(r"--config (\S+)", script):
        assert (ROOT / file).is_file()


def test_the_job_script_with_a_server_runs_both_and_ends_as_the_run_does(tmp_path: Path):
    """With stand-ins for `xpo` and `curl`: the server is up before the run, gone after it; the status is the run's."""
    notes = tmp_path / "notes"
    xpo = f"""#!/bin/bash
echo "$1 on $CUDA_VISIBLE_DEVICES: ${{*:2}}" >> {notes}
if [ $1 = serve ]; then trap "echo served >> {notes}; exit" TERM; while true; do sleep 0.05; done; fi
trap "echo stopped >> {notes}; exit 143" TERM
touch {tmp_path}/runs; while [ -e {tmp_path}/runs ]; do sleep 0.05; done; exit 3
"""
    curl = f"#!/bin/bash\n[ $(wc -l < {notes}) -ge 1 ]\n"
    for name, text in {"xpo": xpo, "curl": curl, "sleep": '#!/bin/bash\n/bin/sleep "${1/5/0.1}"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    configs = "--config configs/scale/8b_lora_one_gpu.yaml --config configs/scale/8b_lora_vllm.yaml"
    expected = [f"serve on 1: {configs} --start", f"fit on 0: {configs} --ckpt_path last"]
    for is_stopped, status, last in ((False, 3, ["served"]), (True, 143, ["stopped", "served"])):
        notes.write_text("")
        job = subprocess.Popen(["bash", str(SCALE / "8b_lora_vllm.sbatch")], env=environment, cwd=ROOT)
        wait_for(tmp_path / "runs")
        if is_stopped:
            job.terminate()
        else:
            (tmp_path / "runs").unlink()
        assert job.wait(20) == status
        (tmp_path / "runs").unlink(missing_ok=True)
        assert notes.read_text().splitlines() == [*expected, *last]


def wait_for(file: Path) -> None:
    end = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_four_bit_weights_are_counted_by_hand():
    """Blocks of 64 have a byte of scale, and 256 blocks a float32: 0.5 + 1/64 + 4/16384 = 0.515869140625 bytes.

    Llama 3.1 8B: layers' matrices are 32 x 218,103,808 = 6,979,321,856 weights; embedding, head and norms the other
    1,050,939,392, of 2 bytes.
    """
    assert recipes.NF4 == 0.515869140625
    assert recipes.quantized_bytes(LLAMA_8B) == int(6_979_321_856 * 0.515869140625) + 2 * 1_050_939_392
    assert recipes.largest_matrix(LLAMA_8B) == 4096 * 14336


@pytest.mark.parametrize(
    ("name", "weights"),
    # Qwen's page states 1,543,714,304 with the biases of queries, keys and values: 28 x (1536 + 2 x 256) = 57,344.
    [
        ("LLAMA_1B", 1_235_814_400),
        ("QWEN_1_5B", 1_543_714_304 - 57_344),
        ("LLAMA_8B", 8_030_261_248),
        ("LLAMA_70B", 70_553_706_496),
    ],
)
def test_public_models_have_the_weights_that_their_pages_state(name: str, weights: int):
    assert weight_count(getattr(public_models, name)) == weights


# ---- the page ----


def test_every_table_of_the_page_is_what_the_arithmetic_gives():
    page = tables.PAGE.read_text()
    assert tables.filled(page) == page, "run: python -m benchmarks.scale.tables --write"
    assert page.count("<!-- table: ") == len(tables.TABLES)


def test_ratios_that_the_page_names_are_those_of_its_tables():
    page, rows = tables.PAGE.read_text(), {}
    for name in ("flop", "decoding"):
        (table,) = re.findall(rf"<!-- table: {name} -->\n(.*?)<!-- end", page, re.DOTALL)
        rows[name] = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    shares = [(float(row[5]) + float(row[6])) / float(row[7].replace(",", "")) for row in rows["flop"]]
    said = " and ".join(["{:.0%} of the products at 1B, {:.0%} at 8B", "{:.0%} at 70B"]).format(*shares)
    assert said in " ".join(page.split())
    token = {(row[0], row[2]): float(row[4]) for row in rows["decoding"]}
    ratios = sorted(token[policy, "256"] / token[policy, "16"] for policy in ("1B", "8B", "70B"))
    assert f"{ratios[0]:.1f} to {ratios[-1]:.1f} times as long as one of 16 prompts" in page


def test_measured_runs_are_those_of_the_command_and_within_the_error_that_the_page_states():
    results = json.loads(tables.MEASURED.read_text())
    assert [each["name"] for each in results] == list(cases.CASES)
    errors = [cases.predicted(cases.CASES[each["name"]])["peak"] / each["tensors"] for each in results]
    stated = re.search(r"between ([\d.]+) and ([\d.]+) times", tables.PAGE.read_text())
    assert stated
    assert stated.groups() == (f"{min(errors):.2f}", f"{max(errors):.2f}")


# ---- time ----


def test_products_of_gradient_checkpointing_worked_by_hand():
    """A layer of 8 x 8 x 4 of attention and 3 x 8 x 16: 640 weights, 1280 FLOP a position; attention 4 x 8 = 32 a pair.

    P = 4, T = 2. Shared: 4 positions, 10 pairs; twice 1 position with 5 pairs: 6 x 1280 + 20 x 32 = 8320.
    Apart: twice 5 positions, 15 pairs: 10 x 1280 + 30 x 32 = 13,760. Four times this less three times that.
    """
    shape = Shape(layers=1, hidden=8, heads=4, kv_heads=4, head_dim=2, intermediate=16, vocabulary=100)
    assert floors.flop_shape(shape).body == 640
    assert floors.checkpointed_extra(shape, 4, 2) == 4 * 13_760 - 3 * 8320


def test_decoding_one_row_takes_as_long_as_reading_the_weights():
    """Llama 3.1 8B: 2 x 8,030,261,248 bytes, and 131,072 for each of 1280 tokens, at 3.35e12 bytes a second."""
    floor = floors.decoding(LLAMA_8B, 1, 1024, 512, 1)
    assert floor.step_bytes == 2 * 8_030_261_248 + 131_072 * 1280
    assert floor.token_seconds == pytest.approx(floor.step_bytes / 3.35e12)
    assert floor.bound_by == "bytes"
    assert floors.decoding(LLAMA_8B, 1, 1024, 512, 2).token_seconds == pytest.approx(floor.token_seconds / 2)


# ---- the meter ----


def test_memory_whose_release_was_not_seen_counts_until_its_address_is_given_out_anew():
    """By hand: 8 + 4, then 8 at a place that overlaps both, which are gone: 8; 2 more, then less those."""
    assert worker.most_bytes([(100, 8), (110, 4), (105, 8), (200, 2), (105, -8)]) == 12
    assert worker.most_bytes([(100, 8), (100, 8), (108, 3), (90, 10)]) == 21, "neighbours do not overlap"
    assert worker.most_bytes([(100, -5), (200, 4)]) == 0, "what was there before is in the weights"


# ---- small runs ----

SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a policy of 14 million weights."""
    folder = tmp_path_factory.mktemp("assets")
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).save_pretrained(folder / "policy")
    make_tokenizer().save_pretrained(folder / "policy")
    return folder


def take_steps(spec: dict[str, Any], results: Path) -> list[dict[str, float]]:
    results.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.memory.worker", json.dumps({**spec, "results": str(results)})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "processes"),
    [
        ({}, 1),
        ({"checkpointing": True}, 1),
        pytest.param({"processes": 2}, 2, marks=pytest.mark.slow),
    ],
    ids=["plain", "gradient checkpointing", "FSDP2"],
)
def test_a_real_run_takes_the_memory_that_is_worked_out(
    assets: Path, tmp_path: Path, options: dict[str, Any], processes: int
):
    """To a tenth of the peak of tensors of one process; each takes up to 0.8 GiB, the page's limit, beyond tensors."""
    case = replace(cases.CASES["smollm2"], reward_model=False, prompts=8, micro_batch_size=4, **options)
    shape = Shape.of(LlamaConfig(**SMALL))
    expected = cases.predicted(case, shape)["peak"]
    spec = case.spec(assets)
    watched = take_steps({**spec, "tensors": True}, tmp_path / "tensors")
    assert len(watched) == processes
    tensors = [each["tensors"] for each in watched]
    assert tensors == pytest.approx([expected] * processes, rel=0.1)
    for each in take_steps({**spec, "tensors": False}, tmp_path / "process"):
        assert 0.9 * expected < each["process"] < expected + 0.8 * GIB


@pytest.mark.slow
def test_torch_counts_the_products_that_are_worked_out(assets: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the second step, attention left out: torch has no count for it on a CPU."""
    from lightning.pytorch import Callback
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(
        "xpo_lightning.models.forward.cpu.prefers_onednn", lambda: False
    )  # torch knows nothing of its products
    counter = FlopCounterMode(display=False)

    class Count(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                counter.__enter__()

        def on_train_batch_end(self, *args: Any) -> None:
            if args[-1] == 1:
                counter.__exit__(None, None, None)

    case = replace(CASES["smollm2"], reward_model=False, prompts=4, prompt_tokens=32, new_tokens=8)
    worker.fit(worker.make_module(case.spec(assets)), case.spec(assets), Count())
    shape = replace(flop_shape(Shape.of(LlamaConfig(**SMALL))), attention=0)
    parts = flops.step_flop(shape, 32, 8)
    del parts["reward"]
    assert counter.get_total_flops() == pytest.approx(case.prompts * sum(parts.values()), rel=0.02)


def test_the_shapes_of_measured_models_are_those_of_their_configs():
    from transformers import GPTNeoXConfig

    assert Shape.of(GPTNeoXConfig(**PYTHIA_14M)) == cases.SHAPES["pythia"]
    assert Shape.of(LlamaConfig(**memory_assets.LLAMA_300M)) == cases.SHAPES["llama-300m"]
