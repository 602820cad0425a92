"""Weights from a related network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import TINY, make_ghn, snapshot
from torch import nn

import timm_ghn
from timm_ghn.errors import CheckpointError, ConfigError, PredictionError, UnsupportedModelError
from timm_ghn.files import write_state_dict
from timm_ghn.graph.build import trace
from timm_ghn.transfer.layers import layers_of
from timm_ghn.transfer.match import align
from timm_ghn.transfer.resize import spread
from timm_ghn.transfer.transfer import plan_transfer, transfer_

CLASSES = 7


def build(name: str, *, seed: int = 0, **arguments: object) -> nn.Module:
    """A network whose norms, biases and running statistics are random as well, as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=CLASSES, **arguments)
        for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor_name.endswith('running_var'):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.data.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, channels: int = 3, side: int = 160) -> torch.Tensor:
    images = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))
    return model(images)


#: Arguments that make large networks small.
SMALL = {
    'beit_base_patch16_224': {'depth': 2, 'embed_dim': 48, 'num_heads': 3},
    'densenet121': {'growth_rate': 8, 'block_config': (2, 2, 2, 2)},
    'swin_tiny_patch4_window7_224': {'embed_dim': 12, 'depths': (2, 1, 1, 1), 'num_heads': (1, 2, 2, 4)},
}


@pytest.mark.parametrize(
    'name',
    [
        'test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet', 'test_nfnet', 'test_byobnet', 'test_mambaout',
        'regnety_002', 'densenet121', 'beit_base_patch16_224', 'swin_tiny_patch4_window7_224', 'mobilevit_xxs',
    ],
)  # fmt: skip
def test_the_same_network_gives_itself_back_bit_by_bit(name):
    small = SMALL.get(name, {})
    donor, model = build(name, **small), build(name, seed=1, **small)
    report = transfer_(model, donor)
    assert {row.action for row in report.rows} == {'copied'}
    assert [row.source for row in report.rows] == [row.name for row in report.rows]
    expected = donor.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


#: Donor, what is wider, and what is deeper.
RELATIVES = {
    'resnet18': ({'channels': (16, 24, 32, 48)}, {'channels': (24, 48, 64, 80)}, {'layers': (3, 4, 3, 2)}),
    'resnet26': ({'channels': (8, 8, 16, 16)}, {'channels': (12, 16, 24, 40)}, {'layers': (3, 2, 4, 2)}),
    'seresnext26d_32x4d': (
        {'cardinality': 2, 'channels': (16, 16, 32, 32)}, {'cardinality': 4}, {'layers': (2, 3, 3, 2)},
    ),
    'test_convnext': ({}, {'dims': (48, 64, 96, 128)}, {'depths': (2, 3, 5, 2)}),
    'test_efficientnet': ({}, {'channel_multiplier': 2.0}, None),
    'test_vit': ({}, {'embed_dim': 128, 'num_heads': 4}, {'depth': 11}),
    'eva02_tiny_patch14_224': (
        {'embed_dim': 24, 'depth': 2, 'num_heads': 1}, {'embed_dim': 48, 'num_heads': 2}, {'depth': 3},
    ),
    'swin_tiny_patch4_window7_224': (
        {'embed_dim': 12, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 2, 4)},
        {'embed_dim': 24, 'num_heads': (2, 4, 4, 8)},
        None,  # its blocks alternate: another one shifts the windows of all that follow
    ),
    'densenet121': ({'growth_rate': 8, 'block_config': (2, 2, 3, 2)}, {'growth_rate': 12}, None),
}  # fmt: skip


@pytest.mark.parametrize(
    ('name', 'direction'), [(name, d) for name, (_, *more) in RELATIVES.items() for d in (0, 1) if more[d]]
)
def test_a_wider_or_deeper_network_computes_the_same(name, direction):
    arguments, *more = RELATIVES[name]
    donor = build(name, **arguments)
    model = build(name, seed=1, **arguments | more[direction])
    report = transfer_(model, donor, function_preserving=True)
    side = donor.pretrained_cfg['input_size'][-1] if 'test_' not in name else 160
    expected = logits(donor, side=side)
    assert float((logits(model, side=side) - expected).abs().max() / expected.abs().max()) < 1e-3
    assert ('zero' in report.summary()) == (direction == 1)


@pytest.mark.parametrize(
    ('name', 'wide', 'narrow'),
    [
        ('resnet18', {'channels': (24, 48, 64, 80)}, {'channels': (16, 24, 32, 48)}),
        ('resnet26', {'channels': (12, 16, 24, 40)}, {'channels': (8, 8, 16, 16)}),
        ('test_efficientnet', {'channel_multiplier': 2.0}, {}),
    ],
)
def test_selection_is_consistent_where_layers_share_channels(name, wide, narrow):
    """Where all channels that are not selected are zero, the narrower network computes the same."""
    donor, model = build(name, **wide), build(name, seed=1, **narrow)
    small = dict(model.named_parameters())
    for key, tensor in donor.named_parameters():
        for axis, (given, wanted) in enumerate(zip(tensor.shape, small[key].shape, strict=True)):
            left_out = torch.ones(given, dtype=torch.bool)
            left_out[spread(wanted, given)] = False
            tensor.data.transpose(0, axis)[left_out] = 0
    for key, tensor in donor.named_buffers():
        if key.endswith('running_mean'):
            left_out = torch.ones(len(tensor), dtype=torch.bool)
            left_out[spread(len(model.get_buffer(key)), len(tensor))] = False
            tensor[left_out] = 0
    transfer_(model, donor)
    torch.testing.assert_close(logits(model), logits(donor), rtol=1e-3, atol=1e-4)


def test_attention_heads_and_parts_are_selected_whole():
    donor = build('test_vit', embed_dim=96, num_heads=6)
    model = build('test_vit', embed_dim=48, num_heads=3)
    transfer_(model, donor)
    given = donor.blocks[1].attn.qkv.weight.view(3, 6, 16, 96)
    found = model.blocks[1].attn.qkv.weight.view(3, 3, 16, 48)
    assert torch.equal(found, given[:, ::2, :, ::2])
    assert torch.equal(model.blocks[1].attn.proj.weight.view(48, 3, 16), donor.blocks[1].attn.proj.weight.view(
        96, 6, 16)[::2, ::2])  # fmt: skip


def test_extra_blocks_copy_the_nearest_of_their_stage():
    model, donor = build('resnet34', channels=(8, 8, 8, 8)), build('resnet18', channels=(8, 8, 8, 8))
    sources = {row.name: row.source for row in plan_transfer(model, donor).rows}
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        found = [sources[f'layer{stage}.{block}.conv2.weight'] for block in range(blocks)]
        numbers = [int(source.split('.')[1]) for source in found]
        assert all(source.startswith(f'layer{stage}.') for source in found)
        assert numbers == sorted(numbers)
        assert set(numbers) == {0, 1}
    for key, source in sources.items():
        if 'bn' in key:  # statistics and biases come with their layer
            assert source.rpartition('.')[0] == sources[f'{key.rpartition(".")[0]}.weight'].rpartition('.')[0]


def test_layers_of_different_kinds_give_each_other_nothing():
    networks = [build(name) for name in ('test_vit', 'test_convnext', 'test_resnet', 'test_efficientnet')]
    sequences = [layers_of(network, trace(network, rules='operators')) for network in networks]
    for target in sequences:
        for donor in sequences:
            for layer, index in zip(target, align(target, donor), strict=True):
                assert index is None or donor[index].kind == layer.kind
    report = plan_transfer(networks[0], networks[2])
    kept = {row.name: row.detail for row in report.rows if row.action == 'kept'}
    assert 'no layer of its kind' in kept['blocks.0.attn.qkv.weight']


def test_other_inputs_classes_and_patches():
    donor = build('test_vit')
    model = timm.create_model('test_vit', in_chans=5, img_size=96, patch_size=8, num_classes=3)
    before = snapshot(model)
    report = transfer_(model, donor)
    rows = {row.name: row for row in report.rows}
    assert rows['patch_embed.proj.weight'].action == rows['pos_embed'].action == 'resized'
    assert rows['head.weight'].how == f'kept: classifier of 3 classes, the donor has {CLASSES}'
    assert torch.equal(model.head.weight, before['head.weight'])
    assert torch.equal(model.cls_token, donor.cls_token)
    assert logits(model, channels=5, side=96).isfinite().all()


def test_every_tensor_is_once_in_the_plan_and_a_ghn_predicts_what_has_no_partner():
    model, donor = build('resnet26d', channels=(8, 8, 16, 16)), build('resnet26', channels=(8, 8, 16, 16))
    report = plan_transfer(model, donor, ghn=make_ghn(TINY['gated']), seed=3)
    assert sorted(row.name for row in report.rows) == sorted(model.state_dict())
    rows = {row.name: row for row in report.rows}
    assert rows['conv1.3.weight'].action == 'predicted'
    neighbour = report.state_dict['conv1.0.weight'], report.state_dict['layer1.0.conv1.weight']
    scales = [float(value.norm() / value[0].numel() ** -0.5) for value in neighbour]
    predicted = report.state_dict['conv1.3.weight']
    assert 0.1 * min(scales) < float(predicted.norm() / predicted[0].numel() ** -0.5) < 10 * max(scales)
    assert 'elements from ResNet' in str(report)
    assert sum(total['elements'] for total in report.summary().values()) == sum(
        value.numel() for value in model.state_dict().values()
    )


def test_the_same_call_gives_the_same_and_neither_network_is_touched():
    model, donor = build('test_vit', embed_dim=128, num_heads=4), build('test_vit')
    before = snapshot(model), snapshot(donor), torch.random.get_rng_state()
    first, second, other = (plan_transfer(model, donor, seed=seed) for seed in (0, 0, 1))
    key = 'blocks.0.mlp.fc1.weight'
    assert all(torch.equal(value, second.state_dict[name]) for name, value in first.state_dict.items())
    assert not torch.equal(first.state_dict[key], other.state_dict[key])  # the noise that sets copies apart
    torch.testing.assert_close(first.state_dict[key], other.state_dict[key], rtol=0, atol=0.01)
    for network, tensors in zip((model, donor), before, strict=False):
        assert all(torch.equal(value, tensors[name]) for name, value in snapshot(network).items())
    assert torch.equal(torch.random.get_rng_state(), before[2])


def _not_finite(model: nn.Module, donor: nn.Module) -> None:
    donor.fc.weight.data[0, 0] = torch.nan


def _on_meta(model: nn.Module, donor: nn.Module) -> None:
    donor.to('meta')


def _expanded(model: nn.Module, donor: nn.Module) -> None:
    model.bn1.weight = nn.Parameter(torch.ones(1).expand(32))


@pytest.mark.parametrize(
    ('spoil', 'error'),
    [(_not_finite, PredictionError), (_on_meta, UnsupportedModelError), (_expanded, UnsupportedModelError)],
)
def test_a_failure_leaves_the_model_as_it_was(spoil: Callable[[nn.Module, nn.Module], None], error: type[Exception]):
    model, donor = build('test_resnet', seed=1), build('test_resnet')
    spoil(model, donor)
    before = snapshot(model)
    with pytest.raises(error):
        transfer_(model, donor)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_function_preserving_refuses_what_it_cannot_keep():
    donor = build('test_vit')
    model = build('test_vit', embed_dim=96, num_heads=3)  # layer norms see some channels twice and others once
    before = snapshot(model)
    with pytest.raises(PredictionError, match='would not compute what the donor computes'):
        transfer_(model, donor, function_preserving=True)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    with pytest.raises(ConfigError, match='as many input channels and classes'):
        plan_transfer(timm.create_model('test_vit'), donor, function_preserving=True)


def test_files_and_names_as_donors(tmp_path, monkeypatch):
    donor, model = build('test_resnet'), build('test_resnet', seed=1)
    said, plain = tmp_path / 'said.safetensors', tmp_path / 'plain.safetensors'
    header = {'architecture': 'test_resnet', 'num_classes': CLASSES, 'provenance': {'ghn': None}}
    write_state_dict(donor.state_dict(), said, header)
    save_file(donor.state_dict(), plain)
    assert torch.equal(plan_transfer(model, str(said)).state_dict['fc.weight'], donor.fc.weight)
    with pytest.raises(ConfigError, match='does not say what it holds'):
        plan_transfer(model, plain)
    write_state_dict(donor.state_dict(), said, {**header, 'architecture': 'test_vit'})
    with pytest.raises(CheckpointError, match='does not hold the weights of test_vit'):
        plan_transfer(model, said)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    for name in ('test_resnet.r160_in1k', 'hf-hub:timm/test_resnet.r160_in1k'):
        with pytest.raises(UnsupportedModelError, match='give a model, a safetensors file, or a timm name'):
            plan_transfer(model, name)
    with pytest.raises(UnsupportedModelError, match='did you mean'):
        plan_transfer(model, 'resnet1')
    assert timm_ghn.__version__
