"""A tiny random model of every family in transformers' causal-LM mapping, found by walking the mapping."""

import dataclasses
import zlib
from typing import Any

import torch
from conftest import VOCABULARY
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zoo.strangers import STRANGERS, StrangerConfig

MARK = 8  # every window, chunk and context mark: prompts are of 2 to 30 tokens
LONGEST = 64  # context
PAD = 1  # for the families that cannot be without a pad id; no prompt holds it

FIELDS = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    (LONGEST, "max_position_embeddings n_positions max_target_positions n_ctx context_length"),
    (MARK, "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size chunk_size"),
    (MARK, "local_attention local_attention_window_len keep_window_size block_size mamba_chunk_size index_topk"),
    (
        MARK,
        "index_block_size indexer_budget original_max_position_embeddings floor_scale log_scaling_n_floor rel_extent",
    ),
    (64, "hidden_size n_embd d_model emb_dim embedding_size lru_width out_hidden_size hidden_size_global"),
    (64, "adapter_in_dim adapter_out_dim adapter_input_size input_embedding_size output_embedding_size"),
    (48, "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dim_ff dff ffn_hidden_size"),
    (48, "dense_intermediate_size intermediate_size_mlp mlp_dim feed_forward_size"),
    (32, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size"),
    (32, "shared_experts_intermediate_size moe_shared_expert_intermediate_size prefix_dense_intermediate_size"),
    (24, "kv_lora_rank q_lora_rank o_lora_rank"),
    (16, "head_dim v_head_dim global_head_dim swa_head_dim swa_v_head_dim dim_head d_head d_kv qk_nope_head_dim"),
    (16, "qk_rope_head_dim kv_channels rotary_dim linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (16, "mamba_head_dim mamba_d_head index_head_dim indexer_head_dim attention_head_size d_rel laurel_rank"),
    (16, "state_size ssm_state_size mamba_d_state router_hidden_size hidden_size_per_layer_input"),
    (16, "downsample_hidden_size pronunciation_vocab_size shape_vocab_size nemo_conv_channels ext_pw_out_channel"),
    (16, "depthwise_separable_out_channel output_channels"),
    (8, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads"),
    (4, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads"),
    (4, "linear_num_value_heads index_n_heads indexer_n_heads num_experts num_local_experts n_routed_experts"),
    (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_decoder_layers"),
    (2, "num_encoder_layers num_blocks num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads"),
    (2, "num_experts_per_tok moe_topk moe_k top_k_experts zero_expert_num mamba_n_groups n_groups"),
    (2, "indexer_compress_ratio"),
    (1, "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers"),
    (1, "indexer_kv_heads index_topk_blocks"),
    (None, "bos_token_id eos_token_id pad_token_id"),
]
TINY = {name: value for value, names in FIELDS for name in names.split()}
"""Values of fields, for each configuration that has them."""

DECODER = {"is_decoder": True}
LATENT = {"num_key_value_heads": 4}  # latent attention has as many keys as queries
LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
LOUD = {"logit_scale": 1.0}  # as published, logits of random weights would be all alike
PADDED = {"pad_token_id": PAD, "bos_token_id": PAD, "eos_token_id": PAD}
COUNTS_FROM_PAD = {"pad_token_id": PAD, "max_position_embeddings": LONGEST + PAD + 1}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert", "rembert"), DECODER),
    **dict.fromkeys(("roc_bert", "roformer"), DECODER),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), DECODER | COUNTS_FROM_PAD),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), DECODER | COUNTS_FROM_PAD),
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), LOUD),
    **dict.fromkeys(("emu3_text_model", "mllama_text_model", "modernbert-decoder"), PADDED),
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None},
    },
    "cwm": PADDED | {"eos_token_id": [PAD]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "moe_top_k": 2},
    },
    "diffllama": {"attention_dropout": 0.0},  # has none
    "dots3_note_text": LATENT
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 24}
    | {"swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4_text": {"pad_token_id": PAD},
    "gemma4_unified_text": {"pad_token_id": PAD},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": LINEAR_THEN_FULL,
    "hrm_text": {"L_cycles": 1},  # more of them turn rounding into a millinat
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral3": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.1}
        | {"original_max_position_embeddings": MARK, "max_position_embeddings": LONGEST}
    },
    "prophetnet": COUNTS_FROM_PAD,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 8],
        "hash_seed": 0,
        "is_decoder": True,
        "local_attn_chunk_length": MARK,
        "lsh_attn_chunk_length": MARK,
        "num_buckets": 4,
        "pad_token_id": PAD,
    },
    "xlm": {"causal": True, "pad_token_id": PAD},
    "xlstm": {"hidden_size": 128},
    "xmod": DECODER | COUNTS_FROM_PAD | {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides, or in place of, `TINY`."""

UNBUILDABLE = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "drafts from the keys and values of another model",
    "gemma4_unified_assistant": "drafts from the keys and values of another model",
    "musicgen": "writes audio codes, several a step",
    "musicgen_melody": "writes audio codes, several a step",
}

ROPE = {"rope_theta": 1e4}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2 * MARK}
LONGROPE = {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
SLIDING = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"]}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert (reading both ways)": ("bert", {"is_decoder": False}),
    "dots1 (sliding)": ("dots1", {"layer_types": SLIDING["layer_types"]}),
    "falcon (alibi)": ("falcon", {"alibi": True}),
    "falcon (new decoder)": ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2}),
    "gemma2 (eager)": ("gemma2", {"attn_implementation": "eager"}),
    "gemma3n_text (shared keys)": (
        "gemma3n_text",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "granite (scaled)": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 4.0}),
    "laguna (sliding)": ("laguna", {"layer_types": SLIDING["layer_types"]}),
    "llama (dynamic NTK)": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "llama (eager)": ("llama", {"attn_implementation": "eager"}),
    "llama (linear)": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}),
    "llama (tied)": ("llama", {"tie_word_embeddings": True}),
    "llama (yarn)": ("llama", {"rope_parameters": YARN}),
    "mellum (sliding)": ("mellum", {"layer_types": SLIDING["layer_types"]}),
    "mpt (clipped)": ("mpt", {"attn_config": {"clip_qkv": 0.5}}),
    "olmo (clipped)": ("olmo", {"clip_qkv": 0.5}),
    "olmoe (clipped)": ("olmoe", {"clip_qkv": 0.5}),
    "opt (projected)": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "phi3 (longrope)": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 2 * MARK, "sliding_window": None},
    ),
    "qwen2 (sliding)": ("qwen2", SLIDING),
    "qwen3 (sliding)": ("qwen3", SLIDING),
    "qwen4_exp_text (n-grams)": (
        "qwen4_exp_text",
        {"ple_layer_ids": [1], "eos_token_id": PAD, "ngram_vocab_size_base": 100, "split_ngram_parts": 2},
    ),
    "smollm3 (no rope)": ("smollm3", {"no_rope_layers": [1, 0]}),
    "zaya (sliding)": ("zaya", {"layer_types": ["hybrid", "hybrid_sliding"]}),
}
"""Special cases of families, each by a name that begins with the family's."""

BUILDABLE = [*(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNBUILDABLE), *VARIANTS, *STRANGERS]


def build(name: str, dtype: torch.dtype = torch.float32, noise: float = 0.0) -> nn.Module:
    """Build the model of a family, a variant or a stranger, the same each time, in eval mode.

    Args:
        name: One of `BUILDABLE`.
        dtype: Type of the weights.
        noise: Probability or strength of every kind of noise in training.
    """
    torch.manual_seed(zlib.crc32(name.encode()))
    if name in STRANGERS:
        model: nn.Module = STRANGERS[name](StrangerConfig()).to(dtype)
    else:
        model_type, special = VARIANTS.get(name, (name, {}))
        model = AutoModelForCausalLM.from_config(tiny_config(CONFIG_MAPPING[model_type], special, noise), dtype=dtype)
    randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, std: float = 0.2) -> None:
    """Give matrices weights that make logits differ by token and context; norms and biases stay as they are."""
    for weight in model.parameters():
        if weight.ndim >= 2 and weight.is_floating_point():
            weight.copy_(torch.randn(weight.shape) * std)


def tiny_config(config_class: type[PreTrainedConfig], own: dict[str, Any], noise: float = 0.0) -> PreTrainedConfig:
    """Build a configuration, and those inside it, from `TINY`, the family's `OVERRIDES`, and what is given."""
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in TINY.items() if name in fields}
    values |= {name: noise for name, usual in fields.items() if is_noise(name) and isinstance(usual, float)}
    values |= _layers_of_each_kind(config_class, set(fields)) | OVERRIDES.get(config_class.model_type, {}) | own
    for name in config_class.sub_configs:
        part = getattr(config_class(), name)
        if part is not None:
            values[name] = tiny_config(type(part), values.get(name, {}), noise)
    return config_class(**values)


def is_noise(field: str) -> bool:
    """Tell whether a field is the probability or the strength of noise in training."""
    return any(word in field for word in ("dropout", "pdrop", "layerdrop", "jitter")) and "classifier" not in field


def _layers_of_each_kind(config_class: type[PreTrainedConfig], fields: set[str]) -> dict[str, Any]:
    """Take one layer of each kind that the default configuration has."""
    named = fields & {"layer_types", "mlp_layer_types", "layers_block_type"}
    usual = config_class() if named else None
    kinds = {name: list(dict.fromkeys(getattr(usual, name) or [])) for name in sorted(named)}
    count = max(2, *map(len, kinds.values()), 2)
    chosen: dict[str, Any] = {name: (some * count)[:count] for name, some in kinds.items() if some}
    return {**chosen, "num_hidden_layers": count} if chosen and "num_hidden_layers" in fields else chosen
