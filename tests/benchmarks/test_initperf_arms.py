"""Each arm writes what it says, the same for a seed; the classifier stays, and all values are finite."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from benchmarks.initperf.arms import (
    ARMS,
    ArmData,
    NotApplicableError,
    arm,
    closed_gates,
    find_arm,
    is_head,
    registered,
    shuffle_weights_,
    weight_layers,
    write_start,
)
from benchmarks.initperf.cells import NETWORKS, Network
from benchmarks.initperf.donors import resize_into_
from timm_ghn import batch_statistics, ghn_init

RESNET, VIT = NETWORKS['test_resnet@64'], NETWORKS['test_vit']


def data_of(network: Network, seed: int = 0) -> ArmData:
    side = network.image_size
    images = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % 2
    images[:, 0] += 2 * labels[:, None, None]
    batches = tuple(zip(images.split(8), labels.split(8), strict=True))
    return ArmData(network, batches, (3, side, side), 10, seed)


def started(name: str, network: Network = RESNET, seed: int = 0) -> nn.Module:
    model = network.start(10, seed).model
    write_start(name, model, data_of(network, seed))
    return model


def differ(one: nn.Module, other: nn.Module) -> set[str]:
    return {
        name
        for (name, value), parameter in zip(one.named_parameters(), other.parameters(), strict=True)
        if not torch.equal(value, parameter)
    }


@pytest.mark.parametrize(
    'name',
    [name for name, one in ARMS.items() if name not in ('own', 'race') and one.ignorant != one.of_ghn],
)
def test_an_arm_is_the_same_for_a_seed_and_keeps_the_classifier(name):
    network = VIT if name in ('mimetic', 'impulse') else RESNET
    state = torch.random.get_rng_state()
    model, again = started(name, network), started(name, network)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not differ(model, again)
    changed = differ(model, network.start(10, 0).model)
    assert bool(changed) == (name != 'timm')
    assert not [key for key in changed if is_head(model, key)]
    assert all(bool(value.isfinite().all()) for value in model.parameters())


@pytest.mark.parametrize('dead', [False, True])
def test_a_race_leaves_the_start_that_learns_as_it_was_before_the_race(dead):
    def silence(model: nn.Module, data: ArmData) -> None:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)

    with registered('dead', silence):
        model = started('dead' if dead else 'timm')
        write_start('race:kaiming' if dead else 'race:dead', model, data_of(RESNET))
    assert not differ(model, started('kaiming' if dead else 'timm'))


def test_open_gates_are_open_and_nothing_else_changes():
    model, base = started('timm_open'), RESNET.start(10, 0).model
    gates = closed_gates(base)
    assert (
        differ(model, base)
        == set(gates)
        == {f'layer{stage}.0.{last}.weight' for stage, last in zip('1234', ('bn2', 'bn2', 'bn3', 'bn2'), strict=True)}
    )
    assert all(bool((model.get_parameter(name) == 1).all()) for name in gates)
    convnext = NETWORKS['test_convnext@64']
    scales = [value for name, value in started('timm_open', convnext).named_parameters() if name.endswith('gamma')]
    assert scales
    assert all(bool((value == 0.1).all()) for value in scales)
    with pytest.raises(NotApplicableError, match='the same as timm'):
        started('timm_open', VIT)


def test_weights_without_data_have_their_variance_their_orthogonality_and_their_outputs():
    for layer, weight in weight_layers(started('kaiming')):
        expected = (2 if isinstance(layer, nn.Conv2d) else 1) / weight[0].numel()
        assert float(weight.detach().var()) == pytest.approx(expected, rel=0.3)
    for layer, weight in weight_layers(started('orthogonal')):
        matrix = weight.detach().flatten(1)
        matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.t()
        gain = 2 if isinstance(layer, nn.Conv2d) else 1
        torch.testing.assert_close(matrix @ matrix.t(), gain * torch.eye(len(matrix)), atol=1e-4, rtol=0)
    model = started('lsuv')
    deviations = []
    for layer, _ in weight_layers(model):
        layer.register_forward_hook(lambda _, __, output: deviations.append(float(output.std())))
    with torch.no_grad(), batch_statistics(model):
        model(data_of(RESNET).images_bchw)
    assert deviations == pytest.approx([1] * len(deviations), abs=0.02)


def test_mimetic_attention_is_near_the_identity_and_minus_the_identity():
    model = started('mimetic', VIT)
    attention = model.blocks[0].attn
    dim, (query, key, value) = 64, attention.qkv.weight.detach().chunk(3)
    product = value.t() @ attention.proj.weight.detach().t()
    assert float(product.diagonal().mean()) == pytest.approx(-0.4, abs=0.05)
    assert float((product + 0.4 * torch.eye(dim)).std()) == pytest.approx(0.4 / math.sqrt(dim), rel=0.1)
    heads = zip(query.chunk(attention.num_heads), key.chunk(attention.num_heads), strict=True)
    assert all(float((one.t() @ other).diagonal().mean()) > 0.2 for one, other in heads)


def test_structured_attention_looks_at_one_neighbour():
    model = started('impulse', VIT)
    attention = model.blocks[0].attn
    query, key, _ = attention.qkv.weight.detach().chunk(3)
    positions = nn.functional.layer_norm(model.pos_embed.detach()[0, -64:], (64,))
    kept = []
    for one, other in zip(query.chunk(attention.num_heads), key.chunk(attention.num_heads), strict=True):
        weights = (positions @ one.t() @ other @ positions.t() / math.sqrt(len(one))).softmax(dim=1)
        row, column = torch.arange(64) // 8, torch.arange(64) % 8
        looked = weights.argmax(dim=1)
        near = ((looked // 8 - row).abs() <= 1) & ((looked % 8 - column).abs() <= 1)
        kept.append(float(near.float().mean()))
    assert min(kept) > 0.9


def test_predictions_their_shuffled_weights_and_their_norms():
    model = RESNET.start(10, 0).model
    ghn_init(model, 'ghn_tiny', input_size=(3, 64, 64), head='keep', postprocess='orth')
    assert not differ(model, started('ghn_orth'))
    shuffled = started('shuffled')
    assert {name for name, value in model.named_parameters() if value.ndim > 1} - {'fc.weight'} == differ(
        model, shuffled
    )
    for one, other in zip(model.parameters(), shuffled.parameters(), strict=True):
        assert torch.equal(one.flatten().sort().values, other.flatten().sort().values)
    norms = differ(started('norms_only'), RESNET.start(10, 0).model)
    assert norms
    assert all(model.get_parameter(name).ndim == 1 for name in norms)
    gates = closed_gates(RESNET.start(10, 0).model)
    assert differ(started('ghn_open'), model) == set(gates)


def test_a_donor_of_another_size_is_cut_and_filled_by_place_and_depth():
    donor, target = VIT.start(10, 0).model, NETWORKS['test_vit-deep'].start(10, 1).model
    resize_into_(target, donor.state_dict(), donor)
    last = len(donor.blocks) - 1
    for number, block in enumerate(target.blocks):
        assert torch.equal(block.mlp.fc1.weight, donor.blocks[min(number, last)].mlp.fc1.weight)
    narrow = dataclasses.replace(NETWORKS['resnet18x0.75@64'], model_args={'channels': [8, 16, 24, 32]})
    wide = dataclasses.replace(narrow, model_args={'channels': [12, 32, 12, 32]})
    small, large = narrow.start(10, 0).model, wide.start(10, 1).model
    resize_into_(large, small.state_dict(), small)
    weight, source = large.layer2[1].conv1.weight, small.layer2[1].conv1.weight
    torch.testing.assert_close(weight[:16, :16], source / 2)
    torch.testing.assert_close(weight[16:, 16:], source / 2)
    assert torch.equal(large.layer3[1].conv1.weight, small.layer3[1].conv1.weight[:12, :12])


def test_anyone_can_register_an_arm_but_not_one_that_is_there_or_writes_no_numbers():
    def broken(model: nn.Module, data: ArmData) -> None:
        nn.init.constant_(model.conv1[0].weight, math.nan)

    with registered('mine', broken, ignorant=True):
        assert find_arm('mine').ignorant
        with pytest.raises(ValueError, match='mine wrote values that are not finite'):
            started('mine')
        with pytest.raises(ValueError, match='already'):
            arm('mine')(broken)
    with pytest.raises(ValueError, match="no arm 'mine'"):
        find_arm('mine')


def test_shuffling_weights_drawn_at_random_changes_no_statistic_of_them():
    """A shuffled draw is as good a draw: what a network of random weights computes has the same distribution."""

    def spread(shuffle: bool) -> torch.Tensor:
        found = []
        for seed in range(12):
            model = started('kaiming', seed=seed)
            if shuffle:
                shuffle_weights_(model, seed)
            with torch.no_grad(), batch_statistics(model):
                found.append(model.forward_features(data_of(RESNET).images_bchw).std())
        return torch.stack(found)

    before, after = spread(False), spread(True)
    error = math.sqrt((float(before.var()) + float(after.var())) / len(before))
    assert abs(float(before.mean() - after.mean())) < 3 * error
