"""Sums of messages over the edges of a graph."""

from __future__ import annotations

from torch import Tensor


def aggregate(messages_Md: Tensor, source_E: Tensor, target_E: Tensor, weight_E: Tensor, num_targets: int) -> Tensor:
    """Weighted sum of the messages that arrive at each node: out[v] = sum over e with target v of w[e] m[source[e]].

    Shapes:
        messages_Md: (M, d), any float dtype. source_E, target_E: int64 (E,). weight_E: (E,), dtype of the messages.

    Args:
        messages_Md: One message for each row that an edge can name.
        source_E: Row of ``messages_Md`` that each edge carries.
        target_E: Row of the result that each edge adds to, in any order.
        weight_E: Factor of each edge.
        num_targets: Number of rows of the result.

    Returns:
        (num_targets, d); zero where no edge arrives. Differentiable in the messages and the weights.
    """
    carried_Ed = messages_Md.index_select(0, source_E) * weight_E[:, None]
    return messages_Md.new_zeros(num_targets, messages_Md.shape[1]).index_add(0, target_E, carried_Ed)
