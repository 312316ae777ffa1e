"""Tiny models and tokenizers that every test shares, and short ways to build and train a module."""

import gc
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Also for the processes that tests start: threads of two workers that wait for each other spin, and take the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from xpo_lightning import LoadedModel, ModelSpec, Prompts, Sampling, XPOLightningModule
from xpo_lightning.core.batch import Completions, left_pad
from xpo_lightning.core.rng import RolloutRNG
from xpo_lightning.rewards.python import PythonReward
from xpo_lightning.rollout import opening, replay

# Fixtures of tests/callbacks, tests/cli, tests/data, tests/rewards and tests/rollout.
pytest_plugins = ["check_bench", "prompt_files", "reward_server", "scoring", "vllm_rollouts", "watched_runs"]
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup; processes that tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

VOCABULARY = 304  # more rows than the tokenizer has tokens, as in most published models
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["the cat sat on the mat and the dog ran away from the red hat today"] * 4
TESTS = Path(__file__).parent
FOLDERS = [TESTS.parent, TESTS, *sorted(path for path in TESTS.iterdir() if path.is_dir())]
TEST_PATHS = os.pathsep.join(map(str, FOLDERS))
"""For the PYTHONPATH of processes that import test modules."""

BARE = {
    "baseline": False,
    "completions_table": False,
    "policy_export": False,
    "policy_watch": False,
    "learning_curves": False,
    "run_report": False,
    "run_summary": False,
}
"""Of a config's `defaults`, for runs that leave only their numbers and checkpoints."""

PROMPTS = ["the cat", "a dog ran away from the hat and", "red", "on the mat today", "sat"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**ROPE, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**ROPE),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    # Both windows are shorter than the prompts of the tests; Gemma 2 alternates them with full attention.
    "mistral_sliding": lambda: transformers.MistralConfig(**GROUPED, sliding_window=4),
    "gemma2_sliding": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4),
}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "distinct": {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "prefix": "<bos>"},
    "pad_is_eos": {"pad_token": "<eos>", "bos_token": "<bos>", "eos_token": "<eos>", "prefix": "<bos>"},
    "bos_is_eos": {"bos_token": "<eos>", "eos_token": "<eos>", "unk_token": "<eos>", "prefix": "<eos>"},
    "no_pad": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "chat": {"pad_token": "<pad>", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE},
}


def pytest_collection() -> None:
    """Look for no garbage while tests are imported: what is imported stays, and to look through it takes seconds."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Look for garbage again, but seldom through all that is alive, of which there is a lot in a long run of tests."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(2_000, 20, 100)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_proxy() -> Iterator[None]:
    """Let no proxy of the machine between a test and its servers."""
    # Not by the fixture `monkeypatch`: what a test patches would then be undone after its other fixtures have ended.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        yield


@pytest.fixture(autouse=True)
def _no_run_is_joined() -> Iterator[None]:
    """Forget what Lightning tells the processes of a run by the environment: a later test would join that run."""
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


# ---- tokenizers and models ----


def make_tokenizer(kind: str = "distinct") -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer; id 0 is an ordinary token, so that 0 cannot pass for padding unnoticed."""
    special = dict(TOKENIZERS[kind])
    prefix, chat_template = special.pop("prefix", None), special.pop("chat_template", None)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=sorted(alphabet)))
    tokenizer.add_special_tokens(SPECIAL)
    if prefix is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A", special_tokens=[(prefix, tokenizer.token_to_id(prefix))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Give a function from architecture and tokenizer kind to a folder that holds both."""
    folders: dict[tuple[str, str], str] = {}

    def folder(arch: str = "llama", tokenizer: str = "distinct") -> str:
        if (arch, tokenizer) not in folders:
            path = tmp_path_factory.mktemp(f"{arch}-{tokenizer}")
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model = AutoModelForCausalLM.from_config(CONFIGS[arch]())
            model.save_pretrained(path)
            make_tokenizer(tokenizer).save_pretrained(path)
            folders[arch, tokenizer] = str(path)
        return folders[arch, tokenizer]

    return folder


@pytest.fixture(scope="session")
def load_model(model_folder: Callable[..., str]) -> Callable[..., nn.Module]:
    """Give a function that loads a fresh copy of a saved model with transformers alone, in eval mode."""
    return lambda arch="llama", **options: AutoModelForCausalLM.from_pretrained(model_folder(arch), **options).eval()


@pytest.fixture(params=CONFIGS)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class ChainModel(nn.Module):
    """A causal language model whose next token depends on the last one alone, almost surely the one it is told.

    Args:
        follows: Which token follows which; every other token is followed by `otherwise`.
        otherwise: See `follows`.
    """

    def __init__(self, follows: dict[int, int], otherwise: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig(**{**ROPE, "vocab_size": vocabulary})
        table = torch.zeros(vocabulary, vocabulary)
        for token in range(vocabulary):
            table[token, follows.get(token, otherwise)] = 60.0  # e^-60 for any other token
        self.table = nn.Embedding.from_pretrained(table, freeze=False)
        self.seen: list[tuple[int, int]] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.table(input_ids))


class Captures:
    """Takes a step again where a GPU would replay it, and counts.

    As on a GPU, the step is taken once before. When it is taken again, it knows no more than a graph does: the buffers
    of its workspace, and the model's weights.
    """

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        step()

        def replayed() -> None:
            self.replayed += 1
            step()

        return replayed


@contextmanager
def replaying_on_a_cpu() -> Iterator[Captures]:
    """Let a CPU take the steps that a GPU replays."""
    captures = Captures()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "REPLAYING", {"cpu"})
        patch.setattr(replay, "capture", captures)
        yield captures


# ---- batches ----


def prompts_of(rows: Sequence[Sequence[int]]) -> Prompts:
    """Batch token rows as prompts."""
    ids, mask = left_pad(rows)
    return Prompts(ids, mask, tuple(f"prompt {number}" for number in range(len(rows))))


def completions_of(rows: Sequence[Sequence[int]], ended: Sequence[bool] | None = None) -> Completions:
    """Batch token rows as completions; the log-probabilities are 0."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width)[None] < torch.tensor([len(row) for row in rows])[:, None]
    flags = torch.tensor([True] * len(rows) if ended is None else list(ended))
    return Completions(ids, mask, flags, tuple("" for _ in rows), torch.zeros(ids.shape))


def random_rows(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Draw token rows of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def noise(seed: int = 0) -> RolloutRNG:
    return RolloutRNG(seed)


def naive_token_logps(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
    """Score one row alone: no padding, no cache, no position ids, log-softmax of every position in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
    logps = logits.log_softmax(-1)
    return [float(logps[len(prompt) - 1 + step, token]) for step, token in enumerate(completion)]


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """Compute the logits of one fixed row of tokens."""
    return model(input_ids=torch.tensor([[5, 60, 120, 33, 7, 250]])).logits


# ---- modules and runs ----


def longer_is_better(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """Score a completion by its length and by how often it has an e, which hardly ever ties."""
    return [len(text) + 0.01 * text.count("e") for text in completions]


@pytest.fixture
def make_module(model_folder: Callable[..., str]) -> Callable[..., XPOLightningModule]:
    """Give a function that builds a module of a saved model; `spec` are further options of its `ModelSpec`."""

    def make(
        arch: str = "llama", tokenizer: str = "distinct", spec: dict[str, Any] | None = None, **options: Any
    ) -> XPOLightningModule:
        options.setdefault("policy", ModelSpec(model_folder(arch, tokenizer), **spec or {}))
        options.setdefault("reward", PythonReward(longer_is_better))
        options.setdefault("sampling", Sampling(max_new_tokens=6))
        return XPOLightningModule(**options)

    return make


def chain_module(model: ChainModel, tokenizer: PreTrainedTokenizerFast, **options: Any) -> XPOLightningModule:
    """Build a module whose policy and reference are a chain model."""
    options.setdefault("reward", PythonReward(longer_is_better))
    return XPOLightningModule(policy=LoadedModel(model, tokenizer), **options)


@dataclass
class Recorder(pl.Callback):
    """Keeps what was logged at each training step."""

    steps: list[dict[str, float]] = field(default_factory=list)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def of(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def quiet_trainer(**options: Any) -> pl.Trainer:
    """Build a trainer that writes nothing and prints nothing."""
    silent = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **silent, **options})


def loader(prompts: Sequence[Any], batch_size: int | None = None) -> torch.utils.data.DataLoader:
    """Batch prompts in their order; all together where there is no batch size."""
    return torch.utils.data.DataLoader(list(prompts), batch_size=batch_size or len(prompts), collate_fn=list)


def fit_quietly(
    module: XPOLightningModule, prompts: Sequence[Any], batch_size: int | None = None, seed: int = 0, **options: Any
) -> pl.Trainer:
    """Train on prompts and return the trainer."""
    trainer = quiet_trainer(**options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        torch.manual_seed(seed)
        trainer.fit(module, loader(prompts, batch_size))
    return trainer


def randomize_adapters(model: nn.Module, scale: float = 0.3, seed: int = 3) -> None:
    """Give every LoRA weight a random value; fresh adapters change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
