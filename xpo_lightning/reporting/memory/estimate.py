"""Estimates the memory of a step from the shapes of its models and of its batches.

Numbers are bytes of tensors. Python, torch's libraries and a GPU's context take about 0.5 GiB more; on a CPU, heap
memory that is not returned to the system takes another 0.3 to 0.5 GiB.
"""

from dataclasses import dataclass

from xpo_lightning.models.forward.buckets import columns_of_bucket, rows_of_bucket
from xpo_lightning.models.forward.lm_head import KEPT
from xpo_lightning.reporting.memory.model_shape import Shape

FLOAT32 = 4


@dataclass(frozen=True)
class MemoryInputs:
    """The settings of a run on one device that the temporary memory of a step depends on.

    Args:
        policy: Shape of the policy.
        reward: Shape of the reward model; None if the reward has no model.
        weight_bytes: Bytes of a weight of the policy: 4 in float32, 2 in bfloat16.
        reward_bytes: Bytes of a weight of the reward model.
        compute_bytes: Bytes of a number in the policy's layers: 2 with bfloat16 weights or `trainer.precision:
            bf16-mixed`, else 4.
        cache_bytes: Bytes of a number in the KV cache; on a CPU 4, whatever the type of the weights.
        gradient_checkpointing: `model.policy.gradient_checkpointing`.
        trains_head: Whether the vocabulary head is trained; with adapters it is not.
        cast_weights: Number of weights that are converted if layers compute in a smaller type than the weights'.
        rows: Prompts that are decoded together: `model.rollout_batch_size`, or `data.batch_size`.
        prompt_tokens: Tokens of the longest prompt.
        new_tokens: `model.sampling.max_new_tokens`.
        micro_batch_size: `model.micro_batch_size`, in pairs.
        completions: Completions of each pair: 2, or 3 with `model.bonus_sampler`.
        reward_rows: Rows that the reward model scores together.
        replays: Whether each token's step is replayed as a CUDA graph, whose buffers stay allocated.
        read_tokens: Most prompt tokens in one prefill call: 65536 on a GPU, 2048 on a CPU.
    """

    policy: Shape
    reward: Shape | None = None
    weight_bytes: float = FLOAT32
    reward_bytes: float = FLOAT32
    compute_bytes: int = FLOAT32
    cache_bytes: int = FLOAT32
    gradient_checkpointing: bool = False
    trains_head: bool = True
    cast_weights: int = 0
    rows: int = 32
    prompt_tokens: int = 512
    new_tokens: int = 64
    micro_batch_size: int = 8
    completions: int = 2
    reward_rows: int = 16
    replays: bool = False
    read_tokens: int = 2**16


@dataclass(frozen=True)
class Standing:
    """Memory of what a run holds all the time, in bytes.

    Args:
        policy: The policy's weights, adapters included.
        reference: The frozen copy; 0 with adapters.
        reward: The reward models' weights.
        copies: Copies of the trained weights.
        gradients: The gradient of the trained weights, which is as large as they are.
        optimizer: The optimizer's state.
    """

    policy: int
    reference: int
    reward: int
    copies: int
    gradients: int
    optimizer: int

    @property
    def models(self) -> int:
        """The weights of all models, and the copies."""
        return self.policy + self.reference + self.reward + self.copies

    @property
    def checkpoint(self) -> int:
        """Size of a checkpoint: the trained weights, the optimizer's state, and the copies."""
        return self.gradients + self.optimizer + self.copies


@dataclass(frozen=True)
class MemoryEstimate(Standing):
    """Memory of a run, in bytes.

    Args:
        replayed: Buffers of the CUDA graphs: keys and values, logits, and what drawing from them needs.
        rollout: Temporary memory of sampling: keys and values, and what a call of the model needs.
        scoring: Temporary memory of the reward model.
        micro_batch: Temporary memory of a micro-batch's forward and backward pass.
    """

    replayed: int
    rollout: int
    scoring: int
    micro_batch: int

    @property
    def update(self) -> int:
        """Temporary memory of an optimizer step: optimizers for GPUs compute all steps before they take them."""
        return self.gradients

    @property
    def standing(self) -> int:
        """Memory that is allocated all the time."""
        return self.models + self.gradients + self.optimizer + self.replayed

    @property
    def named(self) -> dict[str, int]:
        """What a step takes, by name."""
        return {
            "models": self.models,
            "gradient and optimizer": self.gradients + self.optimizer,
            "completions": self.rollout,
            "reward": self.scoring,
            "micro-batch": self.micro_batch,
        }

    @property
    def peak(self) -> int:
        """Peak memory: the phases of a step come one after the other, so the largest counts."""
        return self.standing + max(self.rollout, self.scoring, self.micro_batch, self.update)


def estimate(plan: MemoryInputs, standing: Standing) -> MemoryEstimate:
    """Estimate the memory of a run from the second step on, when gradients and the optimizer's state are allocated."""
    return MemoryEstimate(
        **vars(standing),
        replayed=replayed_bytes(plan) if plan.replays else 0,
        rollout=rollout_bytes(plan),
        scoring=scoring_bytes(plan),
        micro_batch=micro_batch_bytes(plan),
    )


def cache_bytes(shape: Shape, tokens: int, number_bytes: int) -> int:
    """Count the bytes of keys and values of `tokens` tokens, all rows together."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * number_bytes * tokens


def layer_bytes(shape: Shape, number_bytes: int) -> int:
    """Count the bytes that a layer keeps per token for the backward pass, with attention that keeps no scores (`sdpa`).

    These are two norms (with a gate they are RMS norms: input in float32, normalised input, and output; else input and
    output), queries, keys, values, the output of attention, and the inner activations of the feed-forward block (four
    times its width with a gate, else twice). Without a gate, one matrix makes queries, keys and values, and its output
    is kept besides them.
    """
    norm = FLOAT32 + 2 * number_bytes if shape.gated else 2 * number_bytes
    attention = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads + (0 if shape.gated else 2 * shape.heads))
    inner = (4 if shape.gated else 2) * shape.intermediate
    return 2 * shape.hidden * norm + number_bytes * (attention + inner)


def reading_bytes(shape: Shape, tokens: int, number_bytes: float) -> int:
    """Count the bytes that a layer needs at a time to process `tokens` tokens without gradient."""
    attention = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    inner = (3 if shape.gated else 2) * shape.intermediate
    return int(tokens * number_bytes * (2 * shape.hidden + max(attention, inner)))


def head_bytes(shape: Shape, tokens: int, number_bytes: float, *, trained: bool) -> int:
    """Count the bytes that the vocabulary head needs for log-probabilities of `tokens` tokens, and for their gradient.

    The head keeps up to 2^26 probabilities; if there are more, it recomputes them that many at a time, in float32 and
    in the type of the weights. A trained head holds the gradient of the micro-batch besides the accumulated one.
    """
    probabilities = tokens * shape.vocabulary
    kept = probabilities * number_bytes if probabilities <= KEPT else KEPT * (FLOAT32 + number_bytes)
    states = 3 * tokens * shape.hidden * number_bytes  # the hidden states, their gradients, and these scaled
    return int(kept + states + (shape.vocabulary * shape.hidden * FLOAT32 if trained else 0))


def rollout_bytes(plan: MemoryInputs) -> int:
    """Count the bytes that sampling needs; the reference's prompts stay in its KV cache until the policy is done."""
    shape, rows = plan.policy, plan.rows
    written = 0 if plan.replays else plan.prompt_tokens + plan.new_tokens
    caches = cache_bytes(shape, rows * (plan.prompt_tokens + written), plan.cache_bytes)
    read = reading_bytes(shape, min(rows * plan.prompt_tokens, plan.read_tokens), plan.compute_bytes)
    return caches + (read if plan.replays else max(read, drawing_bytes(shape, rows)))


def replayed_bytes(plan: MemoryInputs) -> int:
    """Count the bytes that replayed steps keep, with rows and columns rounded up to their buckets."""
    rows, columns = rows_of_bucket(plan.rows), columns_of_bucket(plan.prompt_tokens + plan.new_tokens)
    return cache_bytes(plan.policy, rows * columns, plan.cache_bytes) + drawing_bytes(plan.policy, rows)


def drawing_bytes(shape: Shape, rows: int) -> int:
    """Count the bytes that drawing a token for each of `rows` rows needs: logits, probabilities, and their sums."""
    return 3 * rows * shape.vocabulary * FLOAT32


def scoring_bytes(plan: MemoryInputs) -> int:
    """Count the bytes that the reward model needs to score `reward_rows` prompts with their completions."""
    if plan.reward is None:
        return 0
    tokens = plan.reward_rows * (plan.prompt_tokens + plan.new_tokens)
    cached = cache_bytes(plan.reward, tokens, int(plan.reward_bytes))
    return cached + reading_bytes(plan.reward, tokens, plan.reward_bytes)


def micro_batch_bytes(plan: MemoryInputs) -> int:
    """Count the bytes of a micro-batch in its backward pass; a prompt is computed once for both completions."""
    shape, pairs = plan.policy, plan.micro_batch_size
    prompts, completions = pairs * plan.prompt_tokens, plan.completions * pairs * plan.new_tokens
    a_layer = layer_bytes(shape, plan.compute_bytes)
    if plan.gradient_checkpointing:  # It switches prompt sharing off, and keeps only the inputs of layers.
        tokens = 2 * prompts + completions
        layers = tokens * (shape.layers * shape.hidden * plan.compute_bytes + a_layer)
    else:
        copied = 2 * shape.kv_heads * shape.head_dim * plan.compute_bytes * 2 * prompts
        layers = shape.layers * ((prompts + completions) * a_layer + copied)
    cast = plan.cast_weights * plan.compute_bytes if plan.compute_bytes < plan.weight_bytes else 0
    return layers + head_bytes(shape, completions, plan.weight_bytes, trained=plan.trains_head) + cast
