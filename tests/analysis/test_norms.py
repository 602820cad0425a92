"""Norms of predicted torchvision networks beside published ones: ``timm-ghn verify`` goes through them all."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from tiny import GOLDEN

from timm_ghn import register_ghn
from timm_ghn.analysis import norms
from timm_ghn.errors import UnsupportedModelError
from timm_ghn.hub import catalogue
from timm_ghn.hub.catalogue import EMBEDDED, known_ghns

NUMBER = re.compile(r'[+-]?\d+\.\d{4}')


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(catalogue, '_registered', {})


@pytest.fixture
def verify(call_cli):
    """Verify the GHN of a file: exit code, the cells of each network's row, the last line, the errors."""

    def run(path: Path, published: dict[str, float]) -> tuple[int, dict[str, list[str]], str, str]:
        register_ghn('random', path)
        catalogue._registered['random'] = dataclasses.replace(catalogue._registered['random'], norms=published)
        code, out, err = call_cli('verify random')
        rows = [line.split(maxsplit=4) for line in out.splitlines() if NUMBER.search(line)]
        return code, {arch: cells for arch, *cells in rows}, ''.join(out.splitlines()[-1:]), err

    return run


def reference_norms(golden: Path, ghn: str) -> dict[str, float]:
    """Norms over all parameters that the reference predicted, of the networks of which it predicted every value."""
    found = {}
    for file in sorted((golden / 'predictions' / ghn).glob('torchvision--*.json')):
        record = json.loads(file.read_text())
        parameters = record['parameters'].values()
        if all(parameter['predicted'] and not parameter.get('random') for parameter in parameters):
            found[record['architecture']] = math.hypot(*(parameter['norm'] for parameter in parameters))
    return found


@pytest.mark.parametrize(
    ('arch', 'side'),
    [('inception_v3', 299), ('resnet50', 224), ('efficientnet_b3', 300), ('vit_b_16', 224), ('vit_h_14', 224)],
)
def test_the_side_of_the_image_is_that_of_the_weights(arch, side):
    assert norms.image_side(arch) == side


def test_verify_agrees_with_what_the_reference_predicted(verify):
    checkpoint = GOLDEN / 'checkpoints' / 'ghn2_hub.pt'
    published = reference_norms(GOLDEN, 'ghn2_hub')
    assert published.keys() == {'densenet121', 'mobilenet_v3_small', 'resnet18'}
    code, rows, last, err = verify(checkpoint, published)
    assert {arch: row[3] for arch, row in rows.items()} == dict.fromkeys(published, 'yes')
    assert (code, last, err) == (0, '3 of 3 norms agree', '')
    code, rows, last, _ = verify(checkpoint, {'resnet18': published['resnet18'] + 2 * norms.NORM_TOLERANCE})
    assert (code, rows['resnet18'][3], last) == (1, 'NO', '0 of 1 norms agree')


def test_a_network_that_fails_is_a_row_with_its_reason(verify, monkeypatch):
    def norm(arch: str, ghn: object) -> float:
        if arch == 'resnet18':
            raise UnsupportedModelError('not\nto be traced')
        if arch == 'resnet34':
            raise RuntimeError('no memory')
        return 2.0

    monkeypatch.setattr(norms, 'predicted_norm', norm)
    code, rows, last, err = verify(
        known_ghns()[EMBEDDED].place, {'resnet18': 1.0, 'resnet34': 1.5, 'resnet50': 2.0, 'alexnet': 3.0}
    )
    assert rows == {
        'resnet18': ['1.0000', '-', '-', 'FAILED: not to be traced'],
        'resnet34': ['1.5000', '-', '-', 'FAILED: no memory'],
        'resnet50': ['2.0000', '2.0000', '+0.0000', 'yes'],
        'alexnet': ['3.0000', '2.0000', '-1.0000', 'NO'],
    }
    assert (code, last, err) == (1, '1 of 4 norms agree', '')


def test_only_classification_networks_have_norms(verify):
    code, rows, _, err = verify(known_ghns()[EMBEDDED].place, {'retinanet_resnet50_fpn': 1.0})
    assert (code, rows) == (2, {})
    assert "torchvision has no network 'retinanet_resnet50_fpn'" in err


@pytest.mark.slow
def test_verify_goes_through_all_published_networks(verify, golden):
    checkpoint = golden / 'checkpoints' / 'ghn3tm8.pt'
    reference = reference_norms(golden, 'ghn3tm8')
    names = known_ghns()['ghn3_tm8'].norms
    assert len(names) == 74
    code, rows, last, err = verify(checkpoint, {arch: reference.get(arch, 1.0) for arch in names})
    known = sorted(reference.keys() & names.keys())
    assert len(known) > 20
    assert list(rows) == list(names)
    assert not [row for row in rows.values() if not all(NUMBER.fullmatch(cell) for cell in row[:3])]
    assert sorted(arch for arch, row in rows.items() if row[3] == 'yes') == known
    assert (code, last, err) == (1, f'{len(known)} of 74 norms agree', '')
