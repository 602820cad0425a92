"""The file of results: what is written is JSON, and what cannot be read is passed over."""

from __future__ import annotations

import json
import math

import pytest

from timm_ghn.plots import plot_curves
from timm_ghn.runs import checkpoints
from timm_ghn.runs.results import RESULTS, Results, read_results

RUN, FIRST, SECOND = {'kind': 'run'}, {'kind': 'epoch', 'epoch': 0}, {'kind': 'epoch', 'epoch': 1}
NO_RESULTS = [b'5', b'null', b'["kind"]', b'{"epoch": 1}', b'{"kind": 3}', b'{', b'\xff\xfe', b'[' * 100_000]


def write(folder, *lines: bytes):
    path = folder / RESULTS
    path.write_bytes(b'\n'.join(lines))
    return path


def line(values) -> bytes:
    return json.dumps(values).encode()


def refuse(word):
    raise ValueError(word)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_written_as_null(tmp_path, value):
    Results(tmp_path).add('epoch', {'val_loss': value, 'more': [{'of': (value, 1.5)}]})
    read = json.loads((tmp_path / RESULTS).read_text(), parse_constant=refuse)
    assert read == {'kind': 'epoch', 'val_loss': None, 'more': [{'of': [None, 1.5]}]}


@pytest.mark.parametrize('wrong', NO_RESULTS, ids=range(len(NO_RESULTS)))
def test_a_line_that_is_no_result_is_passed_over_with_a_warning(tmp_path, wrong):
    path = write(tmp_path, line(RUN), wrong, line(FIRST), b'')
    with pytest.warns(UserWarning, match=r'has 1 lines that are no results .*the first is line 2'):
        assert read_results(path) == [RUN, FIRST]


@pytest.mark.parametrize('wrong', NO_RESULTS, ids=range(len(NO_RESULTS)))
def test_a_line_that_was_left_unfinished_is_dropped(tmp_path, wrong):
    assert read_results(write(tmp_path, line(RUN), line(FIRST), wrong)) == [RUN, FIRST]


def test_a_run_that_goes_on_keeps_what_lies_before_it(tmp_path):
    lines = (RUN, FIRST, SECOND, {'kind': 'epoch', 'epoch': 'two'}, {'kind': 'epoch'}, {'kind': 'end'})
    path = write(tmp_path, *map(line, lines), b'')
    Results(tmp_path, resume=('epoch', 0))
    assert read_results(path) == [RUN, FIRST]


def test_curves_leave_out_what_is_no_number(tmp_path):
    values = [{'epoch': 0, 'val_loss': None}, {'epoch': None, 'val_loss': 1.0}, {'epoch': 2, 'val_loss': 'low'}]
    lines = [{'kind': 'epoch', 'val_top1': 5.0, **value} for value in values]
    plot_curves(lines, tmp_path / 'curves.png', 'title')
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / checkpoints.PROGRESS).write_text('{"progress": {"step": 1}, "run": {}}')
    (tmp_path / checkpoints.MANIFEST).write_text(json.dumps(checkpoints.manifest_of(tmp_path)))
    return tmp_path


def test_a_whole_checkpoint_has_no_damage(checkpoint):
    assert checkpoints.damage(checkpoint) is None


@pytest.mark.parametrize(
    'text', ['[' * 100_000, '5', '{', '{"progress.json": 5}', '{"progress.json": [1, 2, 3]}', '["progress.json"]']
)
def test_a_manifest_that_cannot_be_read_is_a_damage(checkpoint, text):
    (checkpoint / checkpoints.MANIFEST).write_text(text)
    assert 'its manifest cannot be read' in checkpoints.damage(checkpoint)


@pytest.mark.parametrize('text', ['[' * 100_000, '5', '{', '{}', '{"progress": 3, "run": {}}', '{"progress": {}}'])
def test_a_progress_that_cannot_be_read_is_a_damage(checkpoint, text):
    (checkpoint / checkpoints.MANIFEST).unlink()
    (checkpoint / checkpoints.PROGRESS).write_text(text)
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(checkpoints.manifest_of(checkpoint)))
    assert 'its progress cannot be read' in checkpoints.damage(checkpoint)
