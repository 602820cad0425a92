"""Predict the parameters of a model, and initialise it with them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_ghn.errors import ConfigError, PredictionError, UnsupportedModelError
from timm_ghn.graph.build import trace
from timm_ghn.hub.load import shared_ghn
from timm_ghn.hub.storage import device_of
from timm_ghn.nn.ghn import GHN
from timm_ghn.prediction.checks import check_dtype, check_finite, check_storage, writable, write_all_
from timm_ghn.prediction.fit import Fit, repeated, scaled, write_repeated
from timm_ghn.prediction.plan import ParameterPlan, ParameterRow, plan_parameters
from timm_ghn.prediction.postprocess import DEFAULT, PostProcess, process_, processed_layers
from timm_ghn.version import __version__

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

    def apply_(self, model: M) -> M:
        """Write the prediction into a model, in place: all of it or, if anything fails, none.

        Args:
            model: The model that was predicted for, or another one whose parameters have the same names and shapes.

        Returns:
            The same model.

        Raises:
            UnsupportedModelError: if the model lacks a parameter, or has one of another shape or without storage.
            PredictionError: if a parameter cannot be written.
        """
        parameters = writable(model, self.plan.predicted)
        write_all_(parameters, lambda name, parameter: parameter.copy_(self.state_dict[name]))
        return model


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
    decoded = _decode(chosen, plan, seed, {row.name: chosen.device for row in plan.predicted})
    found = {row.name: _tensor(row, decoded) for row in plan.predicted}
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
    rules: str | None = None,
) -> M:
    """Initialise a model with predicted parameters, in place, and post-process them as a start for training.

    Either all predicted parameters are written or, if anything fails, none; the user's interruption leaves all or none
    written. Their device, dtype and ``requires_grad`` stay, as do the model's mode, its buffers, and the parameters
    that are not predicted.

    Args:
        model: Any network that takes a batch of images.
        ghn: See :func:`predict`.
        input_size: See :func:`predict`.
        example_inputs: See :func:`predict`.
        head: See :func:`predict`.
        seed: See :func:`predict`; also the seed of the noise of a post-processing that is named.
        postprocess: 'auto' does what the GHN's configuration recommends; 'orth' or 'noise', see
            :data:`~timm_ghn.prediction.postprocess.NAMED`, or options; None leaves the parameters as predicted.
        device: See :func:`predict`.
        rules: See :func:`predict`.

    Returns:
        The same model.

    Raises:
        ConfigError: as :func:`predict`, or if there is no such ``postprocess``.
        UnsupportedModelError: as :func:`predict`, or if a parameter is on the meta device.
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
) -> tuple[ParameterPlan, dict[str, Any]]:
    """Do what :func:`ghn_init` does, and return the plan and the :func:`provenance`."""
    PostProcess.of(postprocess)  # before anything is loaded
    for name, parameter in model.named_parameters():
        check_storage(name, parameter)
    chosen, plan = _prepare(model, ghn, input_size, example_inputs, head, device, rules)
    options = PostProcess.of(postprocess, seed=seed, auto=chosen.config.postprocess)
    parameters = writable(model, plan.predicted)
    decoded = _decode(chosen, plan, seed, {name: parameter.device for name, parameter in parameters.items()})
    finished: dict[str, Tensor] = {}
    if options is not None:
        layers = processed_layers(plan, options)
        finished = {row.name: _tensor(row, decoded) for row in layers}
        process_(finished, layers, options)

    def write(name: str, parameter: Tensor) -> None:
        if name in finished:
            parameter.copy_(finished[name])
        else:
            write_repeated(parameter, *decoded[name])

    write_all_(parameters, write)
    return plan, provenance(chosen, plan, head=head, seed=seed, postprocess=options)


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
        raise ConfigError(f'the GHN {ghn.config.name!r} is on the meta device, which holds no values')
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
def _decode(
    ghn: GHN, plan: ParameterPlan, seed: int, devices: Mapping[str, torch.device]
) -> dict[str, tuple[Tensor, Fit]]:
    """Decode the predicted parameters, finite and not yet repeated to their shapes; embeddings of positions are."""
    embeddings_Nd = ghn.encode(plan.graph)
    if not bool(torch.isfinite(embeddings_Nd).all()):
        raise PredictionError(
            f'the GHN {ghn.config.name!r} gave node embeddings that are not finite; the model was left as it was'
        )
    rows, sums = plan.predicted, []
    decoded: dict[str, tuple[Tensor, Fit]] = {}
    for index, raw in ghn.decode(embeddings_Nd, [row.request for row in rows if row.request is not None]):
        row = rows[index]
        assert row.fit is not None
        values = scaled(raw, row.fit, row.dtype)
        sums.append(values.sum(dtype=torch.float32))
        decoded[row.name] = values.to(devices[row.name]), row.fit
    if not bool(torch.stack(sums).isfinite().all()):  # the sum of finite values may overflow
        for name, (values, _) in decoded.items():
            check_finite(f"values predicted for '{name}'", values)
    generator = torch.Generator().manual_seed(seed)
    for row in rows:
        values, fit = decoded[row.name]
        if fit.tokens is not None:
            decoded[row.name] = repeated(values, fit, row.shape, generator), fit
    return decoded


def _tensor(row: ParameterRow, decoded: Mapping[str, tuple[Tensor, Fit]]) -> Tensor:
    """A predicted parameter as a tensor of its own."""
    values, fit = decoded[row.name]
    target = torch.empty(row.shape, dtype=row.dtype, device=values.device)
    write_repeated(target, values, fit)
    return target


def provenance(
    ghn: GHN, plan: ParameterPlan, *, head: str, seed: int, postprocess: PostProcess | None = None
) -> dict[str, Any]:
    """Facts about a prediction, for files and model cards."""
    totals = plan.summary()
    return {
        'ghn': ghn.config.name,
        'trained': ghn.config.trained,
        'origin': dataclasses.asdict(ghn.origin) if ghn.origin is not None else None,
        'timm_ghn': __version__,
        'rules': plan.graph.rules,
        'input_size': list(plan.graph.input_size),
        'mean': list(ghn.config.mean),
        'std': list(ghn.config.std),
        'head': head,
        'seed': seed,
        'postprocess': None if postprocess is None else postprocess.to_dict(),
        **{name: totals[name] for name in ('tensors', 'predicted_tensors', 'elements', 'predicted_elements')},
    }
