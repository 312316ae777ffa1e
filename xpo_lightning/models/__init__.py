"""The policy and the reference: loading, adapters, sharding, saving, log-probabilities."""
