"""Weights from a related network: layers matched by their place in two graphs, tensors cut and filled to fit."""
