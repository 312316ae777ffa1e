"""Loads prompts for training: from a hub id or a file to batches of text and token ids."""

from xpo_lightning.data.datamodule import PromptDataModule

__all__ = ["PromptDataModule"]
