"""A reward model: a sequence classifier of transformers with one label."""
