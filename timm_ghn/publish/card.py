"""Model cards: what a model or a GHN is, how to load it, a table of facts, and how to make it again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_ghn.errors import LIMIT, printable
from timm_ghn.hub.catalogue import REPO
from timm_ghn.nn.config import Origin
from timm_ghn.nn.ghn import GHN
from timm_ghn.prediction.postprocess import PostProcess
from timm_ghn.publish.facts import ModelFacts, entry_of, expect_complete, origin_of
from timm_ghn.publish.training import GROUPS, MetaTraining, Training
from timm_ghn.version import __version__

#: Papers behind every prediction, by their number at arXiv.
PAPERS = {
    '2110.13100': 'B. Knyazev, M. Drozdzal, G. W. Taylor, A. Romero-Soriano. Parameter Prediction for Unseen Deep '
    'Architectures. NeurIPS 2021',
    '2207.10049': 'B. Knyazev. Pretraining a Neural Network before Knowing Its Architecture. 2022',
    '2303.04143': 'B. Knyazev, D. Hwang, S. Lacoste-Julien. Can We Scale Transformers to Predict Parameters of Diverse '
    'ImageNet Models? ICML 2023',
}

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ summary }}

```python
{{ usage }}
```

## Facts

| | |
| --- | --- |
{% for key, value in rows -%}
| {{ key }} | {{ value }} |
{% endfor %}
{%- if code %}
## Reproduce it

With timm_ghn {{ version }}:

```python
{{ code }}
```
{% endif %}
## Citation

{% for arxiv, paper in papers.items() -%}
- {{ paper }}. [arXiv:{{ arxiv }}](https://arxiv.org/abs/{{ arxiv }})
{% endfor -%}
"""

#: What Markdown reads as markup inside a line, also of links without brackets; not an underscore inside a word.
_MARKUP = re.compile(
    r'[\\`*\[\]<>|~$&@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.(?=\w)', re.ASCII | re.IGNORECASE
)

#: Options of a fine-tuning run that do not change the trained weights.
_WITHOUT_EFFECT = frozenset({
    'output', 'resume', 'workers', 'log_with', 'val_batch_size', 'time_limit', 'checkpoint_steps', 'checkpoint_hist',
    'push_to_hub', 'hub_private', 'hub_revision', 'hub_create_pr', 'hub_license',
})  # fmt: skip

_Rows = Iterator[tuple[str, Any]]


class Markdown(str):
    """Text that is Markdown already: everything from files is escaped in it."""

    __slots__ = ()


def markdown(text: object, limit: int = LIMIT) -> Markdown:
    """Text as one printable line, with all markup escaped; :class:`Markdown` stays as it is."""
    return text if isinstance(text, Markdown) else Markdown(_MARKUP.sub(r'\\\g<0>', printable(text, limit)))


@expect_complete()
def model_card(facts: ModelFacts) -> ModelCard:
    """Write the card of a timm model.

    Raises:
        ConfigError: if huggingface_hub refuses the metadata, or if facts are incomplete.
    """
    training, task = facts.training, 'image-classification' if facts.num_classes else 'image-feature-extraction'
    metadata = _metadata(facts.license, training, [task, 'transformers'], library_name='timm', pipeline_tag=task)
    code = None
    if training is not None:
        metadata.metrics, metadata.model_name = ['accuracy'], facts.repo_id.split('/')[1]
        metadata.eval_results = [_evaluation(training)]
        code = _training_code(training)
    elif facts.unchanged:
        code = _prediction_code(facts)
    address = f'hf-hub:{facts.repo_id}' + (f'@{facts.revision}' if facts.revision else '')
    usage = f"import timm  # alone\n\nmodel = timm.create_model('{address}', pretrained=True)"
    return _card(facts.repo_id, metadata, _model_summary(facts), usage, _model_rows(facts), code)


@expect_complete()
def ghn_card(
    ghn: GHN, repo_id: str, revision: str | None, *, training: MetaTraining | None, license: str | None
) -> ModelCard:
    """Write the card of a GHN; errors are those of :func:`model_card`."""
    metadata = _metadata(license, training, ['parameter-prediction'], library_name='timm_ghn')
    pinned = f', revision={revision!r}' if revision else ''
    usage = f'import timm, timm_ghn\nghn = timm_ghn.load_ghn({repo_id!r}{pinned})\nmodel = timm_ghn.ghn_init('
    usage += f"timm.create_model('resnet18', num_classes={ghn.config.num_classes}), ghn)"
    return _card(repo_id, metadata, _ghn_summary(ghn, training), usage, _ghn_rows(ghn, training))


def _card(
    repo_id: str, data: ModelCardData, summary: str, usage: str, facts: _Rows, code: str | None = None
) -> ModelCard:
    rows = [(markdown(key), markdown(value)) for key, value in facts]
    parts: dict[str, Any] = {'summary': summary, 'usage': usage, 'rows': rows, 'code': code, 'papers': PAPERS}
    name = repo_id.split('/')[1]
    card: ModelCard = ModelCard.from_template(data, template_str=_TEMPLATE, name=name, version=__version__, **parts)
    return card


def _metadata(
    license: str | None, training: Training | MetaTraining | None, tags: list[str], **more: Any
) -> ModelCardData:
    return ModelCardData(
        license=license,
        datasets=[training.shown('dataset')] if training is not None and not training.is_local('dataset') else None,
        tags=[*tags, 'timm', 'timm_ghn', 'graph-hypernetwork', *(f'arxiv:{arxiv}' for arxiv in PAPERS)],
        **more,
    )


def _origin_rows(origin: Origin) -> _Rows:
    """Where the weights of a GHN came from; never a folder of this machine."""
    if origin.repo_id:
        link = Markdown(f'[{origin.repo_id}](https://huggingface.co/{origin.repo_id})')
        yield 'repository of the GHN', link if REPO.fullmatch(origin.repo_id) else origin.repo_id
    if origin.revision:
        yield 'its revision', origin.revision
    if origin.file:
        yield 'its file', PurePath(origin.file).name + (' of the package timm_ghn' if origin.embedded else '')
    if origin.sha256:
        yield 'SHA-256 of that file', origin.sha256


# Models


def _evaluation(training: Training) -> EvalResult:
    """The accuracy in the form of the Hub: on the test split, if there is one."""
    kind, split, value = 'test', 'test', training.test_top1
    if value is None:
        kind, split, value = 'validation', printable(training.run['splits'][1]), training.top1
    return EvalResult(
        task_type='image-classification',
        task_name='Image Classification',
        dataset_type=training.shown('dataset'),
        dataset_name=training.shown('dataset'),
        dataset_config=printable(training.arguments.get('subset') or '') or None,
        dataset_split=split,
        metric_type='accuracy',
        metric_name=f'top-1 {kind} accuracy in percent, fine-tuned for {training.epoch:g} epochs',
        metric_value=round(value, 4),
    )


def _model_summary(facts: ModelFacts) -> str:
    training, provenance = facts.training, facts.provenance
    name = None if provenance is None else markdown(_name_of(origin_of(provenance)))
    if training is not None:
        start = f'parameters that the graph hypernetwork {name} predicted' if name else None
        start = start or f'the start {markdown(training.shown("init"))}'
        text = (
            f'`{facts.architecture}`, **fine-tuned for {training.epoch:g} epochs** on '
            f'{markdown(training.shown("dataset"))}, from {start}.'
        )
    elif provenance is None:
        text = f'`{facts.architecture}`. How its weights were made was not recorded.'
    elif facts.unchanged:
        text = (
            f'`{facts.architecture}` with parameters that the graph hypernetwork {name} predicted: **predicted, no '
            "training**. It is a start for training, and no trained network. What is not predicted is timm's own "
            'initialisation.'
        )
    else:
        text = (
            f'`{facts.architecture}`, begun with parameters that the graph hypernetwork {name} predicted. What was '
            'done to its weights since was not recorded.'
        )
    untrained = provenance is not None and provenance.get('trained') is False
    return text + (f' {name} itself is untrained: its predictions are worth no more than random ones.' * untrained)


def _name_of(origin: Origin) -> str:
    """Human-readable name of the GHN."""
    return str(origin.name or origin.repo_id or PurePath(origin.file or 'without a name').name)


def _model_rows(facts: ModelFacts) -> _Rows:
    yield 'architecture', facts.architecture + (f' with {_keywords(facts.model_args)}' if facts.model_args else '')
    yield 'input size', ' x '.join(map(str, facts.input_size))
    yield 'classes', facts.num_classes or 'none'
    yield 'parameters', f'{facts.parameters:,}'
    provenance, training = facts.provenance, facts.training
    if provenance is not None:
        yield 'GHN', _name_of(origin_of(provenance))
        yield from _origin_rows(origin_of(provenance))
        if provenance.get('elements'):
            predicted, elements = provenance['predicted_elements'], provenance['elements']
            yield 'predicted parameters', f'{100 * predicted / elements:.2f} % ({predicted:,} of {elements:,})'
        options = provenance.get('postprocess')
        described = PostProcess(**options).describe() if isinstance(options, Mapping) else options or 'none'
        yield 'post-processing', described
        yield 'seed', provenance.get('seed', 'not recorded')
        yield 'predicted by', f'timm_ghn {provenance.get("timm_ghn")}'
    if training is not None:
        subset, images, tuned = training.arguments.get('subset'), training.run['images'], 'fine-tuned for '
        tuned += f'{training.epoch:g} epochs'
        yield 'data set', training.shown('dataset') + (f', {printable(subset)}' if subset else '')
        yield 'images', f'{images["train"]:,} to train on'
        yield f'validation accuracy, {tuned}', f'{training.top1:.2f} % on {printable(training.run["splits"][1])}'
        if training.test_top1 is not None:
            yield f'test accuracy, {tuned}', f'{training.test_top1:.2f} % ({images["test"]:,} images)'


def _prediction_code(facts: ModelFacts) -> str:
    """Code that makes a predicted model again."""
    provenance, origin = facts.provenance or {}, origin_of(facts.provenance)
    entry = entry_of(origin)
    name = entry.name if entry is not None else origin.repo_id or PurePath(origin.file or '').name
    ghn = repr(printable(name or _name_of(origin)))
    if origin.revision:
        ghn = f'timm_ghn.load_ghn({ghn}, revision={printable(origin.revision)!r})'
    options = provenance.get('postprocess')
    post = None if options is None else f'timm_ghn.PostProcess({_keywords(options)})'
    call = f'{ghn}, {_keywords({key: provenance[key] for key in ("head", "seed")})}, postprocess={post}'
    if provenance.get('input_size'):
        call += f', input_size={tuple(provenance["input_size"])}'
    model = ', '.join(filter(None, [repr(facts.architecture), _keywords(facts.model_args)]))
    return f'import timm, timm_ghn\nmodel = timm.create_model({model})\ntimm_ghn.ghn_init(model, {call})'


def _training_code(training: Training) -> str:
    """Code that repeats a fine-tuning run, without paths of its machine."""
    arguments = {
        key: value
        for key, value in training.arguments.items()
        if value is not None and value is not False and key not in _WITHOUT_EFFECT
    }
    arguments |= {name: training.shown(name) for name in ('dataset', 'init')}
    entry = entry_of(origin_of(training.run.get('provenance')))
    if entry is not None:
        arguments['init'] = entry.name  # the default may be another one elsewhere
    imports = 'from timm_ghn.finetune import FinetuneOptions, finetune'
    return f'{imports}\nfinetune(FinetuneOptions({_keywords(arguments)}))'


def _keywords(arguments: Mapping[str, Any]) -> str:
    """Keyword arguments as Python source."""
    return ', '.join(f'{printable(key)}={value!r}' for key, value in arguments.items())


# GHNs


def _ghn_summary(ghn: GHN, training: MetaTraining | None) -> str:
    text = (
        'A graph hypernetwork: it predicts the parameters of timm models. A predicted network is a start for training, '
        'not a trained network. '
    )
    if not ghn.config.trained:
        return text + 'Its own weights are **random, not trained**: expect no more of its predictions than of these.'
    if training is not None:
        text += f'Trained with timm_ghn for {training.steps:,} steps on {markdown(training.shown("dataset"))}'
        begun = training.shown('init')
        return text + (f', begun with the GHN {markdown(begun)}.' if begun else '.')
    if ghn.origin is None:
        return text + 'How its weights were made was not recorded.'
    entry = entry_of(ghn.origin)
    described = f': {markdown(entry.description, 1000)}' if entry is not None else ''
    return (
        f'{text}Its weights were loaded from the place below{described}. What was done to them since was not recorded.'
    )


def _ghn_rows(ghn: GHN, training: MetaTraining | None) -> _Rows:
    config = ghn.config
    more = f', {config.layers} layers, {config.heads} heads' if config.gnn == 'graphormer' else ''
    yield 'graph network', f'{config.gnn}{more}'
    yield 'decoder', f'{config.decoder}, {" x ".join(map(str, config.max_shape))} at once'
    yield 'parameters', f'{sum(parameter.numel() for parameter in ghn.parameters()):,}'
    yield 'classes', config.num_classes
    if training is None:
        yield from _origin_rows(ghn.origin or Origin())
        entry = entry_of(ghn.origin)
        if entry is not None and entry.paper:
            yield 'paper', Markdown(entry.paper)
        return
    options = training.arguments
    yield 'data set', training.shown('dataset') + (f', {printable(options["subset"])}' if options.get('subset') else '')
    yield 'images', f'{training.run["images"]["train"]:,} of {options["image_size"]} pixels'
    yield 'steps', f'{training.steps:,} of {options["steps"]:,}'
    families = ', '.join((options.get('sampler_args') or {}).get('families') or [])
    yield 'architectures', markdown(options['sampler'] + (f': {families}' if families else ''), 1000)
    yield 'seed', options['seed']
    for group, value in training.accuracies.items():
        yield Markdown(f'accuracy, predicted, no training: {GROUPS[group]}'), f'{value:.2f} %'
