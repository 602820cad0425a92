"""Predicting leaves a model alone; initialising writes what was predicted, all of it or nothing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import operator
import random
import sys

import numpy as np
import pytest
import timm
import torch
from networks import NETWORKS, SIZE, plain
from tiny import TINY, make_ghn, snapshot
from torch import Tensor, nn

import timm_ghn
from timm_ghn import (
    GHN,
    GHNError,
    Graph,
    PredictionError,
    UnsupportedModelError,
    ghn_init,
    plan_parameters,
    predict,
    trace,
)
from timm_ghn.prediction.fit import fitted, write_repeated

CASES = pytest.mark.parametrize('name', NETWORKS)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def from_graph(ghn: GHN, graph: Graph) -> dict[str, Tensor]:
    """The prediction, from the parts of the package: embed, decode, fit."""
    plan = plan_parameters(graph, ghn.config)
    with torch.no_grad():
        decoded = dict(ghn.decode(ghn.encode(graph), [row.request for row in plan.predicted]))
    generator = torch.Generator().manual_seed(0)
    return {
        row.name: fitted(decoded[index], row.fit, row.shape, generator).to(row.dtype)
        for index, row in enumerate(plan.predicted)
    }


# -- any network


def states() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def _only(tensors: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in names}


@CASES
def test_a_prediction_fits_the_model_and_initialising_writes_it(name, ghn):
    case = NETWORKS[name]()
    before, flags, drawn = snapshot(case.model), [module.training for module in case.model.modules()], states()
    identities = {name: (id(p), p.requires_grad, p.dtype, p.device) for name, p in case.model.named_parameters()}
    prediction = predict(case.model, ghn, **case.options)
    assert equal(snapshot(case.model), before), 'predicting writes nothing'
    names = {name for row in prediction.plan.predicted for name in (row.name, *row.aliases)}
    assert prediction.state_dict.keys() == names
    assert not case.model.load_state_dict(prediction.state_dict, strict=False).unexpected_keys
    case.model.load_state_dict(before, strict=False)
    for key, tensor in from_graph(ghn, trace(case.model, **case.options)).items():
        torch.testing.assert_close(prediction.state_dict[key], tensor, rtol=1e-5, atol=1e-7)
    assert ghn_init(case.model, ghn, postprocess=None, **case.options) is case.model
    after = snapshot(case.model)
    first_names = {row.name for row in prediction.plan.predicted}
    assert equal(_only(after, first_names), _only(prediction.state_dict, first_names))
    kept = before.keys() - first_names
    assert equal(_only(after, kept), _only(before, kept)), 'buffers and kept parameters stay'
    assert [module.training for module in case.model.modules()] == flags
    assert identities == {
        name: (id(p), p.requires_grad, p.dtype, p.device) for name, p in case.model.named_parameters()
    }
    assert states() == drawn, 'nothing is drawn from the global generators'


@pytest.mark.parametrize('name', ['plain', 'tied', 'reparametrised', 'plain tensors', 'direct', 'two inputs'])
def test_a_model_on_the_meta_device_gets_the_same_parameters(name, ghn):
    case = NETWORKS[name]()
    with torch.device('meta'):
        model = NETWORKS[name]().model
    prediction = predict(model, ghn, **case.options)
    assert all(tensor.device.type == 'cpu' for tensor in prediction.state_dict.values())
    again = predict(case.model, ghn, **case.options)
    assert equal(prediction.state_dict, again.state_dict)
    assert prediction.provenance == again.provenance


def test_the_seed_draws_the_tokens_without_a_place_and_nothing_else(ghn):
    model = timm.create_model('test_vit')
    first, second = (predict(model, ghn, seed=seed).state_dict for seed in (0, 1))
    assert {key for key, tensor in first.items() if not torch.equal(tensor, second[key])} == {'pos_embed'}
    assert torch.equal(first['pos_embed'][:, 1:], second['pos_embed'][:, 1:])
    ghn_init(model, ghn, seed=1)
    assert torch.equal(model.pos_embed, second['pos_embed'])


def test_tied_parameters_stay_tied_and_are_written_once(ghn):
    case = NETWORKS['tied']()
    prediction = predict(case.model, ghn, head='predict', **case.options)
    assert prediction.state_dict['body.3.weight'] is prediction.state_dict['body.5.weight']
    ghn_init(case.model, ghn, head='predict', postprocess=None, **case.options)
    assert case.model.body[3].weight is case.model.body[5].weight
    assert torch.equal(case.model.body[5].weight, prediction.state_dict['body.3.weight'])


def test_a_model_in_lower_precision_gets_the_rounded_prediction(ghn):
    exact = predict(plain(), ghn, input_size=SIZE).state_dict
    mixed = predict(NETWORKS['mixed dtypes']().model, ghn, input_size=SIZE).state_dict
    assert {tensor.dtype for key, tensor in mixed.items() if '.1.' in key} == {torch.bfloat16}
    for key, tensor in exact.items():
        assert torch.equal(tensor.to(mixed[key].dtype), mixed[key])


@contextlib.contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    'context',
    [torch.no_grad, torch.inference_mode, lambda: torch.device('meta'), double_by_default,
     lambda: torch.autocast('cpu', dtype=torch.bfloat16)],
)  # fmt: skip
def test_a_prediction_does_not_depend_on_global_settings(context, ghn):
    model, other = timm.create_model('test_vit'), timm.create_model('test_vit')
    other.load_state_dict(model.state_dict())
    expected = predict(model, ghn).state_dict
    ghn_init(model, ghn)
    with context():
        found = predict(other, ghn).state_dict
        ghn_init(other, ghn)
    assert equal(found, expected)
    assert equal(snapshot(other), snapshot(model))
    assert all(p.grad_fn is None and p.requires_grad for p in other.parameters())
    assert not any(tensor.requires_grad for tensor in found.values())


# -- head


# -- all or nothing


BROKEN = ('embed.weight', 'decoder_1d.last.weight', 'decoder.class_predictor.weight')


@pytest.mark.parametrize('part', BROKEN)
def test_a_prediction_that_is_not_finite_changes_nothing(part):
    ghn = make_ghn(TINY['graphormer'])
    with torch.no_grad():
        operator.attrgetter(part)(ghn).fill_(float('nan'))
    model = timm.create_model('test_vit')
    before = snapshot(model)
    for call in (predict, ghn_init):
        with pytest.raises(PredictionError, match='not finite'):
            call(model, ghn)
    assert equal(snapshot(model), before)


def test_a_value_that_the_dtype_of_the_model_cannot_hold_changes_nothing():
    """Finite in float32, infinite in float16: the positional embedding is written without a scale."""
    ghn = make_ghn(TINY['graphormer'])
    with torch.no_grad():
        ghn.decoder.last.bias.fill_(1e5)
    model = timm.create_model('test_vit')
    assert bool(predict(model, ghn).state_dict['pos_embed'].isfinite().all())
    model = model.half()
    before = snapshot(model)
    for call in (predict, ghn_init):
        with pytest.raises(PredictionError, match="'pos_embed' are not finite in torch.float16"):
            call(model, ghn)
    assert equal(snapshot(model), before)


def test_a_model_without_storage_says_how_to_get_it(ghn):
    with torch.device('meta'):
        model = plain()
    with pytest.raises(UnsupportedModelError, match=r"'body\.0\.weight' is on the meta device.*to_empty.*assign=True"):
        ghn_init(model, ghn, input_size=SIZE)
    model.load_state_dict(predict(model, ghn, input_size=SIZE).state_dict, strict=False, assign=True)
    assert model.body[0].weight.device.type == 'cpu'
    half = plain()
    half.head.to('meta')
    before = half.body[0].weight.detach().clone()
    with pytest.raises(UnsupportedModelError, match=r"'head\.weight' is on the meta device"):
        ghn_init(half, ghn, input_size=SIZE)
    assert torch.equal(half.body[0].weight, before)


def test_a_model_with_nothing_to_predict_is_refused(ghn):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    for call in (predict, ghn_init):
        with pytest.raises(UnsupportedModelError, match='no parameter that a GHN could predict'):
            call(Scale(), ghn, input_size=SIZE)


class Refusing(Tensor):
    """A parameter that does not let itself be written, as distributed and quantised ones may not."""

    failure: BaseException | None = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.copy_ and cls.failure is not None and isinstance(args[0], cls):
            raise cls.failure
        return super().__torch_function__(func, types, args, kwargs)


def refusing(model: nn.Module, failure: BaseException, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Let the last parameter refuse, when all others have been written."""
    model.head.bias = nn.Parameter(model.head.bias.detach().clone().as_subclass(Refusing))
    monkeypatch.setattr(Refusing, 'failure', failure)
    return model


FAILURES = (torch.OutOfMemoryError('out of memory\nand a page of advice'), MemoryError())


@pytest.mark.parametrize('failure', FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize('postprocess', ['orth', None])
def test_what_was_written_is_put_back_where_a_parameter_cannot_be_written(failure, postprocess, monkeypatch):
    model = refusing(plain(), failure, monkeypatch)
    before = snapshot(model)
    words = r"'head\.bias' cannot be written \(" + type(failure).__name__ + r'.*\); the model was left as it was'
    with pytest.raises(PredictionError, match=words) as caught:
        ghn_init(model, make_ghn(TINY['graphormer']), input_size=SIZE, postprocess=postprocess)
    assert caught.value.__cause__ is failure
    assert 'advice' not in str(caught.value)
    assert equal(snapshot(model), before)


def test_what_was_written_is_put_back_where_the_user_interrupts_even_again(monkeypatch):
    model = refusing(plain(), KeyboardInterrupt(), monkeypatch)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        ghn_init(model, make_ghn(TINY['graphormer']), input_size=SIZE)
    assert equal(snapshot(model), before)


def test_an_interruption_while_ordinary_parameters_are_written_comes_when_all_are(monkeypatch):
    """Nothing of them is kept to be put back: what the user interrupts is written to the end."""
    ghn, model = make_ghn(TINY['graphormer']), plain()
    expected = copy.deepcopy(model)
    ghn_init(expected, ghn, input_size=SIZE, postprocess=None)
    module, calls = sys.modules['timm_ghn.prediction.predict'], []

    def interrupted(*args: object) -> None:
        calls.append(args)
        if len(calls) in (2, 3):
            raise KeyboardInterrupt
        write_repeated(*args)

    monkeypatch.setattr(module, 'write_repeated', interrupted)
    with pytest.raises(KeyboardInterrupt):
        ghn_init(model, ghn, input_size=SIZE, postprocess=None)
    assert len(calls) > 3
    assert equal(snapshot(model), snapshot(expected))


def test_a_prediction_is_applied_to_models_of_the_same_parameters_only(ghn):
    model = plain()
    prediction, expected = predict(model, ghn, input_size=SIZE), copy.deepcopy(model)
    ghn_init(expected, ghn, input_size=SIZE, postprocess=None)
    assert prediction.apply_(model) is model
    assert equal(snapshot(model), snapshot(expected))
    other = plain()
    other.body[0] = nn.Conv2d(3, 9, 3)
    before = snapshot(other)
    with pytest.raises(UnsupportedModelError, match=r"a parameter 'body\.0\.weight' of shape .* \(got one of shape"):
        prediction.apply_(other)
    assert equal(snapshot(other), before)
    with pytest.raises(UnsupportedModelError, match='got none of that name'):
        prediction.apply_(nn.Linear(2, 2))


# -- what is asked for

with torch.device('meta'):
    EMPTY = GHN(TINY['graphormer'])


def test_a_dtype_that_nothing_can_be_computed_in_is_named(ghn):
    dtype = torch.float8_e4m3fn
    model = plain()
    model.head.to(dtype)
    before = model.body[0].weight.detach().clone()
    for call in (predict, ghn_init):
        with pytest.raises(UnsupportedModelError, match=rf"'head\.weight' is in {dtype}; expected .*torch\.bfloat16"):
            call(model, ghn, input_size=SIZE)
    assert torch.equal(model.body[0].weight, before)


@pytest.mark.parametrize('call', [predict, ghn_init])
@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'device': 'meta'}, 'expected a device that holds values'),
        ({'device': 'nowhere'}, "a device that this machine has .*'nowhere'"),
        ({'ghn': EMPTY}, "the GHN 'tiny-ghn3' is on the meta device"),
        ({'rules': 'mine'}, "expected rules to be one of .*got 'mine'"),
        ({'head': 'maybe'}, 'expected head to be one of'),
        ({'input_size': 10**9}, r'numbers from 1 to 1048576 \(got 1000000000\)'),
        ({'input_size': True}, r'expected input_size to be a side.*\(got True\)'),
        ({'example_inputs': 5}, r'expected example_inputs to be a tensor, a tuple .* a dictionary .*\(got 5\)'),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_all_alone(options, words, call, ghn):
    model = plain()
    before, weights = snapshot(model), snapshot(ghn)
    with pytest.raises(GHNError, match=words):
        call(model, **{'ghn': ghn, 'input_size': SIZE, **options})
    assert equal(snapshot(model), before)
    assert equal(snapshot(ghn), weights)


# -- provenance


def test_a_prediction_says_where_it_comes_from(ghn):
    model = timm.create_model('test_vit')
    prediction = predict(model, ghn, input_size=160, seed=3, head='keep')
    facts = json.loads(json.dumps(prediction.provenance))
    plan = prediction.plan
    assert facts == {
        'ghn': ghn.config.name,
        'trained': True,
        'origin': None,
        'timm_ghn': timm_ghn.__version__,
        'rules': 'operators',
        'input_size': [3, 160, 160],
        'mean': list(ghn.config.mean),
        'std': list(ghn.config.std),
        'head': 'keep',
        'seed': 3,
        'postprocess': None,
        'tensors': len(list(model.parameters())),
        'predicted_tensors': len(plan.predicted),
        'elements': sum(p.numel() for p in model.parameters()),
        'predicted_elements': sum(row.numel for row in plan.predicted),
    }


def test_the_rules_are_those_of_the_ghn_or_those_that_are_asked_for():
    own = make_ghn(dataclasses.replace(TINY['graphormer'], rules='operators'))
    assert predict(plain(), own, input_size=SIZE).provenance['rules'] == 'operators'
    assert predict(plain(), make_ghn(TINY['graphormer']), input_size=SIZE).provenance['rules'] == 'published'
    found = predict(plain(), make_ghn(TINY['graphormer']), input_size=SIZE, rules='operators')
    assert found.provenance['rules'] == 'operators'
    model = ghn_init(plain(), make_ghn(TINY['graphormer']), input_size=SIZE, postprocess=None, rules='operators')
    expected = predict(model, own, input_size=SIZE).state_dict
    assert equal(expected, found.state_dict)
    assert equal(_only(snapshot(model), set(expected)), expected)
