"""Predict the parameters of a model, and initialise it with them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_ghn.errors import PredictionError, UnsupportedModelError
from timm_ghn.graph.build import trace
from timm_ghn.graph.structure import Graph
from timm_ghn.hub.load import shared_ghn
from timm_ghn.nn.ghn import GHN
from timm_ghn.nn.requests import Block, DecodeRequest
from timm_ghn.params.fit import Fit, scaled, write
from timm_ghn.params.plan import ParameterPlan, ParameterRow, plan_parameters
from timm_ghn.postprocess import DEFAULT, PostProcess, processed_layers, write_processed
from timm_ghn.version import __version__
from timm_ghn.writable import check_finite, check_storage, check_writable

M = TypeVar('M', bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted parameters of a model, raw: without post-processing.

    Attributes:
        state_dict: Predicted tensors by the model's own parameter names (all names of a tied one), in the dtypes of
            the model. Kept parameters and buffers are not in it: load it with ``strict=False``.
        plan: What became of each parameter.
        provenance: Facts about the GHN and the call, as plain values.
    """

    state_dict: dict[str, Tensor]
    plan: ParameterPlan
    provenance: dict[str, Any]


def predict(
    model: nn.Module,
    ghn: GHN | str | os.PathLike[str] = 'ghn',
    *,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    head: str = 'auto',
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Prediction:
    """Predict the parameters of a model without touching it.

    Args:
        model: Any network that takes a batch of images; it may be on the meta device.
        ghn: A GHN, or the name or path of one; 'ghn' is the default GHN.
        input_size: Image size, see :func:`timm_ghn.trace`.
        example_inputs: Other inputs than one image batch, see :func:`timm_ghn.trace`.
        head: 'auto' predicts the classifier where it has as many classes as the GHN was trained with, 'predict'
            always, 'keep' never.
        seed: Seed of what the published GHNs draw at random: the class token's row of a positional embedding.
        device: Where to predict; by default where the GHN is. A GHN that is given as such is moved there.

    Returns:
        The prediction; the same call gives the same one.

    Raises:
        UnsupportedModelError: if the model cannot be traced.
        PredictionError: if a predicted value is not finite.
        GHNError: if the GHN cannot be loaded.
    """
    chosen, graph, plan = _prepare(model, ghn, input_size, example_inputs, head, device)
    with torch.no_grad():
        embeddings_Nd = _embed(chosen, graph)
        found = {row.name: torch.empty(row.shape, dtype=row.dtype, device=chosen.device) for row in plan.predicted}
        _write_all(chosen, embeddings_Nd, plan, found, seed)
        if not _cannot_overflow(chosen, embeddings_Nd, plan):
            for row in plan.predicted:
                check_finite(f"values predicted for '{row.name}'", found[row.name])
    state_dict = {name: found[row.name] for row in plan.predicted for name in (row.name, *row.aliases)}
    return Prediction(state_dict, plan, provenance(chosen, plan, head=head, seed=seed))


def ghn_init(
    model: M,
    ghn: GHN | str | os.PathLike[str] = 'ghn',
    *,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    head: str = 'auto',
    seed: int = 0,
    postprocess: PostProcess | str | None = DEFAULT,
    device: torch.device | str | None = None,
) -> M:
    """Initialise a model with predicted parameters, in place, and post-process them as a start for training.

    Either all predicted parameters are written or, if anything fails, none. Their device, dtype and
    ``requires_grad`` stay, as do the model's mode, its buffers, and the parameters that are not predicted.

    Args:
        model: Any network that takes a batch of images.
        ghn: A GHN, or the name or path of one; 'ghn' is the default GHN.
        input_size: Image size, see :func:`timm_ghn.trace`.
        example_inputs: Other inputs than one image batch, see :func:`timm_ghn.trace`.
        head: 'auto' predicts the classifier where it has as many classes as the GHN was trained with, 'predict'
            always, 'keep' never.
        seed: Seed of what the published GHNs draw at random: the class token's row of a positional embedding; and of
            the noise of a post-processing that is named.
        postprocess: 'auto' does what the GHN's configuration recommends; 'orth' or 'noise', see
            :data:`timm_ghn.postprocess.NAMED`, or options; None leaves the parameters as they were predicted.
        device: Where to predict; by default where the GHN is. A GHN that is given as such is moved there.

    Returns:
        The same model.

    Raises:
        ConfigError: if ``head`` or ``postprocess`` is something else.
        UnsupportedModelError: if the model cannot be traced, or has parameters on the meta device.
        PredictionError: if a predicted value is not finite.
        GHNError: if the GHN cannot be loaded.
    """
    initialise(
        model,
        ghn,
        input_size=input_size,
        example_inputs=example_inputs,
        head=head,
        seed=seed,
        postprocess=postprocess,
        device=device,
    )
    return model


def initialise(
    model: nn.Module,
    ghn: GHN | str | os.PathLike[str],
    *,
    input_size: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    head: str = 'auto',
    seed: int = 0,
    postprocess: PostProcess | str | None = DEFAULT,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Do what :func:`ghn_init` does, and give the facts about it."""
    PostProcess.of(postprocess)  # before anything is loaded
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        check_storage(name, parameter)
    chosen, graph, plan = _prepare(model, ghn, input_size, example_inputs, head, device)
    options = PostProcess.of(postprocess, seed=seed, auto=chosen.config.postprocess)
    for row in plan.predicted:
        check_writable(row.name, parameters[row.name])
    with torch.no_grad():
        embeddings_Nd = _embed(chosen, graph)
        # All or nothing: writing begins when it is certain that no value can be refused.
        if not _cannot_overflow(chosen, embeddings_Nd, plan):
            for row, block in _blocks(chosen, embeddings_Nd, plan):
                values = scaled(block.values, _fit(row)).to(row.dtype)
                check_finite(f"values predicted for '{row.name}'", values)
        _write_all(chosen, embeddings_Nd, plan, parameters, seed)
    if options is not None:
        # What was written is finite, and post-processing keeps it so.
        write_processed({row.name: parameters[row.name] for row in processed_layers(plan, options)}, options)
    return provenance(chosen, plan, head=head, seed=seed, postprocess=options)


def _prepare(
    model: nn.Module,
    ghn: GHN | str | os.PathLike[str],
    input_size: int | Sequence[int] | None,
    example_inputs: Any,
    head: str,
    device: torch.device | str | None,
) -> tuple[GHN, Graph, ParameterPlan]:
    """Load the GHN, trace the model and plan."""
    if isinstance(ghn, GHN):
        chosen = ghn if device is None else ghn.to(device)
    else:
        chosen = shared_ghn(ghn, device=device)
    graph = trace(model, input_size=input_size, example_inputs=example_inputs, rules=chosen.config.rules)
    plan = plan_parameters(graph, chosen.config, head=head)
    if not plan.predicted:
        raise UnsupportedModelError(
            f'{type(model).__name__} has no parameter that a GHN could predict; see timm_ghn.trace(model).kept'
        )
    return chosen, graph, plan


def _embed(ghn: GHN, graph: Graph) -> Tensor:
    """Node embeddings, which are finite."""
    embeddings_Nd = ghn.encode(graph)
    if not bool(torch.isfinite(embeddings_Nd).all()):
        raise PredictionError(
            f"the GHN '{ghn.config.name or 'without a name'}' gave node embeddings that are not finite; "
            'the model was left as it was'
        )
    return embeddings_Nd


def _cannot_overflow(ghn: GHN, embeddings_Nd: Tensor, plan: ParameterPlan) -> bool:
    """Whether no decoded value can leave the range of the parameters' dtypes, whatever it is."""
    dtypes = {row.dtype for row in plan.predicted} | {embeddings_Nd.dtype}
    # Parameters are scaled by at most sqrt(2), see fan_in_scale.
    return 2 * ghn.decoded_bound(embeddings_Nd) < min(torch.finfo(dtype).max for dtype in dtypes)


def _blocks(ghn: GHN, embeddings_Nd: Tensor, plan: ParameterPlan) -> Iterator[tuple[ParameterRow, Block]]:
    """All that is decoded, in small parts; positional embeddings come as a whole, in the order of the plan."""
    rows = [row for row in plan.predicted if row.role != 'position']
    positions = [row for row in plan.predicted if row.role == 'position']
    for block in ghn.decode_blocks(embeddings_Nd, [_request(row) for row in rows]):
        yield rows[block.index], block
    found = dict(ghn.decode(embeddings_Nd, [_request(row) for row in positions]))
    for index, row in enumerate(positions):
        yield row, Block(index, found[index])


def _write_all(ghn: GHN, embeddings_Nd: Tensor, plan: ParameterPlan, targets: Mapping[str, Tensor], seed: int) -> None:
    """Decode and write all predicted parameters. Little more than a chunk of them exists beside the targets."""
    generator = torch.Generator().manual_seed(seed)  # draws in the order of the positional embeddings
    for row, block in _blocks(ghn, embeddings_Nd, plan):
        write(targets[row.name], block.values, _fit(row), generator, at=(block.output, block.input))


def _request(row: ParameterRow) -> DecodeRequest:
    if row.request is None:
        raise ValueError(f"'{row.name}' is not predicted")
    return row.request


def _fit(row: ParameterRow) -> Fit:
    if row.fit is None:
        raise ValueError(f"'{row.name}' is not predicted")
    return row.fit


def provenance(
    ghn: GHN, plan: ParameterPlan, *, head: str, seed: int, postprocess: PostProcess | None = None
) -> dict[str, Any]:
    """Facts about a prediction, for files and model cards."""
    origin = ghn.origin
    totals = plan.summary()
    return {
        'ghn': ghn.config.name,
        'trained': ghn.config.trained,
        'origin': dataclasses.asdict(origin) if origin is not None else None,
        'timm_ghn': __version__,
        'rules': plan.graph.rules,
        'input_size': list(plan.graph.input_size),
        'mean': list(ghn.config.mean),
        'std': list(ghn.config.std),
        'head': head,
        'seed': seed,
        'postprocess': None if postprocess is None else postprocess.to_dict(),
        'tensors': totals['tensors'],
        'predicted_tensors': totals['predicted_tensors'],
        'elements': totals['elements'],
        'predicted_elements': totals['predicted_elements'],
    }
