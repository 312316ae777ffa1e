"""How much memory a run takes, worked out from the shapes of its models before anything is loaded.

Numbers are bytes of tensors. What Python, torch's libraries and a GPU's context take comes on top, about 0.5 GiB; and,
on a CPU, what its heap does not give back, 0.3 to 0.5 GiB.
"""

from dataclasses import dataclass

from xpo_lightning.models.forward.buckets import columns_of_bucket, rows_of_bucket
from xpo_lightning.models.forward.lm_head import KEPT
from xpo_lightning.reporting.memory.model_shape import Shape, adapter_count, weight_count

FLOAT32 = 4


@dataclass(frozen=True)
class MemoryInputs:
    """A run, as far as its memory depends on it, on one device.

    Args:
        policy: The policy.
        reward: The reward model; None where the reward is none.
        weight_bytes: Bytes of a weight of the policy: 4 in float32, 2 in bfloat16.
        reward_bytes: The same of the reward model.
        compute_bytes: Bytes of a number in the policy's layers: 2 with bfloat16 weights or `trainer.precision:
            bf16-mixed`, else 4.
        cache_bytes: Bytes of a number in the key-value cache; on a CPU 4 whatever the weights are.
        lora_rank: Rank of adapters on all linear layers, which are float32; None trains every weight.
        optimizer_states: Numbers that the optimizer keeps of each trained weight: 2 for Adam, 1 for momentum.
        copies: Further copies of the trained weights: 2 for `PreviousPolicySampler`, 1 for `reference_refresh`.
        gradient_checkpointing: `model.policy.gradient_checkpointing`.
        rows: Prompts that are decoded together: `model.rollout_batch_size`, or `data.batch_size`.
        prompt_tokens: Tokens of the longest prompt.
        new_tokens: `model.sampling.max_new_tokens`.
        micro_batch_size: `model.micro_batch_size`, in pairs.
        reward_rows: Rows that the reward model reads together.
        replays: Whether each token's step is replayed, whose buffers are there all the time.
        read_tokens: Most prompt tokens that are read in one call: 65536 on a GPU, 2048 on a CPU.
        policy_weights: Weights of the policy without adapters, where they have been counted; so the next two.
        trained_weights: Trained weights.
        reward_weights: Weights of the reward model.
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
    reward_rows: int = 16
    replays: bool = False
    read_tokens: int = 2**16
    policy_weights: int | None = None
    trained_weights: int | None = None
    reward_weights: int | None = None


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run takes, in bytes.

    Args:
        policy: The policy's weights, adapters included.
        reference: The frozen copy; 0 with adapters.
        reward: The reward model's weights.
        copies: Copies of the trained weights.
        gradients: One number a trained weight.
        optimizer: What the optimizer keeps.
        replayed: What replayed steps keep: keys and values, logits, and what drawing from them needs.
        rollout: While completions are sampled: keys and values, and what a call of the model needs.
        scoring: While the reward model reads.
        micro_batch: While a micro-batch goes forward and backward.
        update: While the optimizer takes a step.
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
        """What is there all the time."""
        models = self.policy + self.reference + self.reward + self.copies
        return models + self.gradients + self.optimizer + self.replayed

    @property
    def peak(self) -> int:
        """The most that is there at a time: the phases of a step come one after the other."""
        return self.standing + max(self.rollout, self.scoring, self.micro_batch, self.update)

    @property
    def checkpoint(self) -> int:
        """A checkpoint: the trained weights, the optimizer's state, and the copies."""
        return self.gradients + self.optimizer + self.copies  # A gradient is as large as its weight.


def estimate(plan: MemoryInputs) -> MemoryEstimate:
    """Work out what a run takes, from the second step on, when gradients and the optimizer's state are there."""
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
    """Count the keys and values of so many tokens, those of all rows together."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * number_bytes * tokens


def layer_bytes(shape: Shape, number_bytes: int) -> int:
    """Count what a layer keeps of a token for the backward pass, with attention that keeps no scores (`sdpa`).

    Two norms (with a gate they are RMS norms: input in float32, what it becomes, and output; else input and output),
    queries, keys, values, what attention gives, and the feed-forward block inside (with a gate four times, else twice).
    Without a gate, one matrix makes queries, keys and values, and what it gives is kept whole beside them.
    """
    norm = FLOAT32 + 2 * number_bytes if shape.gated else 2 * number_bytes
    attention = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads + (0 if shape.gated else 2 * shape.heads))
    inner = (4 if shape.gated else 2) * shape.intermediate
    return 2 * shape.hidden * norm + number_bytes * (attention + inner)


def reading_bytes(shape: Shape, tokens: int, number_bytes: float) -> int:
    """Count what a layer needs at a time while so many tokens go through it without gradient."""
    attention = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    inner = (3 if shape.gated else 2) * shape.intermediate
    return int(tokens * number_bytes * (2 * shape.hidden + max(attention, inner)))


def head_bytes(shape: Shape, tokens: int, number_bytes: float, *, trained: bool) -> int:
    """Count what the vocabulary head needs for the log-probabilities of so many tokens, and for their gradient.

    Up to 2^26 probabilities are kept; where there are more, they are computed again that many at a time, in float32
    and in the type of the weights. A trained head has the gradient of the micro-batch beside the sum.
    """
    probabilities = tokens * shape.vocabulary
    kept = probabilities * number_bytes if probabilities <= KEPT else KEPT * (FLOAT32 + number_bytes)
    states = 3 * tokens * shape.hidden * number_bytes  # the hidden states, their slopes, and these scaled
    return int(kept + states + (shape.vocabulary * shape.hidden * FLOAT32 if trained else 0))


def rollout_bytes(plan: MemoryInputs) -> int:
    """Count what sampling needs: the reference's prompts stay until the policy has written."""
    shape, rows = plan.policy, plan.rows
    written = 0 if plan.replays else plan.prompt_tokens + plan.new_tokens
    caches = cache_bytes(shape, rows * (plan.prompt_tokens + written), plan.cache_bytes)
    read = reading_bytes(shape, min(rows * plan.prompt_tokens, plan.read_tokens), plan.compute_bytes)
    return caches + (read if plan.replays else max(read, drawing_bytes(shape, rows)))


def replayed_bytes(plan: MemoryInputs) -> int:
    """Count what replayed steps keep, with the rows and columns that they round up to."""
    rows, columns = rows_of_bucket(plan.rows), columns_of_bucket(plan.prompt_tokens + plan.new_tokens)
    return cache_bytes(plan.policy, rows * columns, plan.cache_bytes) + drawing_bytes(plan.policy, rows)


def drawing_bytes(shape: Shape, rows: int) -> int:
    """Count what drawing a token for each of so many rows needs: logits, probabilities, and their sums."""
    return 3 * rows * shape.vocabulary * FLOAT32


def scoring_bytes(plan: MemoryInputs) -> int:
    """Count what the reward model needs to read a few prompts with their completions."""
    if plan.reward is None:
        return 0
    tokens = plan.reward_rows * (plan.prompt_tokens + plan.new_tokens)
    cached = cache_bytes(plan.reward, tokens, int(plan.reward_bytes))
    return cached + reading_bytes(plan.reward, tokens, plan.reward_bytes)


def micro_batch_bytes(plan: MemoryInputs, *, trains_head: bool = True, cast_weights: int = 0) -> int:
    """Count what a micro-batch of pairs needs in its backward pass; a prompt is computed once for both completions.

    Args:
        plan: The run.
        trains_head: Whether the vocabulary head is trained.
        cast_weights: Weights that are converted where layers compute in another type than the weights'.
    """
    shape, pairs = plan.policy, plan.micro_batch_size
    prompts, completions = pairs * plan.prompt_tokens, 2 * pairs * plan.new_tokens
    a_layer = layer_bytes(shape, plan.compute_bytes)
    if plan.gradient_checkpointing:  # It switches the sharing of prompts off, and keeps the inputs of layers alone.
        tokens = 2 * prompts + completions
        layers = tokens * (shape.layers * shape.hidden * plan.compute_bytes + a_layer)
    else:
        copied = 2 * shape.kv_heads * shape.head_dim * plan.compute_bytes * 2 * prompts
        layers = shape.layers * ((prompts + completions) * a_layer + copied)
    cast = cast_weights * plan.compute_bytes if plan.compute_bytes < plan.weight_bytes else 0
    return layers + head_bytes(shape, completions, plan.weight_bytes, trained=trains_head) + cast
