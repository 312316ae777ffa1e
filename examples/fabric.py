"""XPO with Lightning Fabric: `sample` and `losses` in a loop of your own, without a Trainer.

Run it: `python examples/fabric.py`
"""

import torch
from lightning.fabric import Fabric

from xpo_lightning import ModelSpec, Sampling, SequenceClassifierReward, XPOLightningModule

EMBEDDED = "package:xpo_lightning/embedded"
PROMPTS = [
    "One cold morning, Mara found a wet kitten behind the old mill.",
    "Just after lunch, a barefoot orphan met Hanna the clerk at the edge of the orchard.",
] * 8


def main(steps: int = 3) -> list[dict[str, float]]:
    """Train for a few steps, and return the metrics of each."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0)  # all samples follow from it
    xpo = XPOLightningModule(
        policy=ModelSpec(f"{EMBEDDED}/policy"),
        reward=SequenceClassifierReward(f"{EMBEDDED}/reward"),
        sampling=Sampling(max_new_tokens=16),
    )
    xpo.configure_model()  # loads the models, as the Trainer would
    optimizer = torch.optim.AdamW(xpo.trained_parameters(), lr=3e-4, weight_decay=0.0)
    module, optimizer = fabric.setup(xpo, optimizer)
    module.mark_forward_method("sample")
    module.mark_forward_method("losses")

    history = []
    for step in range(steps):
        experience = module.sample(PROMPTS)  # a labelled pair for each prompt
        losses, metrics = module.losses(experience)  # the objective of each pair
        optimizer.zero_grad()
        fabric.backward(losses.mean())
        optimizer.step()
        history.append({name: float(values.mean()) for name, values in metrics.items()})
        fabric.print(f"step {step}: loss {history[-1]['loss/total']:.4f}")
    return history


if __name__ == "__main__":
    main()
