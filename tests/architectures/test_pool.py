import dataclasses
import json

import pytest

from timm_ghn.architectures.pool import Pool
from timm_ghn.architectures.samplers import MixSampler, TimmSampler

FAST = TimmSampler(('vgg', 'resnet_basic'), macs=5_000_000, parameters=(5_000, 200_000))


@pytest.fixture
def never(monkeypatch):
    def sample(self, rng):
        raise AssertionError('drawn again')

    return lambda: monkeypatch.setattr(TimmSampler, 'sample', sample)


def test_members_are_kept_on_the_disk(tmp_path, never):
    first = Pool(FAST, 0, tmp_path)
    drawn = [first[member] for member in (3, 0)]
    assert Pool(FAST, 0, tmp_path / 'other')[0] == drawn[1] != drawn[0]
    never()
    again = Pool(FAST, 0, tmp_path)
    assert [again[member] for member in (3, 0)] == drawn


def test_other_samplers_and_seeds_have_files_of_their_own(tmp_path):
    mixed = MixSampler(({'families': ['vgg'], 'macs': 5_000_000},))
    for sampler, seed in ((FAST, 0), (FAST, 1), (dataclasses.replace(FAST, num_classes=3), 0), (mixed, 0)):
        assert Pool(sampler, seed, tmp_path)[0].num_classes == sampler.num_classes
    assert len(list(tmp_path.glob('*.json'))) == 4


@pytest.mark.parametrize('text', ['', '{"family"', '[]', '{"family": "vgg", "options": 3}', '{"family": "vgg"}'])
def test_a_damaged_file_is_replaced(tmp_path, text):
    drawn = Pool(FAST, 0, tmp_path)[0]
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert Pool(FAST, 0, tmp_path)[0] == drawn
    assert json.loads(path.read_text())['family'] == drawn.family
