"""XPO inside a LightningModule that has a task of its own, and takes its optimizer steps itself.

The module below learns to tell from a prompt whose story it is, with a head on the language model's hidden states. XPO
trains the same language model beside that. Run it: `python examples/inside_your_module.py`
"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from xpo_lightning import ModelSpec, Prompts, Sampling, SequenceClassifierReward, XPOLightningModule

EMBEDDED = "package:xpo_lightning/embedded"
PROMPTS = [
    "One cold morning, Mara found a wet kitten behind the old mill.",
    "Just after lunch, a barefoot orphan met Hanna the clerk at the edge of the orchard.",
]


class TaskAndXPO(pl.LightningModule):
    """A classifier of prompts whose encoder is the policy of XPO."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.xpo = XPOLightningModule(
            policy=ModelSpec(f"{EMBEDDED}/policy"),
            reward=SequenceClassifierReward(f"{EMBEDDED}/reward"),
            sampling=Sampling(max_new_tokens=16),
        )

    def setup(self, stage: str) -> None:
        """XPO takes its seed here, and refuses trainer options that do not suit it."""
        self.xpo.setup(stage)

    def configure_model(self) -> None:
        """XPO loads its models here."""
        self.xpo.configure_model()
        self.head = torch.nn.Linear(self.xpo.policy.config.hidden_size, len(PROMPTS))

    def task_loss(self, prompts: Prompts) -> torch.Tensor:
        """Tell the story from the hidden state of the prompt's last token; prompts are padded on the left."""
        states = self.xpo.policy(
            input_ids=prompts.ids, attention_mask=prompts.mask.long(), output_hidden_states=True
        ).hidden_states[-1]
        labels = torch.tensor(prompts.columns["story"], device=self.device)
        return torch.nn.functional.cross_entropy(self.head(states[:, -1]), labels)

    def training_step(self, batch: dict[str, list[Any]], batch_idx: int) -> None:
        """Take one step on both objectives."""
        experience = self.xpo.sample(batch)
        losses, metrics = self.xpo.losses(experience)
        task_loss = self.task_loss(experience.prompts)
        optimizers: list[Any] = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(losses.mean() + task_loss)
        for optimizer in optimizers:
            optimizer.step()
        self.log_dict({"task": task_loss, **{name: value.mean() for name, value in metrics.items()}})

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The language model's weights in one optimizer, those of the head in another."""
        policy = torch.optim.AdamW(self.xpo.trained_parameters(), lr=1e-4, weight_decay=0.0)
        return [policy, torch.optim.SGD(self.head.parameters(), lr=0.1)]


def main() -> pl.Trainer:
    """Train for a few steps."""
    rows = [{"prompt": prompt, "story": story} for story, prompt in enumerate(PROMPTS)] * 8
    batches = DataLoader(
        rows, batch_size=4, collate_fn=lambda some: {name: [row[name] for row in some] for name in some[0]}
    )
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(TaskAndXPO(), batches)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    pl.seed_everything(0)
    main()
