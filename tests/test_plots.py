"""Every figure draws names as they are."""

from __future__ import annotations

import pytest
import timm
from tiny import TINY, make_ghn
from torch import nn

from timm_ghn import predict
from timm_ghn.plots import draw, plot_curves, plot_race, plot_search, plot_training
from timm_ghn.prediction.diversity import compare

#: matplotlib would read it as a formula, and a wrong one.
TITLE = 'my$\\frac$_model'
EPOCHS = [{'kind': 'epoch', 'epoch': 1, 'train_loss': 1.0, 'val_loss': 1.0, 'val_top1': 50.0, 'ema_top1': 51.0}]
STEPS = [{'kind': 'train', 'step': 1, 'top1': 20.0}, {'kind': 'eval', 'step': 1, 'known': 30.0, 'unseen': 20.0}]


@pytest.fixture(scope='module')
def comparisons():
    model = timm.create_model('test_vit')
    prediction = predict(model, make_ghn(TINY['graphormer']))
    return list(compare(prediction.state_dict, dict(model.named_parameters()), prediction.plan, None))


@pytest.fixture(params=['epochs', 'steps', 'diversity'])
def figure(request, tmp_path, comparisons):
    path = tmp_path / 'figure.svg'
    if request.param == 'epochs':
        plot_curves(EPOCHS, path, TITLE)
    elif request.param == 'steps':
        plot_training(STEPS, path, TITLE, chance=10)
    else:
        draw(comparisons, path, title=TITLE)
    return path


def test_dollar_signs_in_a_title_are_no_formula(figure):
    # The SVG has the text of each drawing in a comment before it.
    assert f'<!-- {TITLE} -->' in figure.read_text()


def test_dollar_signs_in_the_name_of_a_layer_are_no_formula(tmp_path):
    model = nn.ModuleDict({'a$\\frac$_b': timm.create_model('test_vit')})
    model.forward = model['a$\\frac$_b'].forward
    prediction = predict(model, make_ghn(TINY['graphormer']), input_size=(3, 160, 160))
    found = list(compare(prediction.state_dict, dict(model.named_parameters()), prediction.plan, None))
    draw(found, tmp_path / 'figure.svg', title='one')
    assert 'a$\\frac$_b.' in (tmp_path / 'figure.svg').read_text()


def test_dollar_signs_in_the_name_of_a_start_or_an_architecture_are_no_formula(tmp_path):
    plot_race([('own', [(5, 10.0, 2.0)]), (TITLE, [(5, 20.0, 2.0), (15, 30.0, 1.5)])], tmp_path / 'race.svg')
    plot_search([(TITLE, 1000, 5.0), ('other', 2000, 4.0)], tmp_path / 'search.svg')
    for name in ('race', 'search'):
        assert f'<!-- {TITLE} -->' in (tmp_path / f'{name}.svg').read_text()
