"""Meta-training of GHNs."""
