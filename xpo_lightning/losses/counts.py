"""COPO's bonus: a small network that learns coin flips counts how often completions like one have been seen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xpo_lightning.core.checks import check_range
from xpo_lightning.core.errors import InputError
from xpo_lightning.losses.bonus import Bonus, BonusInput


class CoinFlips(nn.Module):
    """Predicts random signs that were drawn anew at each visit of a state.

    The best prediction after n visits is the mean of n signs, whose square is 1/n on average: a pseudo-count
    (Lobel et al. 2023, arXiv 2306.03186).

    Args:
        inputs: Size of a state.
        width: Size of the hidden layer.
        flips: Number of signs.
        seed: Seed of the weights.
    """

    def __init__(self, inputs: int, width: int, flips: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(inputs, width), nn.LeakyReLU(), nn.Linear(width, flips))

    def forward(self, states: Tensor) -> Tensor:
        """Return the mean square of the predicted signs, (B,), from states (B, D)."""
        squares: Tensor = self.layers(states).square().mean(1)
        return squares


class COPOBonus(Bonus):
    """COPO's bonus: -w log pi(y), w = min(pi(y)/ref(y), max_ratio) scale N(y)^exponent without gradient.

    N(y) is the mean square of the coin flips that a network predicts from y's last hidden state, about one over the
    number of visits (Bai et al. 2025, arXiv 2501.12735, as the authors' code has it). So a positive alpha *raises* rare
    completions where XPO lowers its own. y is the sampler's completion, or the third one of `model.bonus_sampler`.

    The authors train the network between iterations; here it takes its steps after each batch, on that batch's
    completions. The hidden state is that of the last token that the model has read, the one before the last.

    It is longer than other bonuses: it has a network of its own, which learns and goes into checkpoints.

    Args:
        exponent: Power of the mean square; 0.5 makes it one over the square root of the visits.
        scale: Factor of the power.
        max_ratio: Most that pi(y)/ref(y) counts.
        flips: Number of coin flips that the network predicts.
        width: Size of its hidden layer.
        learning_rate: Learning rate of its Adam.
        steps: Its steps after each batch.
        seed: Seed of its first weights.

    Raises:
        InputError: A value is out of range.
    """

    uses_sample = needs_hidden = learns = True

    def __init__(
        self,
        exponent: float = 0.5,
        scale: float = 0.1,
        max_ratio: float = 5.0,
        flips: int = 20,
        width: int = 32,
        learning_rate: float = 1e-3,
        steps: int = 1,
        seed: int = 0,
    ) -> None:
        key = "model.bonus.init_args"
        for name, value in {"exponent": exponent, "max_ratio": max_ratio, "learning_rate": learning_rate}.items():
            check_range(f"{key}.{name}", value, above=0, is_finite=True)
        for name, number in {"flips": flips, "width": width, "steps": steps}.items():
            check_range(f"{key}.{name}", number, least=1)
        self.exponent, self.scale, self.max_ratio = exponent, scale, max_ratio
        self.flips, self.width, self.learning_rate, self.steps, self.seed = flips, width, learning_rate, steps, seed
        self.network: CoinFlips | None = None
        self.optimizer: torch.optim.Adam | None = None
        self.loaded: dict[str, Any] | None = None

    def __call__(self, seen: BonusInput) -> Tensor:
        """See `Bonus.__call__`."""
        with torch.no_grad():
            states = seen.sample.last_hidden.float()
            rarity = self._made(states)[0](states) ** self.exponent
            weight: Tensor = seen.sample.log_ratios.exp().clamp(max=self.max_ratio) * self.scale * rarity
        return -weight * seen.sample.logps

    def observe(self, seen: BonusInput) -> Tensor:
        """Return the last hidden states."""
        return seen.sample.last_hidden

    def learn(self, observed: Tensor, uniforms: Callable[[int, int], Tensor]) -> None:
        """Flip coins for each completion, and let the network take its steps towards them."""
        network, optimizer = self._made(observed)
        signs = ((uniforms(len(observed), self.flips) < 0.5).float() * 2 - 1).to(observed.device)
        with torch.enable_grad(), torch.autocast(observed.device.type, enabled=False):
            for _ in range(self.steps):
                optimizer.zero_grad()
                nn.functional.mse_loss(network.layers(observed), signs).backward()
                optimizer.step()

    def state(self) -> dict[str, Any]:
        """Return the network's weights and its optimizer's state; none before its first use."""
        if self.network is None or self.optimizer is None:
            return self.loaded or super().state()
        weights = {name: value.cpu() for name, value in self.network.state_dict().items()}
        return {**super().state(), "weights": weights, "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the network and its optimizer when they are next used, on the device where they are."""
        shapes = [tuple(value.shape) for value in state.get("weights", {}).values()]
        if shapes and (shapes[1], shapes[3]) != ((self.width,), (self.flips,)):
            raise InputError(
                f"ckpt_path: the checkpoint's model.bonus has width {shapes[1][0]} and flips {shapes[3][0]}, and now "
                f"they are {self.width} and {self.flips}; resume with those that it was made with"
            )
        self.network, self.loaded = None, state

    @torch.inference_mode(False)  # A validation may come first, and its network could not be trained.
    def _made(self, states: Tensor) -> tuple[CoinFlips, torch.optim.Adam]:
        """Return the network and its optimizer; they are made when the size and the device of a state are known."""
        if self.network is None or self.optimizer is None:
            self.network = CoinFlips(states.shape[1], self.width, self.flips, self.seed)
            if self.loaded is not None and "weights" in self.loaded:
                self.network.load_state_dict(self.loaded["weights"])
            self.optimizer = torch.optim.Adam(self.network.to(states.device).parameters(), self.learning_rate)
            if self.loaded is not None and "weights" in self.loaded:
                self.optimizer.load_state_dict(self.loaded["optimizer"])
        return self.network, self.optimizer
