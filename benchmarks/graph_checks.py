"""Checks that a plan and its graph are right, from a recording of the network that is made anew."""

from __future__ import annotations

from collections import Counter

from torch import nn

from timm_ghn import ParameterPlan
from timm_ghn.graph.checks import flaws_of as flaws_of_graph
from timm_ghn.graph.flow import Flow
from timm_ghn.graph.trace import record


def flaws_of(model: nn.Module, plan: ParameterPlan) -> list[str]:
    """What is wrong with a plan and its graph, in words; empty if nothing is.

    Each parameter of the model is in the plan exactly once, and the graph is sound, see
    :func:`timm_ghn.graph.checks.flaws_of`: that compares it with what autograd recorded, by whatever rules it was made.
    """
    listed = Counter(name for row in plan for name in (row.name, *row.aliases))
    right = listed == Counter(name for name, _ in model.named_parameters(remove_duplicate=False))
    flaws = [] if right else ['the plan does not list each parameter once']
    return flaws + flaws_of_graph(plan.graph, Flow.of(record(model)))
