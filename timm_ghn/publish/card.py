"""Model cards, written from facts with huggingface_hub's own classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_ghn.errors import ConfigError
from timm_ghn.hub.entry import REPO
from timm_ghn.prediction.postprocess import NAMED, PostProcess
from timm_ghn.publish.facts import Facts, Training, entry_of
from timm_ghn.text import Markdown, code, markdown, printable
from timm_ghn.version import __version__

#: Papers behind every prediction: key of the entry, arXiv identifier, title, authors, year.
PAPERS = (
    (
        'knyazev2021parameter', '2110.13100', 'Parameter Prediction for Unseen Deep Architectures',
        'Boris Knyazev and Michal Drozdzal and Graham W. Taylor and Adriana Romero-Soriano', 2021,
    ),
    (
        'knyazev2022pretraining', '2207.10049', 'Pretraining a Neural Network before Knowing Its Architecture',
        'Boris Knyazev', 2022,
    ),
    (
        'knyazev2023canwescale', '2303.04143',
        'Can We Scale Transformers to Predict Parameters of Diverse ImageNet Models?',
        'Boris Knyazev and Doha Hwang and Simon Lacoste-Julien', 2023,
    ),
)  # fmt: skip

_HUB = 'https://huggingface.co'

#: End of a card.
CITATION = """## Citation

```bibtex
{% for key, arxiv, title, authors, year in papers -%}
@article{ {{- key }},
  title = { {{- title -}} },
  author = { {{- authors -}} },
  journal = {arXiv:{{ arxiv }}},
  year = { {{- year -}} }
}
{% endfor -%}
```
"""

#: Options of a fine-tuning run that have no part in what comes out of it.
_FREE = (
    'output', 'resume', 'workers', 'log_with', 'val_batch_size', 'time_limit', 'checkpoint_steps', 'checkpoint_hist',
    'push_to_hub', 'hub_private', 'hub_revision', 'hub_create_pr',
    'hub_license',
)  # fmt: skip

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ summary }}

## Use it

```python
import timm

model = timm.create_model('{{ address }}', pretrained=True)
```

This needs timm alone: the weights are safetensors, and the architecture is in `config.json`.

## Facts

| | |
| --- | --- |
{% for key, value in rows -%}
| {{ key }} | {{ value }} |
{% endfor %}
{%- if code %}
## Reproduce it

With timm_ghn {{ version }}{{ remark }}:

```python
{{ code }}
```
{% endif %}
"""


def model_card(facts: Facts) -> ModelCard:
    """The card of a model.

    Args:
        facts: All that it says.

    Raises:
        ValueError: if huggingface_hub refuses the metadata.
    """
    code, remark = _code(facts)
    address = f'hf-hub:{facts.repo_id}' + (f'@{facts.revision}' if facts.revision else '')
    return card_from(
        _TEMPLATE,
        metadata(facts),
        facts.repo_id,
        _rows(facts),
        summary=_summary(facts),
        address=address,
        code=code,
        remark=remark,
        version=__version__,
    )


def card_from(
    template: str, data: ModelCardData, repo_id: str, rows: Iterable[tuple[str, Any]], **more: Any
) -> ModelCard:
    """A card of ours: the template with its table of facts, and whom to cite.

    Args:
        template: In the Hub's form, with ``card_data`` and a loop over ``rows``.
        data: What the Hub reads.
        repo_id: Repository on the Hub.
        rows: Of the table of facts; what is not Markdown already is escaped.
        more: What else the template names.

    Raises:
        ValueError: if huggingface_hub refuses the metadata.
    """
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=template + CITATION,
        name=repo_id.split('/')[1],
        rows=[(markdown(key), markdown(value)) for key, value in rows],
        papers=PAPERS,
        **more,
    )
    return card


def save_card(make: Callable[[], ModelCard], path: Path) -> None:
    """Write a card.

    Raises:
        ConfigError: if huggingface_hub refuses the metadata, or if a run's results are not those that a run writes.
    """
    try:
        make().save(path)
    except (AttributeError, LookupError, TypeError) as error:
        raise ConfigError(f'the results of the run are incomplete ({type(error).__name__}: {error})') from error
    except ValueError as error:
        raise ConfigError(f'the card cannot be written: {error}') from error


def link(repo_id: str) -> Markdown:
    """A repository on the Hub, linked if it can be one."""
    return Markdown(f'[{repo_id}]({_HUB}/{repo_id})') if REPO.fullmatch(repo_id) else markdown(repo_id)


def metadata(facts: Facts) -> ModelCardData:
    """What the Hub reads of a card.

    Raises:
        ValueError: if huggingface_hub refuses it.
    """
    training = facts.training
    task = 'image-classification' if facts.num_classes else 'image-feature-extraction'
    public = training is not None and training.dataset_is_public
    return ModelCardData(
        license=facts.license,
        library_name='timm',
        pipeline_tag=task,
        tags=[
            task,
            'timm',
            'transformers',
            'timm_ghn',
            'graph-hypernetwork',
            *(f'arxiv:{paper[1]}' for paper in PAPERS),
        ],
        datasets=[training.dataset] if training is not None and public else None,
        metrics=['accuracy'] if training is not None else None,
        eval_results=[_evaluation(training)] if training is not None else None,
        model_name=facts.repo_id.split('/')[1] if training is not None else None,
    )


def _evaluation(training: Training) -> EvalResult:
    subset, tested = training.arguments.get('subset'), training.test_top1
    return EvalResult(
        task_type='image-classification',
        task_name='Image Classification',
        dataset_type=training.dataset,
        dataset_name=training.dataset,
        dataset_config=printable(subset) if subset else None,
        dataset_split=printable(training.run['splits'][1]) if tested is None else 'test',
        metric_type='accuracy',
        metric_name=f'top-1 {"validation" if tested is None else "test"} accuracy in percent, fine-tuned for '
        f'{training.epoch:g} epochs',
        metric_value=round(training.top1 if tested is None else tested, 4),
    )


def _summary(facts: Facts) -> str:
    ghn, training = facts.ghn, facts.training
    start = f'parameters that the graph hypernetwork {markdown(ghn)} predicted' if ghn else None
    if training is not None:
        init = str(training.arguments['init'])
        start = start or {'pretrained': "timm's pretrained weights"}.get(init, 'random weights')
        text = (
            f'`{facts.architecture}`, fine-tuned for {training.epoch:g} epochs on {markdown(training.dataset)} from '
            f'{start}: {training.top1:.2f} % validation accuracy on its split {code(training.run["splits"][1])}.'
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


def _rows(facts: Facts) -> Iterator[tuple[str, Any]]:
    more = f' with {code(_call(facts.model_args))}' if facts.model_args else ''
    yield 'architecture', Markdown(f'`{facts.architecture}`{more}')
    yield 'input size', ' x '.join(map(str, facts.input_size))
    yield 'classes', facts.num_classes or 'none'
    yield 'parameters', f'{facts.parameters:,}'
    if facts.provenance is not None:
        yield from _ghn_rows(facts.ghn, facts.provenance)
    if facts.training is not None:
        yield from _training_rows(facts.training)
    yield 'written by', f'timm_ghn {__version__}'


def origin_rows(origin: Mapping[str, Any], *, original: bool = False) -> Iterator[tuple[str, Any]]:
    """Where the weights of a GHN came from, of :class:`~timm_ghn.nn.config.Origin`.

    Args:
        origin: Its fields.
        original: Whether the card is that of the GHN itself.
    """
    if origin.get('repo_id'):
        yield 'original repository' if original else 'repository of the GHN', link(origin['repo_id'])
    if origin.get('revision'):
        yield 'its revision', code(origin['revision'])
    if origin.get('embedded'):
        yield 'where it comes from', 'the package timm_ghn'
    if origin.get('file'):
        yield 'original file' if original else 'its file', code(PurePath(origin['file']).name)
    if origin.get('sha256'):
        yield 'SHA-256 of that file', code(origin['sha256'])


def _ghn_rows(ghn: str | None, said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield 'GHN', ghn
    yield from origin_rows(said.get('origin') or {})
    if said.get('timm_ghn'):
        yield 'predicted by', f'timm_ghn {said["timm_ghn"]}'
    if said.get('elements'):
        share = said['predicted_elements'] / said['elements']
        counts = f'{said["predicted_elements"]:,} of {said["elements"]:,}'
        yield (
            'predicted parameters',
            f'{100 * share:.2f} % ({counts}; {said["predicted_tensors"]} of {said["tensors"]} tensors)',
        )
    options = said.get('postprocess')
    yield 'post-processing', PostProcess(**options).describe() if isinstance(options, dict) else options or 'none'
    yield 'seed', said.get('seed', 'not recorded')


def _training_rows(training: Training) -> Iterator[tuple[str, Any]]:
    said, images = training.arguments, training.run['images']
    yield 'data set', training.dataset + (f', {said["subset"]}' if said.get('subset') else '')
    yield 'images', f'{images["train"]:,} to train on, {images["val"]:,} to validate on'
    yield 'training', f'{said["opt"]}, learning rate {said["lr"]:g}, batches of {said["batch_size"]}'
    yield 'epochs of these weights', f'{training.epoch:g} of {said["epochs"]}'
    yield f'validation accuracy, fine-tuned for {training.epoch:g} epochs', f'{training.top1:.2f} %'
    if training.test_top1 is not None:
        tested = f'{training.test_top1:.2f} % ({images["test"]:,} images)'
        yield f'test accuracy, fine-tuned for {training.epoch:g} epochs', tested


def _code(facts: Facts) -> tuple[str | None, str]:
    """Lines that do it again, and what to know of them."""
    if facts.training is not None:
        return _training_code(facts.training), ''
    said = facts.provenance
    if said is None or isinstance(said.get('postprocess'), str):
        return None, ''
    remark = '; parameters that are not predicted are drawn anew by timm'
    if said.get('predicted_elements') and said['predicted_elements'] == said.get('elements'):
        remark = ''
    arguments = {'head': said.get('head', 'auto'), 'seed': said.get('seed', 0)}
    call = f'{_ghn_code(facts)}, {_call(arguments)}, postprocess={_postprocess_code(said.get("postprocess"), said)}'
    if said.get('input_size'):
        call += f', input_size={tuple(said["input_size"])}'
    model = ', '.join(filter(None, [repr(facts.architecture), _call(facts.model_args)]))
    lines = ['import timm, timm_ghn', f'model = timm.create_model({model})', f'timm_ghn.ghn_init(model, {call})']
    return '\n'.join(lines), remark


def _ghn_code(facts: Facts) -> str:
    said = facts.provenance or {}
    origin, entry = said.get('origin') or {}, entry_of(said)
    name = entry.name if entry is not None else origin.get('repo_id') or PurePath(origin.get('file') or '').name
    name = printable(name or facts.ghn)
    pinned = f', revision={printable(origin["revision"])!r}' if origin.get('revision') else ''
    return f'timm_ghn.load_ghn({name!r}{pinned})' if pinned else repr(name)


def _postprocess_code(options: Mapping[str, Any] | None, said: Mapping[str, Any]) -> str:
    if options is None:
        return 'None'
    made = PostProcess(**options)
    named = [name for name in NAMED if PostProcess.of(name, seed=said.get('seed', 0)) == made]
    return repr(named[0]) if named else f'timm_ghn.PostProcess({_call(options)})'


def _training_code(training: Training) -> str:
    said = {key: value for key, value in training.arguments.items() if value is not None and value is not False}
    if not training.dataset_is_public:
        said['dataset'] = training.dataset
    if training.is_local('init'):
        said['init'] = PurePath(str(said['init'])).name
    entry = entry_of(training.run.get('provenance'))
    if entry is not None:
        said['init'] = entry.name  # the default may be another one elsewhere
    # What says where the run was and where it went. A run that is pushed later is to get the same card.
    for free in _FREE:
        said.pop(free, None)
    lines = ('from timm_ghn.finetune.loop import finetune', 'from timm_ghn.finetune.options import FinetuneOptions')
    return '\n'.join((*lines, f'finetune(FinetuneOptions({_call(said)}))'))


def _call(arguments: Mapping[str, Any]) -> str:
    return ', '.join(f'{printable(key)}={value!r}' for key, value in arguments.items())
