"""Files of a repository on the Hub, checked by loading them, and models that other commands wrote."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import save_for_hf, split_model_name_tag
from torch import Tensor, nn

from timm_ghn.architectures.timm_models import build_timm_model
from timm_ghn.errors import CheckpointError, ConfigError, UnsupportedModelError
from timm_ghn.files import crc32_of, write_json, write_state_dict
from timm_ghn.hub.storage import CONFIG_FILE, WEIGHTS_FILE
from timm_ghn.prediction.checks import check_finite
from timm_ghn.prediction.plan import ParameterPlan
from timm_ghn.prediction.predict import initialise
from timm_ghn.publish.training import WEIGHTS, Training, read_header

#: Entries of a pretrained cfg that describe timm's pretrained weights.
_OF_OTHER_WEIGHTS = (
    'tag', 'license', 'paper_ids', 'paper_name', 'origin_url', 'description', 'notes', 'custom_load', 'hf_hub_filename',
)  # fmt: skip

#: Keys about images that timm's data config and its pretrained cfg share.
_IMAGES = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that ``timm-ghn predict`` (with ``provenance``) or ``timm-ghn finetune`` (with ``results``) wrote."""

    model: nn.Module
    model_args: Mapping[str, Any]
    provenance: Mapping[str, Any] | None
    results: Path | None


def write_predicted(
    model: nn.Module, recipe: Mapping[str, Any], path: Path, ghn: str, **options: Any
) -> tuple[ParameterPlan, dict[str, Any]]:
    """Predict a timm model as :func:`timm_ghn.ghn_init` does, and write its weights as :func:`read_source` reads them.

    Args:
        model: The model.
        recipe: The arguments of ``timm.create_model`` that built it, its ``architecture`` among them.
        path: The file, of which the header holds the recipe and the facts about the prediction.
        ghn: Name or path of the GHN.
        **options: Those of :func:`timm_ghn.ghn_init`.

    Returns:
        The plan, and the facts.
    """
    plan, facts = initialise(model, ghn, **options)
    facts['weights'] = crc32_of(model.state_dict())
    write_state_dict(model.state_dict(), path, {**recipe, 'provenance': facts})
    return plan, facts


def read_source(path: Path) -> Source:
    """Build a model from what ``timm-ghn predict`` or ``finetune`` wrote; an output folder means the best weights.

    Raises:
        ConfigError: if it is no such file.
        UnsupportedModelError: if timm cannot build the model.
        CheckpointError: if the weights are not those of the model.
    """
    file = path / next(iter(WEIGHTS)) if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"expected {str(path)!r} to be a file of 'timm-ghn predict', the output folder of 'timm-ghn finetune' or "
            f"the folder 'ghn' of 'timm-ghn train' (there is no regular file {str(file)!r})"
        )
    header = {key: _read(value) for key, value in read_header(file).items()}
    architecture = header.pop('architecture', None)
    provenance, run = header.pop('provenance', None), header.pop('timm_ghn', None)
    if not isinstance(architecture, str) or (provenance is None and run is None):
        raise ConfigError(
            f"the header of {str(file)!r} does not say what it holds: it is not a file of 'timm-ghn predict' or "
            "'timm-ghn finetune'. In Python, timm_ghn.push_to_hub(model, ...) takes any timm model"
        )
    for key in ('format', 'epoch', 'top1'):
        header.pop(key, None)
    if run is not None and (stem := Training.read(file).run.get('stem')):
        raise UnsupportedModelError(
            f'the stem of {architecture} was changed for small images ({"; ".join(map(str, stem))}), and timm builds '
            'it without that: fine-tune with --small-stem off'
        )
    # A tag may choose a variant of an architecture, but its weights are not wanted.
    model = build_timm_model(architecture, header, seed=0)
    try:
        model.load_state_dict(load_file(file), strict=True)
    except (LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f'{str(file)!r} does not hold the weights of {architecture}: {error}') from error
    return Source(model, header, provenance, None if run is None else file)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return text


def check_model(model: nn.Module) -> str:
    """The architecture of a timm model whose weights can be published; an error for any other."""
    cfg = getattr(model, 'pretrained_cfg', None)
    architecture = cfg.get('architecture') if isinstance(cfg, Mapping) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UnsupportedModelError(
            f'expected a model of timm.create_model, which timm can build again (got {type(model).__name__}); '
            'write others with safetensors.torch.save_model'
        )
    for name, value in model.state_dict().items():
        if value.is_meta:
            raise UnsupportedModelError(f"'{name}' is on the meta device and has no values: initialise the model first")
        if value.is_floating_point():
            check_finite(f"'{name}': values", value)
    return split_model_name_tag(architecture)[0]


def write_model(
    model: nn.Module,
    folder: Path,
    *,
    model_args: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None = None,
    training: Training | None = None,
) -> dict[str, Any]:
    """Write weights and timm's configuration, which describes them, and have timm build the model from these files.

    Arguments are as in :class:`~timm_ghn.publish.facts.ModelFacts`; the folder is empty. Gives the configuration.

    Raises:
        ConfigError: if an argument cannot be written.
        UnsupportedModelError: if timm cannot build the model, or builds another one.
    """
    try:
        # None keeps timm from writing the weights, which it refuses to do for tied tensors; they are written below.
        none: Any = None
        save_for_hf(model, str(folder), model_args=dict(model_args or {}) or None, safe_serialization=none)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'timm cannot write the configuration of the model: {error}') from error
    write_state_dict(model.state_dict(), folder / WEIGHTS_FILE, {})
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding='utf-8'))
    cfg = config['pretrained_cfg']
    if provenance is not None:
        cfg = {key: value for key, value in cfg.items() if key not in _OF_OTHER_WEIGHTS}
        cfg |= {'tag': 'ghn', 'description': 'Begun with predicted parameters; README.md says how and what followed.'}
        if training is None and len(provenance.get('mean') or ()) == cfg['input_size'][0]:
            # The statistics of the GHN's training images, not of those of timm's pretrained weights.
            cfg |= {key: provenance[key] for key in ('mean', 'std')}
    if training is not None:
        images, names = training.run['data_config'], training.run.get('classes', ())
        cfg = {key: value for key, value in cfg.items() if not key.startswith('test_')}
        cfg |= {key: images[key] for key in _IMAGES if key in images}
        config |= {'label_names': names} if names and len(names) == config['num_classes'] else {}
    config['pretrained_cfg'] = cfg
    # timm takes it from the root of the configuration; transformers passes it on from there, and fails if it comes
    # from here again.
    config.get('model_args', {}).pop('num_classes', None)
    write_json(config, folder / CONFIG_FILE)
    check_loads(model.state_dict(), folder)
    return config


def check_loads(state: Mapping[str, Tensor], folder: Path) -> None:
    """Have timm build a model from the files, and compare every tensor."""
    hint = 'give what timm.create_model was given as model_args={...}, and push a model whose layers were not changed'
    try:
        with torch.random.fork_rng(devices=[]):
            loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
    except Exception as error:  # whatever a model's class may raise
        raise UnsupportedModelError(
            f'timm cannot build this model again from its configuration ({type(error).__name__}: {error}); {hint}'
        ) from error
    wrong = sorted(loaded.keys() ^ state.keys())
    wrong += [
        name
        for name in sorted(loaded.keys() & state.keys())
        if loaded[name].shape != state[name].shape or not torch.equal(loaded[name], state[name].to(loaded[name]))
    ]
    if wrong:
        raise UnsupportedModelError(
            f'timm builds another model from its configuration: {len(wrong)} tensors differ, as {wrong[0]!r}; {hint}'
        )
