"""Every shipped configuration describes a GHN that can be built, and facts agree with the publications."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from timm_ghn.errors import CheckpointError, ConfigError
from timm_ghn.hub import GHNEntry, known_ghns, load_ghn
from timm_ghn.hub.catalogue import read_entry
from timm_ghn.hub.default import EMBEDDED, PUBLISHED
from timm_ghn.nn import GHN

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = known_ghns()
#: Width, layers, heads and number of parameters, from the papers and the released files.
PUBLISHED_SIZES = {
    'ghn3_tm8': (64, 3, 8, 6_906_632),
    'ghn3_sm8': (128, 5, 16, 35_810_368),
    'ghn3_lm8': (256, 12, 16, 214_668_960),
    'ghn3_xlm16': (384, 24, 16, 654_365_184),
}
REPOSITORY = 'SamsungSAILMontreal/ghn3'


def test_the_catalogue_has_a_file_for_each_known_ghn():
    assert set(ENTRIES) == {*PUBLISHED_SIZES, 'ghn2', EMBEDDED}
    assert list(ENTRIES) == sorted(path.stem for path in (ROOT / 'hub_configs').glob('*.json'))


@pytest.mark.parametrize('entry', ENTRIES.values(), ids=ENTRIES.keys())
def test_each_entry_builds_and_has_the_stated_number_of_parameters(entry: GHNEntry):
    with torch.device('meta'):
        ghn = GHN(entry.config)
    assert sum(parameter.numel() for parameter in ghn.parameters()) == entry.num_parameters
    assert entry.config.name == entry.name
    assert entry.license == 'mit'


@pytest.mark.parametrize('name', PUBLISHED_SIZES)
def test_the_published_ghn3s_have_their_published_sizes(name):
    entry = ENTRIES[name]
    config = entry.config
    assert (config.hid, config.layers, config.heads, entry.num_parameters) == PUBLISHED_SIZES[name]
    assert config.max_shape == (config.hid, config.hid, 16, 16)
    assert (config.gnn, config.window, config.num_classes, config.trained) == ('graphormer', 'center', 1000, True)
    assert (entry.repo_id, entry.filename, entry.format) == (REPOSITORY, f'{name.replace("_", "")}.pt', 'joblib')


def test_ghn2_is_the_one_of_the_same_repository():
    entry = ENTRIES['ghn2']
    assert (entry.repo_id, entry.filename) == (REPOSITORY, 'ghn2.pt')
    config = entry.config
    assert (config.gnn, config.window, config.hid, config.max_shape) == ('gated', 'corner', 32, (64, 64, 16, 16))


def test_norms_are_the_published_ones(golden: Path):
    published = json.loads((golden / 'reference_norms.json').read_text())
    for name, entry in ENTRIES.items():
        assert dict(entry.norms) == {arch: norms[name] for arch, norms in published.items() if name in norms}
    assert [name for name, entry in ENTRIES.items() if len(entry.norms) == 74] == ['ghn2', 'ghn3_tm8', PUBLISHED]


def test_the_embedded_ghn_is_small_and_trained():
    entry = ENTRIES[EMBEDDED]
    assert entry.config.trained
    assert 'Tiny-ImageNet' in entry.description
    assert sum(path.stat().st_size for path in entry.folder.iterdir()) < 10e6
    ghn = load_ghn(EMBEDDED)
    assert ghn.config == entry.config
    assert ghn.origin is not None
    assert (ghn.origin.name, ghn.origin.repo_id, ghn.origin.embedded) == (EMBEDDED, None, True)


def test_the_catalogue_cannot_be_changed_by_who_reads_it():
    known_ghns().clear()
    assert known_ghns() == ENTRIES


def test_an_entry_prints_as_plain_values():
    for entry in ENTRIES.values():
        record = json.loads(json.dumps(entry.to_dict()))
        assert record['name'] == entry.name
        assert record['config']['hid'] == entry.config.hid
    assert ENTRIES['ghn2'].source == f'{REPOSITORY}/ghn2.pt'
    assert ENTRIES[EMBEDDED].source == 'in the package'


@pytest.mark.parametrize(
    ('change', 'error', 'match'),
    [
        ({'name': 'other'}, ConfigError, "to be 'entry'"),
        ({'surprise': 1}, ConfigError, 'surprise'),
        ({'license': None, 'config': {}}, ConfigError, 'hid'),
        ({'path': 'somewhere'}, ConfigError, 'either a path, or'),
        ({'filename': None}, ConfigError, 'either a path, or'),
        ({'format': 'pickle'}, ConfigError, 'format'),
    ],
)
def test_a_wrong_entry_is_refused(tmp_path, change, error, match):
    record = {**ENTRIES['ghn2'].to_dict(), 'name': 'entry'} | change
    (tmp_path / 'entry.json').write_text(json.dumps(record))
    with pytest.raises(error, match=match):
        read_entry(tmp_path / 'entry.json')


def test_an_entry_that_is_no_json_is_refused(tmp_path):
    (tmp_path / 'entry.json').write_text('{')
    with pytest.raises(CheckpointError, match='expected JSON'):
        read_entry(tmp_path / 'entry.json')
