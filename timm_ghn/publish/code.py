"""Code for model cards that makes a model again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from timm_ghn.errors import printable
from timm_ghn.prediction.postprocess import NAMED, PostProcess
from timm_ghn.publish.facts import ModelFacts, entry_of, origin_of
from timm_ghn.publish.training import Training

#: Options of a fine-tuning run that do not change the trained weights. Without them a run that is pushed later, by
#: ``timm-ghn push``, gets the same card.
_WITHOUT_EFFECT = frozenset({
    'output', 'resume', 'workers', 'log_with', 'val_batch_size', 'time_limit', 'checkpoint_steps', 'checkpoint_hist',
    'push_to_hub', 'hub_private', 'hub_revision', 'hub_create_pr', 'hub_license',
})  # fmt: skip


def model_code(facts: ModelFacts) -> tuple[str | None, str]:
    """Code that makes the model again, and a remark about it."""
    if facts.training is not None:
        return training_code(facts.training), ''
    provenance, origin = facts.provenance, origin_of(facts.provenance)
    if provenance is None or origin is None or isinstance(provenance.get('postprocess'), str):
        return None, ''
    remark = '; parameters that are not predicted are drawn anew by timm'
    if provenance.get('predicted_elements') and provenance['predicted_elements'] == provenance.get('elements'):
        remark = ''
    entry, seed, options = entry_of(origin), provenance.get('seed', 0), provenance.get('postprocess')
    name = entry.name if entry is not None else origin.repo_id or PurePath(origin.file or '').name
    ghn = repr(printable(name or facts.ghn))
    if origin.revision:
        ghn = f'timm_ghn.load_ghn({ghn}, revision={printable(origin.revision)!r})'
    postprocess = 'None'
    if options is not None:
        made = PostProcess(**options)
        named = [repr(name) for name in NAMED if PostProcess.of(name, seed=seed) == made]
        postprocess = named[0] if named else f'timm_ghn.PostProcess({keywords(options)})'
    call = f'{ghn}, {keywords({"head": provenance.get("head", "auto"), "seed": seed})}, postprocess={postprocess}'
    if provenance.get('input_size'):
        call += f', input_size={tuple(provenance["input_size"])}'
    model = ', '.join(filter(None, [repr(facts.architecture), keywords(facts.model_args)]))
    lines = ['import timm, timm_ghn', f'model = timm.create_model({model})', f'timm_ghn.ghn_init(model, {call})']
    return '\n'.join(lines), remark


def training_code(training: Training) -> str:
    """Code that repeats a fine-tuning run, without paths of its machine."""
    arguments = {
        key: value
        for key, value in training.arguments.items()
        if value is not None and value is not False and key not in _WITHOUT_EFFECT
    }
    arguments |= {'dataset': training.dataset} if training.is_local('dataset') else {}
    arguments |= {'init': training.init} if training.is_local('init') else {}
    entry = entry_of(origin_of(training.run.get('provenance')))
    if entry is not None:
        arguments['init'] = entry.name  # the default may be another one elsewhere
    lines = ('from timm_ghn.finetune.loop import finetune', 'from timm_ghn.finetune.options import FinetuneOptions')
    return '\n'.join((*lines, f'finetune(FinetuneOptions({keywords(arguments)}))'))


def keywords(arguments: Mapping[str, Any]) -> str:
    """Keyword arguments as Python source."""
    return ', '.join(f'{printable(key)}={value!r}' for key, value in arguments.items())
