"""The card of a GHN, written from facts with huggingface_hub's own classes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_ghn.graph.primitives import Primitive
from timm_ghn.publish.card import PAPERS, card_from, link, origin_rows
from timm_ghn.publish.ghn_facts import GHNFacts, MetaTraining
from timm_ghn.text import Markdown, code, markdown, printable
from timm_ghn.version import __version__

_KINDS = {'graphormer': 'GHN-3 (Graphormer)', 'gated': 'GHN-2 or GHN-1 (gated graph network)', 'mlp': 'baseline (MLP)'}

#: An address that needs no escaping.
_ADDRESS = re.compile(r'https://[\w./-]+', re.ASCII)

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ summary }}

## Use it

```python
import timm, timm_ghn
ghn = timm_ghn.load_ghn({{ address }})
model = timm_ghn.ghn_init(timm.create_model('resnet18', num_classes={{ classes }}), ghn)
```

This needs the package timm_ghn. {{ also }}The weights are safetensors; nothing is executed.

## Facts

| | |
| --- | --- |
{% for key, value in rows -%}
| {{ key }} | {{ value }} |
{% endfor %}
## Limits

{% for limit in limits -%}
- {{ limit }}
{% endfor %}
"""


def ghn_card(facts: GHNFacts) -> ModelCard:
    """The card of a GHN.

    Args:
        facts: All that it says.

    Raises:
        ValueError: if huggingface_hub refuses the metadata.
    """
    pinned = f', revision={facts.revision!r}' if facts.revision else ''
    return card_from(
        _TEMPLATE,
        ghn_metadata(facts),
        facts.repo_id,
        _rows(facts),
        summary=_summary(facts),
        address=f'{facts.repo_id!r}{pinned}',
        classes=facts.config.num_classes,
        also='' if pinned else f'`timm_ghn.ghn_init(model, {facts.repo_id!r})` loads it by its name. ',
        limits=list(_limits(facts)),
    )


def ghn_metadata(facts: GHNFacts) -> ModelCardData:
    """What the Hub reads of the card.

    Raises:
        ValueError: if huggingface_hub refuses it.
    """
    training = facts.training
    results = list(_evaluations(training)) if training is not None else []
    return ModelCardData(
        license=facts.license,
        library_name='timm_ghn',
        tags=['timm_ghn', 'graph-hypernetwork', 'parameter-prediction', 'timm', *(f'arxiv:{p[1]}' for p in PAPERS)],
        datasets=[training.dataset] if training is not None and training.dataset_is_public else None,
        metrics=['accuracy'] if results else None,
        eval_results=results or None,
        model_name=facts.repo_id.split('/')[1] if results else None,
    )


def _evaluations(training: MetaTraining) -> Iterator[EvalResult]:
    # Numbers without their context are read as those of the weights: an earlier step's stay out.
    if not training.is_of_the_end:
        return
    subset, split = (training.arguments.get(name) for name in ('subset', 'val_split'))
    for group, value in training.accuracies.items():
        yield EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=training.dataset,
            dataset_name=training.dataset,
            dataset_config=printable(subset) if subset else None,
            dataset_split=printable(split) if split and split != 'auto' else None,
            metric_type='accuracy',
            metric_name=f'mean top-1 accuracy in percent, predicted, no training: {training.networks(group)}',
            metric_value=round(value, 4),
        )


def _summary(facts: GHNFacts) -> str:
    config, training, origin = facts.config, facts.training, facts.origin
    text = f'A graph hypernetwork, {_KINDS.get(config.gnn, config.gnn)}: it predicts the parameters of timm models. '
    if not config.trained:
        return text + 'Its own weights are **random, not trained**: expect no more of its predictions than of these.'
    if training is not None:
        text += f'Trained with timm_ghn for {training.steps:,} steps on {markdown(training.dataset)}'
        text += f', begun with the GHN {markdown(training.begun_with)}.' if training.begun_with is not None else '.'
        if 'known' in training.accuracies and training.is_of_the_end:
            text += (
                f' Mean accuracy there of {training.networks("known")}: {training.accuracies["known"]:.2f} %, '
                '**predicted, no training**.'
            )
        return text
    if origin is None:
        return text + 'How its weights were made was not recorded.'
    start: str = link(origin.repo_id) if origin.repo_id else f'the file {code(PurePath(origin.file or "").name)}'
    if facts.entry is not None:
        described = markdown(facts.entry.description, 1000)
        start = f'`{facts.entry.name}` ({described})' + (f' of {start}' if origin.repo_id else '')
    if not facts.unchanged:
        return text + f'It began as {start}. What was done to its weights since was not recorded.'
    how = 'Converted from' if facts.converted else 'A copy of'
    return text + f'{how} {start}; every weight was compared with that file.'


def _rows(facts: GHNFacts) -> Iterator[tuple[str, Any]]:
    config = facts.config
    if config.name:
        yield 'name', config.name
    more = f', {config.layers} layers, {config.heads} heads' if config.gnn == 'graphormer' else ''
    yield 'graph network', f'{config.gnn}{more}'
    more = f', {config.templates} templates, {config.codes} codes' if config.decoder == 'templates' else ''
    yield 'decoder', f'{config.decoder}{more}'
    yield 'parameters', f'{facts.parameters:,}'
    yield 'width of the node embeddings', config.hid
    yield 'decoded at once', ' x '.join(map(str, config.max_shape)) + ' (out, in, height, width)'
    yield 'classes', config.num_classes
    edges = f'virtual edges for paths of up to {config.virtual_edges}'
    edges = edges if config.virtual_edges > 1 else 'no virtual edges'
    yield 'graphs', Markdown(f'rules {code(config.rules)}, {len(Primitive)} kinds of nodes, {edges}')
    yield 'images', f'mean {_numbers(config.mean)}, standard deviation {_numbers(config.std)}'
    if facts.origin is not None:
        yield from origin_rows(dataclasses.asdict(facts.origin), original=True)
        if facts.entry is not None and facts.entry.paper:
            paper = facts.entry.paper
            yield 'paper', Markdown(paper) if _ADDRESS.fullmatch(paper) else paper
    if facts.training is not None:
        yield from _training_rows(facts.training)
    yield 'written by', f'timm_ghn {__version__}'


def _training_rows(training: MetaTraining) -> Iterator[tuple[str, Any]]:
    said, run = training.arguments, training.run
    yield 'data set', training.dataset + (f', {said["subset"]}' if said.get('subset') else '')
    size, images = said['image_size'], run['images']
    yield 'images of the data set', f'{images["train"]:,} to train on, {images["val"]:,} to evaluate on, {size} pixels'
    yield 'splits', Markdown(f'{code(said["train_split"])} to train on, {code(said["val_split"])} to evaluate on')
    if training.begun_with is not None:
        yield 'begun with', training.begun_with
    yield 'steps', f'{training.steps:,} of {said["steps"]:,}'
    yield 'a step', f'{said["meta_batch"]} architectures, {said["batch_size"]} images'
    yield (
        'optimiser',
        f'{said.get("opt", "adamw")}, learning rate {said["lr"]:g}, weight decay {said["weight_decay"]:g}',
    )
    pool = f', {said["pool"]:,} of them' if said.get('pool') else ''
    families = (said.get('sampler_args') or {}).get('families') or list(training.families('known'))
    named = f': {", ".join(map(markdown, families))}' if families else ''
    yield 'architectures', Markdown(f'sampler {code(said["sampler"])}{pool}{named}')
    yield 'seed', said['seed']
    yield 'processes', f'{run["processes"]} ({run["device"]})'
    yield 'seconds', f'{training.seconds:,.0f}'
    if training.evaluation is None:
        return
    count = min(said['eval_images'], images['val'])
    where = f'step {training.evaluation["step"]:,}, {count:,} images, {said["eval_count"]} networks of each family, '
    where += 'batches normalised by themselves'
    for group, value in training.accuracies.items():
        parts = ', '.join(f'{markdown(name)} {share:.1f}' for name, share in training.families(group).items())
        # Longer than a name may be, and Markdown of ours.
        said_of = Markdown(f'accuracy, predicted, no training: {training.networks(group)}')
        yield said_of, Markdown(f'{value:.2f} % ({where}: {parts})')


def _limits(facts: GHNFacts) -> Iterator[str]:
    config, training = facts.config, facts.training
    yield 'A predicted network is a start for training, not a trained network.'
    yield (
        'Running statistics of batch normalisation are not predicted: train, or calibrate them '
        '(`timm_ghn.calibrate_batchnorm_`), before you look at the accuracy in eval mode.'
    )
    yield (
        f'The classifier is predicted for {config.num_classes} classes; for another number it is kept as timm drew it, '
        "unless `head='predict'` asks for it."
    )
    yield f'Layers of more than {max(config.max_shape[:2]):,} channels repeat what is predicted for so many.'
    if training is not None:
        yield (
            f'It was trained on images of {training.arguments["image_size"]} pixels and on the architectures above; '
            'what it predicts for others was measured only where this card says so.'
        )


def _numbers(values: tuple[float, ...]) -> str:
    return ', '.join(f'{value:g}' for value in values)
