"""Model cards, generated from facts with huggingface_hub's classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_ghn.errors import LIMIT, ConfigError, printable
from timm_ghn.hub.catalogue import REPO
from timm_ghn.nn.config import Origin
from timm_ghn.prediction.postprocess import PostProcess
from timm_ghn.publish.code import keywords, model_code
from timm_ghn.publish.facts import Facts, GHNFacts, ModelFacts, origin_of
from timm_ghn.publish.training import MetaTraining, Training
from timm_ghn.version import __version__

#: Papers behind every prediction.
ARXIV = ('2110.13100', '2207.10049', '2303.04143')

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ summary }}

## Use it

```python
{{ usage }}
```

{{ needs }}

## Facts

| | |
| --- | --- |
{% for key, value in rows -%}
| {{ key }} | {{ value }} |
{% endfor %}
{%- if limits %}
## Limits

{% for limit in limits -%}
- {{ limit }}
{% endfor %}
{%- endif %}
{%- if code %}
## Reproduce it

With timm_ghn {{ version }}{{ remark }}:

```python
{{ code }}
```
{% endif %}
## Citation

```bibtex
@article{knyazev2021parameter,
  title={Parameter Prediction for Unseen Deep Architectures},
  author={Boris Knyazev and Michal Drozdzal and Graham W. Taylor and Adriana Romero-Soriano},
  journal={arXiv:2110.13100},
  year={2021}
}
@article{knyazev2022pretraining,
  title={Pretraining a Neural Network before Knowing Its Architecture},
  author={Boris Knyazev},
  journal={arXiv:2207.10049},
  year={2022}
}
@article{knyazev2023canwescale,
  title={Can We Scale Transformers to Predict Parameters of Diverse ImageNet Models?},
  author={Boris Knyazev and Doha Hwang and Simon Lacoste-Julien},
  journal={arXiv:2303.04143},
  year={2023}
}
```
"""

_KINDS = {'graphormer': 'GHN-3 (Graphormer)', 'gated': 'GHN-2 or GHN-1 (gated graph network)', 'mlp': 'baseline (MLP)'}

#: What Markdown reads as markup inside a line, also of links without brackets; not an underscore inside a word.
_MARKUP = re.compile(
    r'[\\`*\[\]<>|~$&@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.(?=\w)', re.ASCII | re.IGNORECASE
)

_Rows = Iterator[tuple[str, Any]]


class Markdown(str):
    """Text that is Markdown already: everything from files is escaped in it."""

    __slots__ = ()


def markdown(text: object, limit: int = LIMIT) -> Markdown:
    """Text as one printable line, with all markup escaped; :class:`Markdown` stays as it is."""
    return text if isinstance(text, Markdown) else Markdown(_MARKUP.sub(r'\\\g<0>', printable(text, limit)))


def code_span(text: object) -> Markdown:
    """A code span, or escaped text where a span cannot hold it."""
    shown = printable(text)
    return markdown(text) if not shown or set('`|') & set(shown) else Markdown(f'`{shown}`')


def make_card(facts: Facts) -> ModelCard:
    """Write the card of a timm model or of a GHN.

    Raises:
        ConfigError: if huggingface_hub refuses the metadata, or if a run's results are incomplete.
    """
    try:
        if isinstance(facts, GHNFacts):
            data, rows, parts = _ghn_metadata(facts), _ghn_rows(facts), _ghn_parts(facts)
        else:
            assert isinstance(facts, ModelFacts)
            data, rows, parts = _model_metadata(facts), _model_rows(facts), _model_parts(facts)
        card: ModelCard = ModelCard.from_template(
            data,
            template_str=_TEMPLATE,
            name=facts.repo_id.split('/')[1],
            rows=[(markdown(key), markdown(value)) for key, value in rows],
            version=__version__,
            **parts,
        )
    except (AttributeError, LookupError, TypeError) as error:
        raise ConfigError(f'the results of the run are incomplete ({type(error).__name__}: {error})') from error
    except ValueError as error:
        raise ConfigError(f'the card cannot be written: {error}') from error
    return card


def _metadata(facts: Facts, results: list[EvalResult], **more: Any) -> ModelCardData:
    """The metadata of a card, which the Hub reads."""
    training: Training | MetaTraining | None = getattr(facts, 'training', None)
    return ModelCardData(
        license=facts.license,
        datasets=[training.dataset] if training is not None and not training.is_local('dataset') else None,
        metrics=['accuracy'] if results else None,
        eval_results=results or None,
        model_name=facts.repo_id.split('/')[1] if results else None,
        **more,
    )


def _evaluation(training: Training | MetaTraining, split: str | None, name: str, value: float) -> EvalResult:
    subset = training.arguments.get('subset')
    return EvalResult(
        task_type='image-classification',
        task_name='Image Classification',
        dataset_type=training.dataset,
        dataset_name=training.dataset,
        dataset_config=printable(subset) if subset else None,
        dataset_split=printable(split) if split else None,
        metric_type='accuracy',
        metric_name=name,
        metric_value=round(value, 4),
    )


def _link(repo_id: str) -> Markdown:
    """A repository on the Hub, linked if it can be one."""
    return Markdown(f'[{repo_id}](https://huggingface.co/{repo_id})') if REPO.fullmatch(repo_id) else markdown(repo_id)


def _origin_rows(origin: Origin, *, original: bool = False) -> _Rows:
    """Where the weights of a GHN came from."""
    if origin.repo_id:
        yield 'original repository' if original else 'repository of the GHN', _link(origin.repo_id)
    if origin.revision:
        yield 'its revision', code_span(origin.revision)
    if origin.embedded:
        yield 'where it comes from', 'the package timm_ghn'
    if origin.file:
        yield 'original file' if original else 'its file', code_span(PurePath(origin.file).name)
    if origin.sha256:
        yield 'SHA-256 of that file', code_span(origin.sha256)


# Models


def _model_metadata(facts: ModelFacts) -> ModelCardData:
    task = 'image-classification' if facts.num_classes else 'image-feature-extraction'
    tags = [task, 'timm', 'transformers', 'timm_ghn', 'graph-hypernetwork', *(f'arxiv:{arxiv}' for arxiv in ARXIV)]
    training, results = facts.training, []
    if training is not None:
        tested = training.test_top1
        split = training.run['splits'][1] if tested is None else 'test'
        name = f'top-1 {"validation" if tested is None else "test"} accuracy in percent, fine-tuned for '
        name += f'{training.epoch:g} epochs'
        results = [_evaluation(training, split, name, training.top1 if tested is None else tested)]
    return _metadata(facts, results, library_name='timm', pipeline_tag=task, tags=tags)


def _model_parts(facts: ModelFacts) -> dict[str, Any]:
    code, remark = model_code(facts)
    address = f'hf-hub:{facts.repo_id}' + (f'@{facts.revision}' if facts.revision else '')
    return {
        'summary': _model_summary(facts),
        'usage': f"import timm\n\nmodel = timm.create_model('{address}', pretrained=True)",
        'needs': 'This needs timm alone: the weights are safetensors, and the architecture is in `config.json`.',
        'code': code,
        'remark': remark,
    }


def _model_summary(facts: ModelFacts) -> str:
    ghn, training = facts.ghn, facts.training
    start = f'parameters that the graph hypernetwork {markdown(ghn)} predicted' if ghn else None
    if training is not None:
        known = {'pretrained': "timm's pretrained weights", 'random': 'random weights'}
        known['race'] = 'the start that won a race between several'
        start = start or known.get(str(training.init), markdown(training.init))
        text = (
            f'`{facts.architecture}`, fine-tuned for {training.epoch:g} epochs on {markdown(training.dataset)} from '
            f'{start}: {training.top1:.2f} % validation accuracy on its split {code_span(training.run["splits"][1])}.'
        )
        if training.test_top1 is not None:
            text += f' On the test split, by which nothing was chosen: {training.test_top1:.2f} %.'
    elif start is None:
        text = f'`{facts.architecture}`. How its weights were made was not recorded.'
    elif facts.raw:
        text = (
            f'`{facts.architecture}` with {start}, unchanged: **predicted, no training**. It is a start for training, '
            'and no trained network. Parameters that are not predicted are the own ones of the model.'
        )
    else:
        text = f'`{facts.architecture}`, begun with {start}. What was done to its weights since was not recorded.'
    if facts.provenance is not None and facts.provenance.get('trained') is False:
        text += f' {markdown(ghn)} itself is untrained: expect no more of its predictions than of random weights.'
    return text


def _model_rows(facts: ModelFacts) -> _Rows:
    more = f' with {code_span(keywords(facts.model_args))}' if facts.model_args else ''
    yield 'architecture', Markdown(f'`{facts.architecture}`{more}')
    yield 'input size', ' x '.join(map(str, facts.input_size))
    yield 'classes', facts.num_classes or 'none'
    yield 'parameters', f'{facts.parameters:,}'
    origin = origin_of(facts.provenance)
    if facts.provenance is not None and origin is not None:
        provenance = facts.provenance
        yield 'GHN', facts.ghn
        yield from _origin_rows(origin)
        if provenance.get('timm_ghn'):
            yield 'predicted by', f'timm_ghn {provenance["timm_ghn"]}'
        if provenance.get('elements'):
            predicted, elements = provenance['predicted_elements'], provenance['elements']
            tensors = f'{provenance["predicted_tensors"]} of {provenance["tensors"]} tensors'
            share = f'{100 * predicted / elements:.2f} % ({predicted:,} of {elements:,}; {tensors})'
            yield 'predicted parameters', share
        options = provenance.get('postprocess')
        described = PostProcess(**options).describe() if isinstance(options, dict) else options or 'none'
        yield 'post-processing', described
        yield 'seed', provenance.get('seed', 'not recorded')
    if facts.training is not None:
        training, arguments, images = facts.training, facts.training.arguments, facts.training.run['images']
        yield 'data set', training.dataset + (f', {arguments["subset"]}' if arguments.get('subset') else '')
        yield 'images', f'{images["train"]:,} to train on, {images["val"]:,} to validate on'
        batches = f'batches of {arguments["batch_size"]}'
        yield 'training', f'{arguments["opt"]}, learning rate {arguments["lr"]:g}, {batches}'
        yield 'epochs of these weights', f'{training.epoch:g} of {arguments["epochs"]}'
        tuned = f'fine-tuned for {training.epoch:g} epochs'
        yield f'validation accuracy, {tuned}', f'{training.top1:.2f} %'
        if training.test_top1 is not None:
            yield f'test accuracy, {tuned}', f'{training.test_top1:.2f} % ({images["test"]:,} images)'


# GHNs


def _ghn_metadata(facts: GHNFacts) -> ModelCardData:
    training, results = facts.training, []
    # The Hub shows these numbers as those of the weights, so an evaluation of an earlier step is left out.
    if training is not None and training.is_of_the_end:
        split = training.arguments.get('val_split')
        name = 'mean top-1 accuracy in percent, predicted, no training'
        results = [
            _evaluation(training, None if split == 'auto' else split, f'{name}: {training.networks(group)}', value)
            for group, value in training.accuracies.items()
        ]
    tags = ['timm_ghn', 'graph-hypernetwork', 'parameter-prediction', 'timm', *(f'arxiv:{arxiv}' for arxiv in ARXIV)]
    return _metadata(facts, results, library_name='timm_ghn', tags=tags)


def _ghn_parts(facts: GHNFacts) -> dict[str, Any]:
    pinned = f', revision={facts.revision!r}' if facts.revision else ''
    also = '' if pinned else f'`timm_ghn.ghn_init(model, {facts.repo_id!r})` loads it by its name. '
    return {
        'summary': _ghn_summary(facts),
        'usage': (
            f'import timm, timm_ghn\nghn = timm_ghn.load_ghn({facts.repo_id!r}{pinned})\n'
            f"model = timm_ghn.ghn_init(timm.create_model('resnet18', num_classes={facts.config.num_classes}), ghn)"
        ),
        'needs': f'This needs the package timm_ghn. {also}The weights are safetensors; nothing is executed.',
        'limits': list(_ghn_limits(facts)),
    }


def _ghn_summary(facts: GHNFacts) -> str:
    config, training, origin = facts.config, facts.training, facts.origin
    text = f'A graph hypernetwork, {_KINDS.get(config.gnn, config.gnn)}: it predicts the parameters of timm models. '
    if not config.trained:
        return text + 'Its own weights are **random, not trained**: expect no more of its predictions than of these.'
    if training is not None:
        text += f'Trained with timm_ghn for {training.steps:,} steps on {markdown(training.dataset)}'
        text += f', begun with the GHN {markdown(training.init)}.' if training.init is not None else '.'
        if 'known' in training.accuracies and training.is_of_the_end:
            text += (
                f' Mean accuracy there of {training.networks("known")}: {training.accuracies["known"]:.2f} %, '
                '**predicted, no training**.'
            )
        return text
    if origin is None:
        return text + 'How its weights were made was not recorded.'
    start: str = _link(origin.repo_id) if origin.repo_id else f'the file {code_span(PurePath(origin.file or "").name)}'
    if facts.entry is not None:
        described = markdown(facts.entry.description, 1000)
        start = f'`{facts.entry.name}` ({described})' + (f' of {start}' if origin.repo_id else '')
    if not facts.unchanged:
        return text + f'It began as {start}. What was done to its weights since was not recorded.'
    how = 'Converted from' if facts.converted else 'A copy of'
    return text + f'{how} {start}; every weight was compared with that file.'


def _ghn_rows(facts: GHNFacts) -> _Rows:
    config = facts.config
    if config.name:
        yield 'name', config.name
    more = f', {config.layers} layers, {config.heads} heads' if config.gnn == 'graphormer' else ''
    yield 'graph network', f'{config.gnn}{more}'
    more = f', {config.templates} templates, {config.codes} codes' if config.decoder == 'templates' else ''
    yield 'decoder', f'{config.decoder}{more}'
    yield 'parameters', f'{facts.parameters:,}'
    yield 'decoded at once', ' x '.join(map(str, config.max_shape)) + ' (out, in, height, width)'
    yield 'classes', config.num_classes
    yield 'graphs', Markdown(f'rules {code_span(config.rules)}')
    if facts.origin is not None:
        yield from _origin_rows(facts.origin, original=True)
        if facts.entry is not None and facts.entry.paper:
            yield 'paper', Markdown(facts.entry.paper)
    if facts.training is not None:
        yield from _meta_training_rows(facts.training)


def _meta_training_rows(training: MetaTraining) -> _Rows:
    options, run = training.arguments, training.run
    yield 'data set', training.dataset + (f', {options["subset"]}' if options.get('subset') else '')
    size, images = options['image_size'], run['images']
    yield 'images of the data set', f'{images["train"]:,} to train on, {images["val"]:,} to evaluate on, {size} pixels'
    if training.init is not None:
        yield 'begun with', training.init
    yield 'steps', f'{training.steps:,} of {options["steps"]:,}'
    pool = f', {options["pool"]:,} of them' if options.get('pool') else ''
    families = (options.get('sampler_args') or {}).get('families') or list(training.families('known'))
    named = f': {", ".join(map(markdown, families))}' if families else ''
    yield 'architectures', Markdown(f'sampler {code_span(options["sampler"])}{pool}{named}')
    yield 'seed', options['seed']
    yield 'processes', f'{run["processes"]} ({run["device"]})'
    yield 'seconds', f'{training.seconds:,.0f}'
    if training.evaluation is None:
        return
    count = min(options['eval_images'], images['val'])
    where = f'step {training.evaluation["step"]:,}, {count:,} images, {options["eval_count"]} networks of each family, '
    where += 'batches normalised by themselves'
    for group, value in training.accuracies.items():
        parts = ', '.join(f'{markdown(name)} {share:.1f}' for name, share in training.families(group).items())
        # Marked as Markdown: it is longer than the limit for text from files, and holds escaped parts.
        title = Markdown(f'accuracy, predicted, no training: {training.networks(group)}')
        yield title, Markdown(f'{value:.2f} % ({where}: {parts})')


def _ghn_limits(facts: GHNFacts) -> Iterator[str]:
    config, training = facts.config, facts.training
    yield 'A predicted network is a start for training, not a trained network.'
    yield (
        'Running statistics of batch normalisation are not predicted: train, or calibrate them '
        '(`timm_ghn.calibrate_batchnorm_`), before you look at the accuracy in eval mode.'
    )
    yield f"The classifier is predicted for {config.num_classes} classes only, unless `head='predict'` asks for it."
    yield f'Layers of more than {max(config.max_shape[:2]):,} channels repeat what is predicted for so many.'
    if training is not None:
        yield f'It was trained on images of {training.arguments["image_size"]} pixels and on the architectures above.'
