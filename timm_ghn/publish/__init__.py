"""Pushing models and GHNs to the Hub: facts, model card, files, and one commit."""
