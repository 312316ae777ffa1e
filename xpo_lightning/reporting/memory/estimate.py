"""Estimates the memory of a run from the shapes of its models, before anything is loaded.

Numbers are bytes of tensors. Python, torch's libraries and a GPU's context take about 0.5 GiB more; on a CPU, heap
memory that is not returned to the system takes another 0.3 to 0.5 GiB.
"""

from dataclasses import dataclass

from xpo_lightning.models.forward.buckets import columns_of_bucket, rows_of_bucket
from xpo_lightning.models.forward.lm_head import KEPT
from xpo_lightning.reporting.memory.model_shape import Shape, adapter_count, weight_count

FLOAT32 = 4


@dataclass(frozen=True)
class MemoryInputs:
    """The settings of a run on one device that its memory depends on.

    Args:
        policy: Shape of the policy.
        reward: Shape of the reward model; None if the reward has no model.
        weight_bytes: Bytes of a weight of the policy: 4 in float32, 2 in bfloat16.
        reward_bytes: Bytes of a weight of the reward model.
        compute_bytes: Bytes of a number in the policy's layers: 2 with bfloat16 weights or `trainer.precision:
            bf16-mixed`, else 4.
        cache_bytes: Bytes of a number in the KV cache; on a CPU 4, whatever the type of the weights.
        lora_rank: Rank of adapters on all linear layers, which are float32; None trains every weight.
        optimizer_states: Numbers that the optimizer keeps per trained weight: 2 for Adam, 1 for momentum.
        copies: Further copies of the trained weights: 2 for `PreviousPolicySampler`, 1 for `reference_refresh`.
        gradient_checkpointing: `model.policy.gradient_checkpointing`.
        rows: Prompts that are decoded together: `model.rollout_batch_size`, or `data.batch_size`.
        prompt_tokens: Tokens of the longest prompt.
        new_tokens: `model.sampling.max_new_tokens`.
        micro_batch_size: `model.micro_batch_size`, in pairs.
        completions: Completions of each pair: 2, or 3 with `model.bonus_sampler`.
        reward_rows: Rows that the reward model scores together.
        replays: Whether each token's step is replayed as a CUDA graph, whose buffers stay allocated.
        read_tokens: Most prompt tokens in one prefill call: 65536 on a GPU, 2048 on a CPU.
        policy_weights: Number of the policy's weights without adapters; None estimates it from the shape.
        trained_weights: Number of trained weights; None estimates it from the shape.
        reward_weights: Number of the reward model's weights; None estimates it from the shape.
    """

    policy: Shape
    reward: Shape | None = None
    weight_bytes: float = FLOAT32
    reward_bytes: float = FLOAT32
    compute_bytes: int = FLOAT32
    cache_bytes: int = FLOAT32
    lora_rank: int | None = None
    optimizer_states: float = 2
    copies: int = 0
    gradient_checkpointing: bool = False
    rows: int = 32
    prompt_tokens: int = 512
    new_tokens: int = 64
    micro_batch_size: int = 8
    completions: int = 2
    reward_rows: int = 16
    replays: bool = False
    read_tokens: int = 2**16
    policy_weights: int | None = None
    trained_weights: int | None = None
    reward_weights: int | None = None


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a run, in bytes.

    Args:
        policy: The policy's weights, adapters included.
        reference: The frozen copy; 0 with adapters.
        reward: The reward model's weights.
        copies: Copies of the trained weights.
        gradients: The gradient of the trained weights.
        optimizer: The optimizer's state.
        replayed: Buffers of the CUDA graphs: keys and values, logits, and what drawing from them needs.
        rollout: Temporary memory of sampling: keys and values, and what a call of the model needs.
        scoring: Temporary memory of the reward model.
        micro_batch: Temporary memory of a micro-batch's forward and backward pass.
        update: Temporary memory of an optimizer step.
    """

    policy: int
    reference: int
    reward: int
    copies: int
    gradients: int
    optimizer: int
    replayed: int
    rollout: int
    scoring: int
    micro_batch: int
    update: int

    @property
    def standing(self) -> int:
        """Memory that is allocated all the time."""
        models = self.policy + self.reference + self.reward + self.copies
        return models + self.gradients + self.optimizer + self.replayed

    @property
    def peak(self) -> int:
        """Peak memory: the phases of a step come one after the other, so the largest counts."""
        return self.standing + max(self.rollout, self.scoring, self.micro_batch, self.update)

    @property
    def checkpoint(self) -> int:
        """Size of a checkpoint: the trained weights, the optimizer's state, and the copies."""
        return self.gradients + self.optimizer + self.copies  # A gradient is as large as its weight.


def estimate(plan: MemoryInputs) -> MemoryEstimate:
    """Estimate the memory of a run from the second step on, when gradients and the optimizer's state are allocated."""
    policy, reward, adapted = plan.policy, plan.reward, plan.lora_rank is not None
    count = weight_count(policy) if plan.policy_weights is None else plan.policy_weights
    trained = adapter_count(policy, plan.lora_rank) if plan.lora_rank is not None else count
    trained = trained if plan.trained_weights is None else plan.trained_weights
    of_reward = plan.reward_weights if plan.reward_weights is not None else weight_count(reward) if reward else 0
    own = trained * (FLOAT32 if adapted else plan.weight_bytes)
    return MemoryEstimate(
        policy=int(count * plan.weight_bytes + (own if adapted else 0)),
        reference=0 if adapted else int(count * plan.weight_bytes),
        reward=int(of_reward * plan.reward_bytes),
        copies=int(plan.copies * own),
        gradients=int(own),
        optimizer=int(plan.optimizer_states * own),
        replayed=replayed_bytes(plan) if plan.replays else 0,
        rollout=rollout_bytes(plan),
        scoring=scoring_bytes(plan),
        micro_batch=micro_batch_bytes(plan, trains_head=not adapted, cast_weights=count),
        update=int(own),  # Optimizers for GPUs compute all steps before they take them.
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


def micro_batch_bytes(plan: MemoryInputs, *, trains_head: bool = True, cast_weights: int = 0) -> int:
    """Count the bytes of a micro-batch in its backward pass; a prompt is computed once for both completions.

    Args:
        plan: The settings of the run.
        trains_head: Whether the vocabulary head is trained.
        cast_weights: Number of weights that are converted if layers compute in a smaller type than the weights'.
    """
    shape, pairs = plan.policy, plan.micro_batch_size
    prompts, completions = pairs * plan.prompt_tokens, plan.completions * pairs * plan.new_tokens
    a_layer = layer_bytes(shape, plan.compute_bytes)
    if plan.gradient_checkpointing:  # It switches prompt sharing off, and keeps only the inputs of layers.
        tokens = 2 * prompts + completions
        layers = tokens * (shape.layers * shape.hidden * plan.compute_bytes + a_layer)
    else:
        copied = 2 * shape.kv_heads * shape.head_dim * plan.compute_bytes * 2 * prompts
        layers = shape.layers * ((prompts + completions) * a_layer + copied)
    cast = cast_weights * plan.compute_bytes if plan.compute_bytes < plan.weight_bytes else 0
    return layers + head_bytes(shape, completions, plan.weight_bytes, trained=trains_head) + cast
