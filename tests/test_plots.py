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
    """Of a network one of whose layers has such a name."""
    model = nn.ModuleDict({'a$\\frac$_b': timm.create_model('test_vit')})
    model.forward = model['a$\\frac$_b'].forward
    prediction = predict(model, make_ghn(TINY['graphormer']), input_size=(3, 160, 160))
    return list(compare(prediction.state_dict, dict(model.named_parameters()), prediction.plan, None))


FIGURES = {
    'epochs': lambda path, comparisons: plot_curves(EPOCHS, path, TITLE),
    'steps': lambda path, comparisons: plot_training(STEPS, path, TITLE, chance=10),
    'diversity': lambda path, comparisons: draw(comparisons, path, title=TITLE),
    'race': lambda path, comparisons: plot_race([('own', [(5, 10.0, 2.0)]), (TITLE, [(5, 20.0, 2.0)])], path),
    'search': lambda path, comparisons: plot_search([(TITLE, 1000, 5.0), ('other', 2000, 4.0)], path),
}


@pytest.mark.parametrize('figure', FIGURES)
def test_dollar_signs_in_a_name_are_no_formula(figure, tmp_path, comparisons):
    FIGURES[figure](tmp_path / 'figure.svg', comparisons)
    # The SVG has the text of each drawing in a comment before it.
    text = (tmp_path / 'figure.svg').read_text()
    assert f'<!-- {TITLE} -->' in text
    assert figure != 'diversity' or 'a$\\frac$_b.' in text
