"""The sizes of public models, as their configs on the hub state them, for arithmetic without a download."""

from dataclasses import replace

from xpo_lightning.reporting.memory.model_shape import Shape

LLAMA_1B = Shape(
    layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, intermediate=8192, vocabulary=128256, tied=True
)
LLAMA_8B = Shape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocabulary=128256)
LLAMA_70B = replace(LLAMA_8B, layers=80, hidden=8192, heads=64, intermediate=28672)
QWEN_1_5B = Shape(
    layers=28, hidden=1536, heads=12, kv_heads=2, head_dim=128, intermediate=8960, vocabulary=151936, tied=True
)
SMOLLM2 = Shape(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, vocabulary=49152, tied=True)

POLICIES = {
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA_1B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA_70B,
    "Qwen/Qwen2.5-Math-1.5B": QWEN_1_5B,
}
# A reward model has no vocabulary head, which is counted as one that is tied to the embedding.
REWARDS = {
    "Skywork/Skywork-Reward-V2-Llama-3.2-1B": LLAMA_1B,
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": replace(LLAMA_8B, tied=True),
}
