"""What the fuzz tests put into the config of a small run: values of every key, fitting and not."""

import inspect
import math
from typing import Any, get_args

from hypothesis import strategies as st

from xpo_lightning import (
    BufferOptions,
    Candidates,
    LabelRule,
    ModelSpec,
    ReferenceRefresh,
    Sampling,
    XPOLightningModule,
)
from xpo_lightning.data import PromptDataModule
from xpo_lightning.models.policy import LoRASpec
from xpo_lightning.rewards import PythonReward, SequenceClassifierReward

_NUMBERS = [0, -1, 1, 2, 0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, 2**63, 10**30, True]
_WORDS = ["", " ", "x", "null", "1e-3", "ünï\u2028", "\x00", "\ud800", "~nobody/x", "/", ".", "a" * 400, "owner/name"]
_NESTED: list[Any] = [
    *([], {}, [1], [[]], ["x"], [None], {"a": 1}, {"class_path": 7}, {"class_path": "nowhere.Nothing"}),
    {"class_path": "Linear", "init_args": {"start": math.nan, "end": 1}},
    {"class_path": "xpo_lightning.losses.schedules.PerEpoch", "init_args": {"values": []}},
    {"class_path": "builtins.dict"},
    {"class_path": "SigmoidLoss", "init_args": {"label_smooth": 1}},
    {"init_args": {}},
]
_ANYTHING: list[Any] = [None, *_NUMBERS, *_WORDS, *_NESTED]

_SCHEDULES = [
    *(1e-3, [0.1], [0.1, 0], [1.0, 0.5], [math.nan], 1e38, -1e38),
    {"class_path": "Linear", "init_args": {"start": 1, "end": 0}},
    {"class_path": "Cosine", "init_args": {"start": 0.1, "end": math.inf, "steps": 1}},
    {"class_path": "Constant", "init_args": {"value": -1}},
    {"class_path": "PerEpoch", "init_args": {"values": [1, math.nan]}},
    {"class_path": "PerIteration", "init_args": {"values": [0.1, 0.0], "batches": 2}},
    {"class_path": "PerIteration", "init_args": {"values": []}},
]
_REWARDS = [
    {"class_path": "PythonReward", "init_args": {"function": "os.getcwd"}},
    {"class_path": "PythonReward", "init_args": {"function": "builtins.len"}},
    {"class_path": "PythonReward", "init_args": {"function": "builtins.dict"}},
    {"class_path": "PythonReward"},
    {"class_path": "WeightedSum", "init_args": {"rewards": {}}},
    {"class_path": "SequenceClassifierReward", "init_args": {"path": "./nowhere"}},
    {"class_path": "xpo_lightning.rewards.base.Feedback"},
    {"class_path": "PythonJudge", "init_args": {"function": "os.getcwd"}},
    {"class_path": "PythonJudge", "init_args": {"function": "builtins.dict", "invalid": "maybe"}},
    {"class_path": "HumanJudge"},
    {"class_path": "LocalJudge", "init_args": {"path": "./nowhere"}},
    {"class_path": "LocalJudge", "init_args": {"path": "./nowhere", "template": "{prompt}"}},
    {"class_path": "HTTPJudge", "init_args": {"url": "ftp://x", "model": "x"}},
    {"class_path": "HTTPJudge", "init_args": {"url": "http://127.0.0.1:9/v1", "model": "x", "retries": 0}},
    {"class_path": "HTTPJudge", "init_args": {"url": "http://a:b@x", "model": "x", "api_key_env": "NOT_SET"}},
    {"class_path": "RemoteReward", "init_args": {"url": "http://127.0.0.1:9", "retries": 0, "timeout": 5}},
    {"class_path": "RemoteReward", "init_args": {"url": "x", "batch_size": 0}},
]
PLAUSIBLE: dict[str, list[Any]] = {
    "model.policy": [{"path": "./nowhere"}, {"pth": "x"}, "x"],
    "model.policy.path": ["package:__main__/x", "package:xpo_lightning/embedded", "package:json/nothing", "./x.gguf"],
    "model.policy.dtype": ["auto", "bfloat16", "float16", "float64", "int8"],
    "model.policy.attn_implementation": ["eager", "sdpa", "flash_attention_2", "bogus"],
    "model.policy.tokenizer": ["./nowhere", "package:xpo_lightning/embedded"],
    "model.policy.chat_template": ["{{ messages", "{% for %}", "{{ 1 / 0 }}", "./nowhere.jinja"],
    "model.policy.gguf_file": ["x.gguf"],
    "model.policy.gradient_checkpointing": [True, False],
    "model.reward": _REWARDS,
    "model.reward.init_args.function": ["os.getcwd", "json.nothing", "nowhere.f", "builtins.print", "f", "os.sep"],
    "model.reward.init_args.arguments": [{"prompts": 1}, {"x": 1}, {"": None}, {"a b": 1}],
    "classifier.max_tokens": [4],
    "classifier.dtype": ["float32"],
    "classifier.truncate": ["left", "error"],
    "classifier.prompt_format": ["auto", "text", "chat"],
    "classifier.allow_untrained_head": [False],
    "model.lora": [{"r": 2}, {"r": 2, "rslora": True}, {"rank": 2}],
    "model.lora.r": [4, 300],
    "model.lora.target_modules": ["all-linear", ["q_proj"], ["nothing"], "(", ".*", "lm_head", ["embed_tokens"]],
    "model.sampling": [{"max_new_tokens": 2}, {"max_tokens": 2}],
    "model.sampling.max_new_tokens": [3, 10**9, 60],
    "model.sampling.temperature": [0.7, 1e-40, 1e38],
    "model.sampling.top_k": [5, 10**6],
    "model.sampling.top_p": [0.9, 1e-9],
    "model.sampling.min_p": [0.1],
    "model.sampling.repetition_penalty": [1.2, 1e38, 1e-40],
    "model.sampling.stop_strings": [["a"], ["a", ""], "a", ["\ud800"], ["e" * 200], ["\x00"]],
    "model.sampling.eos_token_ids": [[5], [], [5, 5], [-1], [10**30]],
    "model.alpha": _SCHEDULES,
    "model.beta": _SCHEDULES,
    "model.preference_loss": [
        *("SigmoidLoss", "IPOLoss", "HingeLoss", "RobustLoss", "DPOPositiveLoss"),
        {"class_path": "IPOLoss", "init_args": {"label_smoothing": 2}},
        {"class_path": "RobustLoss", "init_args": {"flip_rate": 0.1, "label_smoothing": 0.1}},
        {"class_path": "DPOPositiveLoss", "init_args": {"penalty": math.nan}},
        {"class_path": "SigmoidLoss", "init_args": {"length_normalized": "yes"}},
    ],
    "model.bonus_clip": [500, 1e-3],
    "model.bonus_on": ["sampler", "both", "rejected", "chosen"],
    "model.entropy_bonus": [0.1, 1e38],
    "model.alpha_in_beta": [True, False],
    "model.sampler": [
        *("ReferenceSampler", "PolicySampler", "PreviousPolicySampler", "xpo_lightning.Sampler"),
        {"class_path": "PreviousPolicySampler", "init_args": {"every": 0}},
        {"class_path": "PythonSampler", "init_args": {"function": "os.getcwd"}},
        {"class_path": "PythonSampler", "init_args": {"function": "builtins.dict", "timeout": math.nan}},
    ],
    "model.candidates": [{"count": 2, "choose": "best_of_each"}, {"count": 2}, {"choose": "worst"}],
    "model.candidates.count": [3, 10**6],
    "model.labels": [{"rule": "soft", "temperature": 0.1}, {"rule": "argmax", "temperature": 2.0}, {"ties": "draw"}],
    "model.labels.rule": ["bradley_terry", "soft", "hard"],
    "model.labels.flip": [0.2, 0.5],
    "model.labels.min_margin": [0.1, 1e300],
    "model.buffer": [{"keep": "all"}, {"keep": 2, "memory_pairs": 1}, {"keep": "some"}, {"keep": 0}],
    "model.reference_refresh": [{"every": 1}, {"every": 1, "mix": 0.5}, {"every": 0}, {"mix": 2}],
    "model.learning_rate": [1e-3, 1e20],
    "model.optimizer": [
        {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        {"class_path": "torch.optim.SGD", "init_args": {"lr": math.nan}},
        {"class_path": "torch.optim.AdamW", "init_args": {"betas": [2, 3]}},
        {"class_path": "torch.optim.Nothing"},
        {"class_path": "torch.optim.SparseAdam"},
    ],
    "model.lr_schedule": ["linear", "cosine", "constant", "step"],
    "model.lr_scheduler": [
        {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 0}},
        {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9}},
        {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 1}},
    ],
    "model.warmup_ratio": [0.1, 0.99],
    "model.max_grad_norm": [1e-9],
    "model.reference_cache": ["memory", "cache", __file__],
    "model.updates_per_rollout": [3],
    "model.epochs_per_rollout": [3],
    "data.source": ["./nowhere.jsonl", "package:json/x.jsonl", __file__, "x.parquet"],
    "data.validation_source": ["./nowhere.jsonl"],
    "data.split": ["train", "test"],
    "data.truncate": ["left", "drop", "error", "right"],
    "data.num_workers": [0],
    "seed_everything": [3, 2**32 - 1, 2**32, False],
    "trainer": [{"max_stps": 1}],
    "trainer.accelerator": ["cpu", "auto", "gpu", "tpu", "bogus"],
    "trainer.devices": [1, "1", "auto"],
    "trainer.strategy": ["auto", "bogus", {"class_path": "nowhere.Strategy"}],
    "trainer.precision": ["32-true", "bf16-mixed", "64-true", 16, 32],
    "trainer.limit_train_batches": [1, 0.5, 0],
    "trainer.limit_val_batches": [1, 0.5, 0],
    "trainer.max_time": ["00:00:01:00", {"seconds": 30}, "1h"],
    "trainer.logger": [True, False, {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}],
    "trainer.callbacks": [
        *([{"class_path": name}] for name in ("CompletionsTable", "LearningCurves", "Throughput", "ModelSummary")),
        [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "nothing"}}],
        [{"class_path": "EarlyStopping", "init_args": {"monitor": "nothing"}}],
        [{"class_path": "CompletionsTable", "init_args": {"row": 1}}],
    ],
    "trainer.profiler": ["simple", "advanced", "bogus"],
    "trainer.fast_dev_run": [True, 1],
    "trainer.num_sanity_val_steps": [2],
    "trainer.val_check_interval": [1, 0.5, 100],
    "trainer.default_root_dir": ["runs"],
    "ckpt_path": ["./nowhere.ckpt", "last", "best", "hpc", "registry", "http://x"],
    "model.alhpa": [1],
    "data.sampling.top_p": [1],
    "nothing": [1],
}
_TRAINER = [
    *("min_epochs", "min_steps", "max_epochs", "max_steps", "log_every_n_steps", "check_val_every_n_epoch"),
    *("overfit_batches", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "deterministic", "benchmark"),
    *("inference_mode", "use_distributed_sampler", "detect_anomaly", "barebones", "plugins", "sync_batchnorm"),
    "reload_dataloaders_every_n_epochs",
]
# More devices or workers would start processes; an end that is far away is no hang.
_NEVER: dict[str, list[Any]] = {
    "trainer": [{}, {"init_args": {}}],
    "trainer.devices": [2, 2**63, 10**30, [1], "2"],
    "data.num_workers": [1, 2, 2**63, 10**30],
    "trainer.max_epochs": [None, -1, 2**63, 10**30],
    "trainer.max_steps": [None, -1, 2**63, 10**30],
}


def _options_of(cls: Any, prefix: str) -> list[str]:
    names = inspect.signature(cls).parameters
    return [f"{prefix}.{name}" for name in names if name not in ("args", "kwargs")]


_CLASSES: dict[Any, str] = {
    ModelSpec: "model.policy",
    Sampling: "model.sampling",
    LoRASpec: "model.lora",
    Candidates: "model.candidates",
    LabelRule: "model.labels",
    BufferOptions: "model.buffer",
    ReferenceRefresh: "model.reference_refresh",
    PythonReward: "model.reward.init_args",
    SequenceClassifierReward: "classifier",
    XPOLightningModule: "model",
    PromptDataModule: "data",
}
KEYS = sorted(
    {
        *(key for cls, prefix in _CLASSES.items() for key in _options_of(cls, prefix)),
        *(f"trainer.{name}" for name in _TRAINER),
        *PLAUSIBLE,
    }
)


def _values(key: str) -> st.SearchStrategy[Any]:
    never = [repr(value) for value in _NEVER.get(key, [])]
    plausible, anything = (
        [value for value in values if repr(value) not in never] for values in (PLAUSIBLE.get(key, []), _ANYTHING)
    )
    choices = [st.sampled_from(plausible)] * (2 if plausible else 0)
    return st.one_of(
        *choices, st.sampled_from([v for v in _NUMBERS if repr(v) not in never]), st.sampled_from(anything)
    )


def _may_be_null(key: str) -> bool:
    for cls, prefix in _CLASSES.items():
        if key.startswith(f"{prefix}.") and key.removeprefix(f"{prefix}.") in inspect.signature(cls).parameters:
            annotation = inspect.signature(cls).parameters[key.removeprefix(f"{prefix}.")].annotation
            return type(None) in get_args(annotation)
    return not key.startswith(("model.", "data.", "classifier."))


changes = st.lists(
    st.sampled_from(KEYS).flatmap(lambda key: st.tuples(st.just(key), _values(key))),
    min_size=1,
    max_size=2,
    unique_by=lambda change: change[0],
)
"""One or two keys of a config with a value each."""

_SNIPPETS = [
    b"",
    b"\t",
    b"{",
    b": :",
    b"*a ",
    b"&a [*a]",
    b"!!python/name:os.system ",
    b"\x00",
    b"\xff",
    b"\n---\n",
    b"- ",
]
damages = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 10, 10_000]), st.sampled_from(_SNIPPETS))
"""Where in a config file, as a share of it; how many bytes are lost there; and which come in their place."""
