import argparse
import dataclasses
from pathlib import Path

import pytest

from timm_ghn import PostProcess
from timm_ghn.errors import ConfigError
from timm_ghn.finetune.options import GROUPS, FinetuneOptions
from timm_ghn.recipes import add_arguments, options_of, read_recipe
from timm_ghn.train.options import TrainOptions

BASE = {'model': 'test_vit', 'dataset': 'somewhere'}


def parsed(*arguments: str) -> FinetuneOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser, FinetuneOptions, GROUPS)
    return options_of(parser.parse_args(arguments), FinetuneOptions)


def test_the_command_line_has_every_option_and_no_default_of_its_own():
    assert parsed('--model', 'test_vit', '--dataset', 'somewhere') == FinetuneOptions(**BASE)
    parser = argparse.ArgumentParser()
    add_arguments(parser, FinetuneOptions, GROUPS)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {'--' + field.name.replace('_', '-') for field in dataclasses.fields(FinetuneOptions)} <= flags


def test_the_command_line_wins_over_the_recipe_and_this_over_the_default(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('model: test_vit\ndataset: somewhere\nlr: 3e-4\nbatch-size: 16\nsmall-stem: off\nno-aug: true\n')
    options = parsed('--config', str(recipe), '--batch-size', '8', '--no-no-aug')
    assert (options.lr, options.batch_size, options.small_stem, options.no_aug) == (3e-4, 8, 'off', False)
    assert options.epochs == FinetuneOptions(**BASE).epochs


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('lrate: 1', "no option 'lrate'"),
        ('batchsize: 1', "did you mean 'batch_size'"),
        ('lr: fast', 'lr to be a number'),
        ('epochs: 1.5', 'epochs to be a number of type int'),
        ('no_aug: 1', 'no_aug to be true or false'),
        ('- a\n- b', 'lines like'),
        ('a: [', 'cannot be read'),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path, line, message):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(line)
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe, FinetuneOptions)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match='cannot be read'):
        read_recipe(tmp_path / 'none.yaml', FinetuneOptions)


@pytest.mark.parametrize(
    'change',
    [
        {'model': ''},
        {'dataset': ''},
        {'epochs': 0},
        {'lr': 0.0},
        {'lr': float('nan')},
        {'batch_size': -1},
        {'smoothing': 1.0},
        {'small_stem': 'maybe'},
        {'mixed_precision': 'fp8x'},
        {'num_classes': '1'},
        {'postprocess': 'orthogonal'},
        {'postprocess': 'orth,layers=3'},
        {'postprocess': 'none,layer=3'},
        {'train_crop_mode': 'centre'},
        {'model_args': 'drop_rate'},
        {'weight_decay': -0.1},
        {'mixup': -1.0},
        {'head': 'foo'},
        {'model_ema_decay': 5.0},
        {'layer_decay': -1.0},
        {'crop_pct': 0.0},
        {'min_lr': -1e-3},
        {'scale': (0.5,)},
        {'ratio': (2.0, 1.0)},
        {'std': (0.0, 0.0, 0.0)},
        {'model_args': {'act_layer': object}},
    ],
)
def test_options_that_make_no_sense_are_refused(change):
    with pytest.raises(ConfigError):
        FinetuneOptions(**{**BASE, **change})


def test_python_may_give_numbers_and_texts():
    options = FinetuneOptions(**{**BASE, 'num_classes': 10, 'output': 'out'})
    assert (options.num_classes, options.output) == ('10', Path('out'))


def test_post_processing_is_chosen_by_the_start_and_changed_by_parts():
    assert FinetuneOptions(**BASE).post('orth') == PostProcess.of('orth')
    assert FinetuneOptions(**BASE).post('none') is None
    assert FinetuneOptions(**BASE, init='random').post() is None
    assert FinetuneOptions(**BASE, postprocess='none').post('orth') is None
    chosen = FinetuneOptions(**BASE, init='random', postprocess='orth,layer=37,beta=3e-5').post()
    assert (chosen.orth, chosen.layer, chosen.beta) == (True, 37, 3e-5)


@pytest.mark.parametrize('init', ['ghn', 'random'])
@pytest.mark.parametrize(('postprocess', 'seed'), [('orth', 3), ('noise', 3), ('orth,layer=37', 3), ('orth,seed=5', 5)])
def test_the_noise_of_post_processing_has_the_seed_of_the_run(init, postprocess, seed):
    options = FinetuneOptions(**BASE, init=init, postprocess=postprocess, seed=3)
    assert options.post().seed == seed


def test_the_recommended_post_processing_has_the_seed_of_the_run():
    assert FinetuneOptions(**BASE, seed=3).post('orth') == PostProcess.of('orth', seed=3)


def test_model_arguments_are_read_as_yaml_reads_them():
    options = FinetuneOptions(**BASE, model_args='drop_path_rate=0.1,qkv_bias=false,act_layer=gelu,depth=3')
    assert options.arguments == {'drop_path_rate': 0.1, 'qkv_bias': False, 'act_layer': 'gelu', 'depth': 3}
    assert FinetuneOptions(**BASE, model_args={'depth': 3}).arguments == {'depth': 3}


@pytest.mark.parametrize(
    'recipe', sorted((Path(__file__).parents[2] / 'examples' / 'recipes').glob('*.yaml')), ids=lambda path: path.stem
)
def test_recipes_in_the_repository_are_valid(recipe):
    kind = TrainOptions if recipe.stem.startswith('ghn') else FinetuneOptions
    assert kind(**read_recipe(recipe, kind)).to_dict()
