"""The matrix products that one XPO step cannot do without, counted.

A product of (n, a) with (a, b) takes 2 * n * a * b FLOP. For one prompt of P tokens, with two completions of T tokens:

    body(n)      2 * N * n                      N: weights of the blocks' linear layers
    attention    4 * L * A * pairs              L layers, A = heads * head size; QK' and the weighted sum of V
    pairs(s, n)  n * s + n * (n + 1) / 2        n queries that follow s positions, causal
    run(s, n)    body(n) + 4 * L * A * pairs(s, n)
    head(n)      2 * V * D * n                  V tokens of the vocabulary, D hidden units

    policy rollout      run(0, P) + run(P, T - 1) + head(T)         with a key-value cache; the last token is not read
    reference rollout   the same
    reference scoring   run(P, T - 1) + head(T - 1)                 of the policy's completion; the reference has read
                                                                    the prompt, and its next token's logits are known
    reward              run(0, P) + 2 * run(P, T)                   the prompt is read once
    policy forward      run(0, P) + 2 * run(P, T - 1) + head(2T - 1)    both completions' first tokens have one
                                                                    predictor, the prompt's last position
    backward            2 * policy forward                          gradients of the inputs and of the weights

With LoRA the gradients of frozen weights are not needed: the backward pass is 1 * (body + head) + 2 * attention, and
the R weights of the adapters add 2 * R a token to the policy's forward pass and 4 * R to the backward pass. (For
sampling, adapters can be merged.)

Not counted: everything that is not a matrix product (softmax, norms, sampling, the optimizer), and tokens that are not
real (padding). Counted although it could be spared: the last layer's work on prompt tokens that predict nothing,
1 / L of a prompt's body at most.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What the count needs to know of a model.

    Args:
        body: N, weights of the linear layers of all blocks.
        layers: L.
        attention: A, heads times head size.
        hidden: D.
        vocabulary: V, as the head computes it.
        adapters: R, weights of the adapters; 0 where all weights are trained.
    """

    body: int
    layers: int
    attention: int
    hidden: int
    vocabulary: int
    adapters: int = 0

    def products(self, tokens: int) -> float:
        """FLOP of the linear layers on so many tokens."""
        return 2.0 * self.body * tokens

    def attend(self, start: int, tokens: int) -> float:
        """FLOP of attention of so many tokens that follow `start` positions."""
        return 4.0 * self.layers * self.attention * (tokens * start + tokens * (tokens + 1) / 2)

    def run(self, start: int, tokens: int) -> float:
        """FLOP of all blocks on so many tokens that follow `start` positions."""
        return self.products(tokens) + self.attend(start, tokens)

    def head(self, tokens: int) -> float:
        """FLOP of the vocabulary head on so many positions."""
        return 2.0 * self.vocabulary * self.hidden * tokens


def step_flop(shape: Shape, prompt: int, completion: int) -> dict[str, float]:
    """Count the FLOP of one prompt's share of a step, part by part.

    Args:
        shape: The model; the reward model has the same shape.
        prompt: P.
        completion: T.
    """
    rollout = shape.run(0, prompt) + shape.run(prompt, completion - 1) + shape.head(completion)
    trained = prompt + 2 * (completion - 1)
    products = shape.products(trained) + shape.head(2 * completion - 1)
    attention = shape.attend(0, prompt) + 2 * shape.attend(prompt, completion - 1)
    adapters = 2.0 * shape.adapters * trained
    weight_gradients = 0.0 if shape.adapters else products
    return {
        "policy rollout": rollout,
        "reference rollout": rollout,
        "reference scoring": shape.run(prompt, completion - 1) + shape.head(completion - 1),
        "reward": shape.run(0, prompt) + 2 * shape.run(prompt, completion),
        "policy forward": products + attention + adapters,
        "backward": products + weight_gradients + 2 * attention + 2 * adapters,
    }
