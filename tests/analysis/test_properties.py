from __future__ import annotations

import numpy as np
import pytest
import timm
from sklearn.base import BaseEstimator

from timm_ghn import trace
from timm_ghn.analysis.properties import predict_property, simple_features
from timm_ghn.errors import ConfigError
from timm_ghn.graph.primitives import Primitive


class FirstFeature(BaseEstimator):
    """Predicts the first feature, or the same for all."""

    def __init__(self, sign=1):
        self.sign = sign

    def fit(self, features, values):
        return self

    def predict(self, features):
        return self.sign * features[:, 0]


@pytest.mark.parametrize('sign', [1, -1, 0])
def test_tau_of_a_perfect_predictor_is_1_of_a_reversed_one_minus_1_of_a_constant_one_0(sign):
    values = np.random.default_rng(0).normal(size=20)
    score = predict_property(values[:, None], values, regressor=FirstFeature(sign), folds=4)
    assert score.tau == pytest.approx(sign)
    assert len(score.taus) == 4


def test_the_default_regressor_learns_what_the_features_tell_and_nothing_of_noise():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, 4))
    values = 1e-4 * (features[:, 0] + features[:, 1] ** 2)
    score = predict_property(features, values)
    assert score.tau > 0.6
    assert score.predicted.shape == (100,)
    assert np.array_equal(predict_property(features, values).predicted, score.predicted)
    assert abs(predict_property(features, rng.normal(size=100)).tau) < 0.3


@pytest.mark.parametrize(
    ('values', 'message'), [([1.0] * 9, 'shape|features'), ([float('nan')] * 10, 'finite'), ([1.0] * 10, 'folds')]
)
def test_wrong_input_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        predict_property(np.zeros((10, 2)), values, folds=6)


def test_simple_features_are_counts_size_and_depth():
    model = timm.create_model('test_resnet')
    graph = trace(model)
    (row,) = simple_features([graph])
    assert row[: len(Primitive)].sum() == len(graph)
    assert row[Primitive.CONV] == sum(node.primitive is Primitive.CONV for node in graph.nodes)
    assert np.expm1(row[-2]) == pytest.approx(sum(p.numel() for p in model.parameters()))
    assert 1 < row[-1] <= len(graph)
