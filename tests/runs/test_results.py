"""The file of results and the checkpoints: what is written is JSON, and what was left unfinished is dropped."""

from __future__ import annotations

import json
import math

import pytest

from timm_ghn.plots import plot_curves
from timm_ghn.runs import checkpoints
from timm_ghn.runs.results import RESULTS, Results, read_results

RUN, FIRST, SECOND = {'kind': 'run'}, {'kind': 'epoch', 'epoch': 0}, {'kind': 'epoch', 'epoch': 1}


def write(folder, *lines):
    path = folder / RESULTS
    path.write_text('\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def refuse(word):
    raise ValueError(word)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_written_as_null(tmp_path, value):
    Results(tmp_path).add('epoch', {'val_loss': value, 'more': [{'of': (value, 1.5)}]})
    read = json.loads((tmp_path / RESULTS).read_text(), parse_constant=refuse)
    assert read == {'kind': 'epoch', 'val_loss': None, 'more': [{'of': [None, 1.5]}]}


@pytest.mark.parametrize('wrong', ['5', '{"epoch": 1}', '{"kind": "epo', '[' * 100_000])
def test_a_line_that_is_no_result_is_dropped(tmp_path, wrong):
    assert read_results(write(tmp_path, RUN, FIRST, wrong)) == [RUN, FIRST]


def test_a_run_that_goes_on_keeps_what_lies_before_it(tmp_path):
    path = write(tmp_path, RUN, FIRST, SECOND, {'kind': 'end'}, '')
    Results(tmp_path, resume=('epoch', 0))
    assert read_results(path) == [RUN, FIRST]


def test_curves_leave_out_what_is_no_number(tmp_path):
    values = [{'epoch': 0, 'val_loss': None}, {'epoch': None, 'val_loss': 1.0}, {'epoch': 2, 'val_loss': 'low'}]
    lines = [{'kind': 'epoch', 'val_top1': 5.0, **value} for value in values]
    plot_curves(lines, tmp_path / 'curves.png', 'title')
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    ('name', 'text'),
    [(checkpoints.MANIFEST, '{'), (checkpoints.MANIFEST, '[]'), (checkpoints.PROGRESS, '{}'), ('gone', None)],
)
def test_a_checkpoint_that_differs_from_its_manifest_is_damaged(tmp_path, name, text):
    (tmp_path / checkpoints.PROGRESS).write_text('{"progress": {"step": 1}, "run": {}}')
    (tmp_path / 'gone').touch()
    (tmp_path / checkpoints.MANIFEST).write_text(json.dumps(checkpoints.manifest_of(tmp_path)))
    assert checkpoints.damage(tmp_path) is None
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    assert name in checkpoints.damage(tmp_path)
