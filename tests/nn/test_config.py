"""A configuration is checked where it is made, and a file of it survives the way to disk and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from timm_ghn.errors import ConfigError
from timm_ghn.nn import GHNConfig
from timm_ghn.nn.config import FORMAT_VERSION

CONFIG = GHNConfig(hid=64, max_shape=(64, 64, 16, 16), num_classes=1000, layers=3, name='tiny')


def test_json_round_trip_gives_an_equal_configuration():
    assert GHNConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    record = {'hid': 8, 'max_shape': [8, 8, 11, 11], 'num_classes': 10}
    assert GHNConfig.from_dict(record) == GHNConfig(hid=8, max_shape=(8, 8, 11, 11), num_classes=10)


@pytest.mark.parametrize(
    ('version', 'rules', 'expected', 'becomes'),
    [
        (1, 'published', 'auto', 2),
        (None, 'published', 'auto', 2),
        (1, 'operators', 'operators', 1),
        (2, 'published', 'published', 2),
    ],
)
def test_rules_of_an_older_version_are_read_as_what_they_meant(version, rules, expected, becomes):
    """Then, 'published' stood for the graph by operators too, where there was no published one."""
    record = CONFIG.to_dict() | {'format_version': version, 'rules': rules}
    found = GHNConfig.from_dict({key: value for key, value in record.items() if value is not None})
    assert (found.rules, found.format_version) == (expected, becomes)


def test_a_newer_version_is_refused_with_the_way_out_whatever_else_it_holds():
    record = {**CONFIG.to_dict(), 'format_version': FORMAT_VERSION + 1, 'rotary': True}
    with pytest.raises(ConfigError, match='upgrade timm_ghn'):
        GHNConfig.from_dict(record)
    with pytest.raises(ConfigError, match='upgrade'):
        dataclasses.replace(CONFIG, format_version=FORMAT_VERSION + 1)


def test_unknown_and_absent_keys_are_named():
    with pytest.raises(ConfigError, match='hidden, width'):
        GHNConfig.from_dict({**CONFIG.to_dict(), 'width': 1, 'hidden': 2})
    with pytest.raises(ConfigError, match='max_shape, num_classes'):
        GHNConfig.from_dict({'hid': 8})


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('hid', 0),
        ('hid', 66),
        ('max_shape', [64, 64, 16, 16]),
        ('max_shape', (64, 64, 16, 11)),
        ('max_shape', (64, 0, 16, 16)),
        ('num_classes', True),
        ('gnn', 'transformer'),
        ('heads', 7),
        ('virtual_edges', 255),
        ('layernorm', 1),
        ('decoder', 'fc'),
        ('window', 'centre'),
        ('postprocess', 'orthogonal'),
        ('rules', 'ghn3'),
        ('mean', (0.5, 0.5)),
        ('mean', (0.5, 0.5, float('nan'))),
        ('std', (0.5, 0.5, 0.0)),
        ('format_version', 0),
    ],
)
def test_a_bad_value_is_refused_and_its_field_named(field: str, value: object):
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(CONFIG, **{field: value})
