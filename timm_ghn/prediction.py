"""Predict the parameters of a model, and initialise it with them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_ghn.devices import device_of
from timm_ghn.errors import ConfigError, PredictionError, UnsupportedModelError
from timm_ghn.graph.build import trace
from timm_ghn.hub.load import shared_ghn
from timm_ghn.nn.ghn import GHN
from timm_ghn.nn.requests import DecodeRequest
from timm_ghn.params.fit import Fit, repeated, scaled
from timm_ghn.params.plan import ParameterPlan, ParameterRow, plan_parameters
from timm_ghn.postprocess import DEFAULT, PostProcess, process_, processed_layers
from timm_ghn.version import __version__
from timm_ghn.writable import check_dtype, check_finite, check_storage, check_writable, write_all_

M = TypeVar('M', bound=nn.Module)

_NAMELESS = 'without a name'


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
    rules: str | None = None,
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
        rules: Rules of the graph, see :func:`timm_ghn.trace`; those of the GHN's configuration if None.

    Returns:
        The prediction; the same call gives the same one.

    Raises:
        ConfigError: if ``head``, ``rules`` or ``device`` is something else.
        UnsupportedModelError: if the model cannot be traced, or has parameters of less than 16 bits.
        PredictionError: if a predicted value is not finite.
        GHNError: if the GHN cannot be loaded.
    """
    chosen, plan = _prepare(model, ghn, input_size, example_inputs, head, device, rules)
    values = _values(chosen, plan, seed)
    state_dict = {name: values[row.name] for row in plan.predicted for name in (row.name, *row.aliases)}
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
    rules: str | None = None,
) -> M:
    """Initialise a model with predicted parameters, in place, and post-process them as a start for training.

    Either all predicted parameters are written or, if anything fails or the user interrupts, none. Their device,
    dtype and ``requires_grad`` stay, as do the model's mode, its buffers, and the parameters that are not predicted.
    Until all are written, what they held is kept, which takes their memory once more.

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
        rules: Rules of the graph, see :func:`timm_ghn.trace`; those of the GHN's configuration if None.

    Returns:
        The same model.

    Raises:
        ConfigError: if ``head``, ``postprocess``, ``rules`` or ``device`` is something else.
        UnsupportedModelError: if the model cannot be traced, or has parameters on the meta device or of less than 16
            bits.
        PredictionError: if a predicted value is not finite, or a parameter cannot be written.
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
        rules=rules,
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
    rules: str | None = None,
) -> dict[str, Any]:
    """Do what :func:`ghn_init` does, and give the facts about it."""
    PostProcess.of(postprocess)  # before anything is loaded
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        check_storage(name, parameter)
    chosen, plan = _prepare(model, ghn, input_size, example_inputs, head, device, rules)
    options = PostProcess.of(postprocess, seed=seed, auto=chosen.config.postprocess)
    for row in plan.predicted:
        check_writable(row.name, parameters[row.name])
    values = _values(chosen, plan, seed, parameters)
    if options is not None:
        process_(values, processed_layers(plan, options), options)
    write_all_(parameters, ((row.name, values.pop(row.name)) for row in plan.predicted))
    return provenance(chosen, plan, head=head, seed=seed, postprocess=options)


def _prepare(
    model: nn.Module,
    ghn: GHN | str | os.PathLike[str],
    input_size: int | Sequence[int] | None,
    example_inputs: Any,
    head: str,
    device: torch.device | str | None,
    rules: str | None,
) -> tuple[GHN, ParameterPlan]:
    """Load the GHN, trace the model and plan."""
    where = None if device is None else device_of(device)
    if not isinstance(ghn, GHN):
        ghn = shared_ghn(ghn, device=where)
    elif ghn.device.type == 'meta':
        raise ConfigError(f"the GHN '{ghn.config.name or _NAMELESS}' is on the meta device, which holds no values")
    elif where is not None:
        ghn.to(where)
    rules = ghn.config.rules if rules is None else rules
    graph = trace(model, input_size=input_size, example_inputs=example_inputs, rules=rules)
    plan = plan_parameters(graph, ghn.config, head=head)
    if not plan.predicted:
        raise UnsupportedModelError(
            f'{type(model).__name__} has no parameter that a GHN could predict; see timm_ghn.trace(model).kept'
        )
    for row in plan.predicted:
        check_dtype(row.name, row.dtype)
    return ghn, plan


@torch.no_grad()
def _values(
    ghn: GHN, plan: ParameterPlan, seed: int, parameters: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Predicted tensors by name, finite, contiguous and each with memory of its own.

    Args:
        ghn: The GHN.
        plan: Of the model.
        seed: Draws the tokens without a position, in the order of the plan.
        parameters: The model's, on whose devices the tensors are to be; by default they are where the GHN is.
    """
    embeddings_Nd = ghn.encode(plan.graph)
    if not bool(torch.isfinite(embeddings_Nd).all()):
        raise PredictionError(
            f"the GHN '{ghn.config.name or _NAMELESS}' gave node embeddings that are not finite; "
            'the model was left as it was'
        )
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for row, decoded in _decoded(ghn, embeddings_Nd, plan):
        device = decoded.device if parameters is None else parameters[row.name].device
        values = scaled(decoded, _fit(row)).to(row.dtype)
        check_finite(f"values predicted for '{row.name}'", values)  # before they are repeated
        tensor = repeated(values.to(device), _fit(row), row.shape, generator).contiguous()
        is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
        found[row.name] = tensor.clone() if is_part else tensor
    return found


def _decoded(ghn: GHN, embeddings_Nd: Tensor, plan: ParameterPlan) -> Iterator[tuple[ParameterRow, Tensor]]:
    """Decode all that is predicted; positional embeddings come last, in the order of the plan."""
    rows = [row for row in plan.predicted if row.role != 'position']
    positions = [row for row in plan.predicted if row.role == 'position']
    for index, decoded in ghn.decode(embeddings_Nd, [_request(row) for row in rows]):
        yield rows[index], decoded
    decoded_positions = dict(ghn.decode(embeddings_Nd, [_request(row) for row in positions]))
    for index, row in enumerate(positions):
        yield row, decoded_positions[index]


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
