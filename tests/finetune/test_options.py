import argparse
import dataclasses
import re
import typing
from pathlib import Path

import pytest

from timm_ghn import PostProcess
from timm_ghn.errors import ConfigError
from timm_ghn.finetune.options import GROUPS, FinetuneOptions
from timm_ghn.runs.recipes import add_arguments, options_of, read_recipe
from timm_ghn.train.evaluate import EvaluateOptions
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
        ('{[a]: 1}', 'cannot be read'),
        ('lr: 2001-99-99', 'cannot be read'),
        ('[' * 10_000, 'cannot be read'),
        ('epochs: .inf', r'epochs to be a finite number below 2\*\*63 \(got inf\)'),
        ('epochs: 1e30', r'epochs to be a finite number below 2\*\*63'),
        ('weight_decay: .nan', r'weight_decay to be a finite number \(got nan\)'),
        ('mean: [0.5, .nan, 0.5]', 'mean to be a finite number'),
        ('output:', r'output to be a path \(got nothing\)'),
        ('output: [a]', 'output to be a path'),
        ('model:', r'model to be a text \(got nothing\)'),
        ('model: true', 'model to be a text'),
        ('dataset: [a, b]', r"dataset to be a text \(got \['a', 'b'\]\)"),
        ('epochs:', 'epochs to be a number of type int'),
        ('crop_pct: 5', r'crop_pct above 0, to 1 \(got 5\)'),
        ('scale: 0.5', 'scale to have 2 values'),
        ('small_stem: maybe', 'small_stem to be one of auto, on, off'),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path, line, message):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(line)
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe, FinetuneOptions)


def test_a_recipe_is_read_as_it_is_meant(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(
        'mixed_precision: no\nsmall_stem: on\nval_split: 0.2\nmean: 0.5\nepochs: 1e2\nlr: 1\n'
        'seed: 9007199254740993\nclip_grad:\noutput: 2026\n'
    )
    assert read_recipe(recipe, FinetuneOptions) == {
        'mixed_precision': 'no', 'small_stem': 'on', 'val_split': '0.2', 'mean': (0.5,),
        'epochs': 100, 'lr': 1.0, 'seed': 9007199254740993, 'clip_grad': None, 'output': Path('2026'),
    }  # fmt: skip


NUMBERS = {float: ('nan', 'inf', '-inf'), int: ('nan', 'inf', str(2**63))}


@pytest.mark.parametrize('kind', [FinetuneOptions, TrainOptions, EvaluateOptions])
def test_no_number_is_infinite_or_none(kind):
    parser = argparse.ArgumentParser()
    add_arguments(parser, kind, {})
    tried = 0
    for name, hint in typing.get_type_hints(kind).items():
        of = next((of for of in NUMBERS if hint in (of, of | None)), None)
        for text in () if of is None else NUMBERS[of]:
            words = ['--dataset', 'x', f'--{name.replace("_", "-")}={text}']
            more = ['--model', 'test_vit'] if kind is FinetuneOptions else []
            with pytest.raises(ConfigError, match=f'expected {name} to be a finite number'):
                options_of(parser.parse_args([*words, *more]), kind)
            tried += 1
    assert tried >= 15


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('--shots-seed -1', r'expected shots_seed of 0 or more \(got .-1.\)'),
        ('--weight-decay nan', 'weight_decay to be a finite number'),
        ('--epochs 1.5', 'epochs to be a number of type int'),
        ('--epochs ²', 'epochs to be a number of type int'),
        ('--model-args act_layer=[', 'cannot be read as YAML'),
        ('--model-args drop_rate=nan', 'model_args that JSON can write'),
        ('--model-args day=2020-01-01', 'model_args that JSON can write'),
    ],
)
def test_a_wrong_word_on_the_command_line_is_an_error_of_one_line(call_cli, words, message):
    code, out, err = call_cli(f'finetune --model test_vit --dataset x {words}')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert re.search(message, err)


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
        {'crop_pct': 5},
        {'shots': 0},
        {'shots_seed': -1},
        {'hflip': 1.5},
        {'output': None},
        {'model': None},
        {'epochs': True},
        {'weight_decay': float('nan')},
        {'model_args': {'drop_rate': float('nan')}},
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
    options = FinetuneOptions(**{**BASE, 'subset': 10, 'output': 'out'})
    assert (options.subset, options.output) == ('10', Path('out'))


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
