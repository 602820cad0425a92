import argparse
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from timm_ghn import PostProcess
from timm_ghn.errors import ConfigError
from timm_ghn.finetune.options import FinetuneOptions
from timm_ghn.runs.recipes import add_arguments, options_of, read_recipe
from timm_ghn.train.options import TrainOptions

BASE = {'model': 'test_vit', 'dataset': 'somewhere'}


def parsed(kind: type, line: str):
    parser = argparse.ArgumentParser()
    add_arguments(parser, kind)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {'--' + field.name.replace('_', '-') for field in dataclasses.fields(kind)} <= flags
    return options_of(parser.parse_args(shlex.split(line)), kind)


def test_the_command_line_has_every_option_and_no_default_of_its_own():
    assert parsed(FinetuneOptions, '--model test_vit --dataset somewhere') == FinetuneOptions(**BASE)
    line = "--dataset x --held-out 'regnet, densenet' --sampler-args '{families: [vgg, resnetv2]}'"
    options = parsed(TrainOptions, line)
    assert options.unseen_families() == ('regnet', 'densenet')
    assert options.sampler_for(10).families == ('vgg', 'resnetv2')


def test_the_command_line_wins_over_the_recipe_and_this_over_the_default(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('model: test_vit\ndataset: somewhere\nlr: 3e-4\nbatch-size: 16\nsmall-stem: off\nno-aug: true\n')
    options = parsed(FinetuneOptions, f'--config {recipe} --batch-size 8 --no-no-aug')
    assert (options.lr, options.batch_size, options.small_stem, options.no_aug) == (3e-4, 8, 'off', False)
    assert options.epochs == FinetuneOptions(**BASE).epochs


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('lrate: 1', "no option 'lrate'"),
        ('batchsize: 1', "did you mean 'batch_size'"),
        ('lr: fast', 'lr to be a finite number'),
        ('epochs: 1.5', 'epochs to be a whole number'),
        ('no_aug: 1', 'no_aug to be true or false'),
        ('- a\n- b', 'lines like'),
        ('a: [', 'cannot be read'),
        ('lr: 2001-99-99', 'cannot be read'),
        ('epochs: .inf', r'epochs to be a whole number \(got inf\)'),
        ('weight_decay: .nan', r'weight_decay to be a finite number \(got nan\)'),
        ('mean: [0.5, .nan, 0.5]', 'mean to be a finite number'),
        ('output:', r'output to be a path \(got nothing\)'),
        ('model: true', 'model to be a text'),
        ('dataset: [a, b]', r"dataset to be a text \(got \['a', 'b'\]\)"),
        ('epochs:', 'epochs to be a whole number'),
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


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('--config none.yaml', 'cannot be read'),
        ('--shots-seed -1', r'expected shots_seed of 0 or more \(got .-1.\)'),
        ('--weight-decay nan', 'weight_decay to be a finite number'),
        ('--epochs ²', 'epochs to be a whole number'),
        ('--model-args act_layer=[', 'cannot be read as YAML'),
    ],
)
def test_a_wrong_word_on_the_command_line_is_an_error_of_one_line(call_cli, words, message):
    code, out, err = call_cli(f'finetune --model test_vit --dataset x {words}')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert re.search(message, err)


@pytest.mark.parametrize(
    'change',
    [
        {'model': ''}, {'dataset': ''}, {'epochs': 0}, {'smoothing': 1.0}, {'weight_decay': -0.1}, {'hflip': 1.5},
        {'ratio': (2.0, 1.0)}, {'std': (0.0, 0.0, 0.0)}, {'postprocess': 'orthogonal'},
        {'postprocess': 'orth,layers=3'}, {'model_args': 'drop_rate'},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(change):
    with pytest.raises(ConfigError):
        FinetuneOptions(**{**BASE, **change})


def test_python_may_give_numbers_and_texts():
    options = FinetuneOptions(**{**BASE, 'subset': 10, 'output': 'out'})
    assert (options.subset, options.output) == ('10', Path('out'))


@pytest.mark.parametrize(
    ('changes', 'recommended', 'expected'),
    [
        ({}, 'orth', PostProcess.of('orth')),
        ({'seed': 3}, 'orth', PostProcess.of('orth', seed=3)),
        ({}, 'none', None),
        ({'init': 'random'}, 'none', None),
        ({'postprocess': 'none'}, 'orth', None),
        ({'postprocess': 'noise', 'seed': 3}, 'orth', PostProcess.of('noise', seed=3)),
        (
            {'init': 'random', 'postprocess': 'orth,layer=37,beta=3e-5,seed=5', 'seed': 3},
            'none',
            PostProcess(orth=True, layer=37, beta=3e-5, seed=5),
        ),
    ],
)
def test_post_processing_is_chosen_by_the_start_and_changed_by_parts(changes, recommended, expected):
    assert FinetuneOptions(**BASE, **changes).post(recommended) == expected


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
