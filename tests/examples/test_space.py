"""The functions of the Space; its page is built where gradio is installed."""

from __future__ import annotations

import html
import re
import runpy
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import timm_ghn

SPACE = Path(__file__).resolve().parents[2] / 'examples' / 'space'


@pytest.fixture(scope='module')
def app():
    return runpy.run_path(str(SPACE / 'app.py'))


def test_the_header_of_the_space_names_its_application():
    _, header, _ = (SPACE / 'README.md').read_text(encoding='utf-8').split('---\n', 2)
    facts = yaml.safe_load(header)
    assert (facts['sdk'], facts['app_file'], facts['license']) == ('gradio', 'app.py', 'mit')
    assert len(facts['short_description']) <= 60, 'the most that the Hub takes'
    wheel = f'timm_ghn-{timm_ghn.__version__}-'
    assert all(wheel in (SPACE / name).read_text(encoding='utf-8') for name in ('README.md', 'requirements.txt'))


def test_the_embedded_ghn_comes_first_and_none_is_too_large(app):
    assert app['ghns']()[0] == 'ghn_tiny'
    assert 'ghn3_xlm16' not in app['ghns']()
    assert set(app['ghns']()) < set(timm_ghn.list_ghns())


def test_graph_and_plan_are_those_of_the_network(app):
    frame, totals, rows = app['inspect']('test_resnet', 'ghn_tiny', 10)
    model = timm.create_model('test_resnet', num_classes=10)
    assert [row[0] for row in rows] == [name for name, _ in model.named_parameters()]
    plan = timm_ghn.predict(model, 'ghn_tiny').plan
    assert totals == plan.totals()
    page = html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1])
    assert page.startswith('<!DOCTYPE html>')
    assert f'test_resnet: {len(plan.graph)} nodes' in page
    assert 'sandbox="allow-scripts"' in frame


@pytest.mark.parametrize('postprocess', ['auto', 'none'])
def test_plain_timm_reads_the_weights(app, postprocess):
    path = app['predict']('test_resnet', 'ghn_tiny', 10, postprocess, 3)
    torch.manual_seed(3)
    expected = timm.create_model('test_resnet', num_classes=10)
    timm_ghn.ghn_init(expected, 'ghn_tiny', seed=3, postprocess=None if postprocess == 'none' else postprocess)
    found = load_file(path)
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.state_dict().items())
    timm.create_model('test_resnet', num_classes=10, checkpoint_path=path)


def test_a_network_that_is_too_large_is_refused(app):
    with pytest.raises(ValueError, match='up to 100,000,000'):
        app['predict']('vit_giant_patch14_clip_224', 'ghn_tiny', 10, 'auto', 0)
