"""Contexts that put back what they change: modes of a network, random generators, torch's default dtype."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Give each module its training or evaluation mode back when the context ends."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def preserve_rng(seed: int | None = None) -> Iterator[None]:
    """Give the global generators of Python, NumPy and torch (on the CPU) their states back when the context ends.

    Args:
        seed: Seed of torch's CPU generator within the context; None leaves it where it is.
    """
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


@contextlib.contextmanager
def restore_global_state() -> Iterator[None]:
    """Give the process its random generators and torch's default dtype back when the context ends."""
    dtype = torch.get_default_dtype()
    with preserve_rng():
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def seed_rng(*entropy: int, accelerators: bool = False) -> None:
    """Seed the global generators of Python, NumPy and torch, each with a number of its own drawn from ``entropy``.

    Args:
        *entropy: What the seeds depend on.
        accelerators: Whether torch's generators of other devices are seeded too, which :func:`preserve_rng` leaves
            alone.
    """
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    (torch if accelerators else torch.default_generator).manual_seed(int(words[2]))
