"""Which pretrained networks resemble a network."""

from __future__ import annotations

import timm
import torch

from timm_ghn.transfer import rank
from timm_ghn.transfer.rank import Fingerprint, fingerprints, rank_donors


def test_relatives_are_nearer_than_strangers_and_the_same_network_is_nearest(monkeypatch, tmp_path):
    monkeypatch.setenv('TIMM_GHN_CACHE', str(tmp_path))
    model = timm.create_model('resnet18', channels=(48, 96, 192, 384), num_classes=10)
    state = torch.random.get_rng_state()
    ranked = rank_donors(model, ['vit_tiny_patch16_224', 'resnet50', 'resnet34', 'resnet18', 'test_vit.r160_in1k'])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [one.distance for one in ranked] == sorted(one.distance for one in ranked)
    architectures = list(dict.fromkeys(one.name.split('.')[0] for one in ranked))
    assert architectures[:3] == ['resnet18', 'resnet34', 'resnet50']
    assert ranked[0].name == 'resnet18.a1_in1k'  # timm's default tag
    assert 40e6 < ranked[0].download < 50e6
    assert 'download of 47 MB' in str(ranked[0])
    whole = Fingerprint.of(timm.create_model('resnet18'))
    assert whole.distance(fingerprints(['resnet18'])['resnet18']) == 0


def test_fingerprints_are_kept_and_made_again_where_the_file_is_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv('TIMM_GHN_CACHE', str(tmp_path))
    found = fingerprints(['test_resnet'])
    (path,) = tmp_path.glob('fingerprints-*.json')
    monkeypatch.setattr(rank, '_built', lambda name: None)
    assert fingerprints(['test_resnet']) == found
    path.write_text('{"test_resnet": 3}', encoding='utf-8')
    assert fingerprints(['test_resnet']) == {}  # cannot be built here
