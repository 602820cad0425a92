"""Prediction of properties of networks (accuracy, accuracy under noise, inference time, ...) from their graphs.

Importing this module needs scikit-learn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from timm_ghn.errors import ConfigError
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.primitives import Primitive

try:
    from scipy.stats import kendalltau
    from sklearn.base import clone
    from sklearn.model_selection import KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVR
except ImportError as error:
    raise ConfigError("prediction of properties needs scikit-learn: pip install 'timm-ghn[analysis]'") from error


@dataclasses.dataclass(frozen=True)
class PropertyScore:
    """How well a property is predicted for networks that the regressor has not seen.

    Attributes:
        tau: Kendall's rank correlation of predicted and true values, mean over the folds: 1 for the right order, 0
            for an order that tells nothing.
        taus: Of each fold.
        predicted: (G,) value of each network, by the regressor that was fitted without it.
    """

    tau: float
    taus: tuple[float, ...]
    predicted: np.ndarray


def predict_property(
    features: Any, values: Sequence[float], *, regressor: Any = None, folds: int = 5, seed: int = 0
) -> PropertyScore:
    """Predict a property by cross-validation.

    Args:
        features: (G, F) of the networks: :func:`~timm_ghn.analysis.embeddings.graph_embeddings` on the CPU, or
            :func:`simple_features`.
        values: (G,) the property of each.
        regressor: Regressor of scikit-learn, which is cloned; by default support vectors with a Gaussian kernel over
            standardised features.
        folds: Parts of the networks, each of which is predicted from the others.
        seed: Of the division into folds.

    Raises:
        ConfigError: if a value is not finite, there are not as many values as rows of features, or there are fewer
            than two networks in a fold.
    """
    x_GF, y_G = np.asarray(features, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x_GF.ndim != 2 or y_G.shape != x_GF.shape[:1]:
        raise ConfigError(f'expected features (G, F) and values (G,) (got {x_GF.shape} and {y_G.shape})')
    if not (np.isfinite(x_GF).all() and np.isfinite(y_G).all()):
        raise ConfigError('expected features and values that are finite (leave out networks whose values are not)')
    if folds < 2 or len(y_G) < 2 * folds:
        raise ConfigError(f'expected 2 or more folds of at least 2 networks (got {folds} of {len(y_G)} networks)')
    if regressor is None:
        regressor = make_pipeline(StandardScaler(), SVR())
    predicted_G = np.empty_like(y_G)
    taus = []
    for known, unknown in KFold(folds, shuffle=True, random_state=seed).split(x_GF):
        # Support vectors have tolerances in the units of the values.
        mean, scale = y_G[known].mean(), y_G[known].std() or 1.0
        fitted = clone(regressor).fit(x_GF[known], (y_G[known] - mean) / scale)
        predicted_G[unknown] = fitted.predict(x_GF[unknown]) * scale + mean
        tau = float(kendalltau(predicted_G[unknown], y_G[unknown]).statistic)
        taus.append(0.0 if np.isnan(tau) else tau)  # one value for all networks orders nothing
    return PropertyScore(float(np.mean(taus)), tuple(taus), predicted_G)


def simple_features(graphs: Sequence[Graph]) -> np.ndarray:
    """Features that need no GHN, a baseline for embeddings.

    Returns:
        float64 (G, F): the number of nodes of each :class:`~timm_ghn.graph.primitives.Primitive`, the logarithm of the
        number of parameters (of 1 more), and the depth: nodes on the longest path from the input.
    """
    rows = []
    for graph in graphs:
        counts = np.bincount(graph.primitives_N.numpy(), minlength=len(Primitive))
        parameters = sum(parameter.numel for parameter in graph.parameters)
        rows.append([*counts, np.log1p(parameters), int(graph.forward_levels_N.max()) + 1])
    return np.asarray(rows, dtype=np.float64)
