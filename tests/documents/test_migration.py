"""The page for people who come from TRL: it forgets no option of TRL's, and what it names here exists."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from test_configs import CONFIGS, parse

PAGE = CONFIGS.parent / "docs" / "migration.md"
TLDR = CONFIGS / "tldr.yaml"
KEY = r"(?:(?:model|data|trainer|defaults)\.[\w.]*\w|seed_everything|ckpt_path|config)"

# TRL 1.13.0's names, with transformers 5.23.0; `warmup_ratio` is an older transformers'.
TRL = {
    "`XPOConfig`": "alpha",
    "`OnlineDPOConfig`": """
        learning_rate remove_unused_columns reward_model_path max_new_tokens max_length temperature top_p top_k min_p
        repetition_penalty generation_kwargs cache_implementation missing_eos_penalty beta loss_type disable_dropout
        use_vllm vllm_model_impl vllm_structured_outputs_regex vllm_gpu_memory_utilization vllm_mode
        vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
        vllm_tensor_parallel_size vllm_enable_sleep_mode ds3_gather_for_generation model_init_kwargs trust_remote_code
        reward_weights
        """,
    "`TrainingArguments` with a default of TRL's own": """
        logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel torch_empty_cache_steps
        """,
    "Other `TrainingArguments`": """
        output_dir per_device_train_batch_size num_train_epochs max_steps lr_scheduler_type warmup_ratio warmup_steps
        optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
        gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor fp16
        bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs
        gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode liger_kernel_config
        use_cache neftune_noise_alpha auto_find_batch_size logging_strategy logging_first_step log_on_each_node
        logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name
        project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
        per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
        eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps
        save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
        hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
        ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
        accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
        label_names train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
        skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
        """,
    "Arguments of the trainers": """
        model ref_model reward_funcs args data_collator train_dataset eval_dataset processing_class
        reward_processing_classes peft_config compute_metrics callbacks optimizers preprocess_logits_for_metrics
        """,
    "Arguments of the example script": """
        config dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming ignore_bias_buffers
        model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha lora_dropout
        lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit
        load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
        """,
    "Options of older releases": "reward_model judge",
}
# The key of ours that can name each class of ours.
CLASSES = {
    **dict.fromkeys(["SequenceClassifierReward", "PythonReward", "WeightedSum"], "model.reward"),
    **dict.fromkeys(["PythonJudge", "LocalJudge", "HTTPJudge"], "model.reward"),
    **dict.fromkeys(["PolicySampler", "PythonSampler"], "model.sampler"),
    **dict.fromkeys(["SigmoidLoss", "IPOLoss"], "model.preference_loss"),
    **dict.fromkeys(["RunCheckpoint", "PolicyExport", "Throughput"], "trainer.callbacks"),
    "DDPStrategy": "trainer.strategy",
}
OTHER_CLASSES = {
    *("XPOTrainer", "XPOConfig", "OnlineDPOTrainer", "OnlineDPOConfig", "TrainingArguments"),
    *("LoadedModel", "XPOLightningModule"),
    "VLLMRollout",
    "FSDP2Strategy",
}
# What the page's keys need before they are there: groups that are null by default, and options of torch's classes.
GROUPS = """
model:
  lora: {}
  buffer: {}
  reference_refresh: {every: 1}
  learning_rate: null
  optimizer: {class_path: torch.optim.AdamW}
  lr_schedule: null
  lr_scheduler: {class_path: torch.optim.lr_scheduler.ConstantLR}
"""


def spans() -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGE.read_text(), flags=re.DOTALL | re.M)))


def rows(section: str) -> list[list[str]]:
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("| `")]


def yaml_blocks() -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def leaves(settings: dict, path: str = "") -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        key = f"{path}{name}"
        if isinstance(value, dict):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def parsed_with(tmp_path: Path, *overlays: str) -> Namespace:
    files = [tmp_path / f"{number}.yaml" for number, _ in enumerate(overlays)]
    for file, text in zip(files, overlays, strict=True):
        file.write_text(text)
    return parse("fit", *(word for file in [TLDR, *files] for word in ("--config", str(file))))


@pytest.mark.parametrize("section", TRL)
def test_each_option_of_trl_has_one_row_and_nothing_else_has(section):
    named = [name for row in rows(section) for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(TRL[section].split())


@pytest.mark.parametrize("section", TRL)
def test_each_row_names_a_key_of_ours_or_says_none_and_what_then(section):
    for trl, ours, *more in rows(section):
        if ours == "none":
            assert len(more[0]) > 15, trl
        elif verb := re.fullmatch(r"`xpo (\w+) --(\w+)`(?:, `--(\w+)`)*", ours):
            function = getattr(importlib.import_module(f"xpo_lightning.cli.commands.{verb[1]}"), verb[1])
            assert {*verb.groups()[1:]} <= inspect.signature(function).parameters.keys(), trl
        else:
            assert re.search(rf"`(?:{KEY}(?:: [^`]+)?|[A-Z]\w+\.\w+)`", ours), trl


def test_keys_that_the_page_names_are_options_of_the_command_line(tmp_path):
    config = parsed_with(tmp_path, GROUPS)
    keys = {found[1] for span in spans() if (found := re.fullmatch(rf"({KEY})(?:: .+)?", span))}
    assert len(keys) > 90
    assert {key for key in keys if key not in config} == set()


def test_settings_that_the_page_gives_are_taken(tmp_path):
    given = [found.groups() for span in spans() if (found := re.fullmatch(rf"({KEY}): (.+)", span))]
    assert len(given) > 10
    rounds: list[dict[str, str]] = []  # Two values of a key cannot be set at once.
    for key, value in given:
        free = next((settings for settings in rounds if key not in settings), None)
        if free is None:
            rounds.append(free := {})
        free[key] = value
    for settings in rounds:
        config = parse("fit", "--config", str(TLDR), *(f"--{key}={value}" for key, value in settings.items()))
        for key, value in settings.items():
            assert config[key] == yaml.safe_load(value), key


@pytest.mark.parametrize("name", CLASSES)
def test_class_that_the_page_names_can_be_chosen_and_has_the_options(name, capsys):
    options = {span.split(".")[1] for span in spans() if span.startswith(f"{name}.")}
    with pytest.raises(SystemExit) as stopped:
        parse("fit", f"--{CLASSES[name]}.help", name)
    shown = capsys.readouterr()
    assert stopped.value.code == 0, shown.err
    assert {option for option in options if f"--{CLASSES[name]}.{option} " not in shown.out} == set()


def test_no_class_that_the_page_names_goes_unchecked():
    named = {found[1] for span in spans() if (found := re.fullmatch(r"([A-Z]\w*[a-z]\w*)(?:\.\w+)?", span))}
    assert named == CLASSES.keys() | OTHER_CLASSES


def test_example_is_the_tldr_config(tmp_path):
    example, whole = yaml.safe_load(yaml_blocks()[0]), parsed_with(tmp_path)
    settings = dict(leaves(example))
    assert settings.pop("model.reward.class_path") == whole.model.reward.class_path.split(".")[-1]
    assert {key: whole[key] for key in settings} == settings


@pytest.mark.parametrize("number", range(1, 3))
def test_overlay_of_the_page_is_taken_with_its_values(number, tmp_path):
    block = yaml_blocks()[number]
    config = parsed_with(tmp_path, block)
    for key, value in leaves(yaml.safe_load(block)):
        got = config[key]
        assert (got.class_path.split(".")[-1] if isinstance(got, Namespace) else got) == value, key


def test_there_are_no_blocks_of_yaml_but_those_tested():
    assert len(yaml_blocks()) == 3
