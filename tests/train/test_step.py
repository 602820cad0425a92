import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_ghn import GHN, GHNConfig, predict
from timm_ghn.architectures.samplers import TimmSampler
from timm_ghn.train.blueprints import Blueprints
from timm_ghn.train.step import predict_parameters, train_step

SMALL = {'hid': 16, 'layers': 1, 'heads': 4, 'num_classes': 10, 'rules': 'operators'}
CONFIGS = {
    'templates': GHNConfig(max_shape=(512, 512, 16, 16), decoder='templates', templates=4, codes=8, **SMALL),
    'graphormer': GHNConfig(max_shape=(16, 16, 7, 7), **SMALL),
    'gated': GHNConfig(max_shape=(16, 16, 7, 7), gnn='gated', **SMALL),
    'mlp': GHNConfig(max_shape=(16, 16, 3, 3), gnn='mlp', decoder='mlp', **SMALL),
}


@pytest.fixture(scope='module', params=sorted(CONFIGS))
def ghn(request):
    torch.manual_seed(0)
    return GHN(CONFIGS[request.param])


@pytest.fixture(scope='module')
def architectures():
    sampler = TimmSampler(('resnet_basic', 'vit', 'convnext', 'mobilenet'), macs=2_000_000, parameters=(5_000, 200_000))
    rng = np.random.default_rng(1)
    found = {}
    while len(found) < 4:
        architecture = sampler.sample(rng)
        found.setdefault(architecture.family, architecture)
    return list(found.values())


@pytest.fixture(scope='module')
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)


def gradients(ghn):
    found = {name: parameter.grad for name, parameter in ghn.named_parameters() if parameter.grad is not None}
    ghn.zero_grad(set_to_none=True)
    return found


def expect_close(found, expected):
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale)


def test_parameters_predicted_together_are_those_of_predict(ghn, architectures):
    blueprints = [Blueprints(ghn.config)(architecture) for architecture in architectures]
    with torch.no_grad():
        together = predict_parameters(ghn, blueprints)
    for architecture, parameters in zip(architectures, together, strict=True):
        alone = predict(architecture.build('cpu'), ghn, input_size=32, head='predict').state_dict
        assert parameters.keys() == alone.keys()
        for name, value in parameters.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)


def test_the_random_token_of_a_network_does_not_depend_on_the_others(ghn, architectures):
    (vit,) = (architecture for architecture in architectures if architecture.family == 'vit')
    vits = [dataclasses.replace(vit, options={**vit.options, 'depth': depth}) for depth in (1, 2)]
    first, second = map(Blueprints(ghn.config), vits)
    with torch.no_grad():
        found = [predict_parameters(ghn, several)[-1]['pos_embed'] for several in ([second], [first, second])]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_mean_loss(ghn, architectures, batch):
    blueprints = [Blueprints(ghn.config)(architecture) for architecture in architectures]
    images, labels = batch
    outcome = train_step(ghn, blueprints, images, labels)
    found = gradients(ghn)
    losses = [
        F.cross_entropy(blueprint(parameters, images), labels)
        for blueprint, parameters in zip(blueprints, predict_parameters(ghn, blueprints), strict=True)
    ]
    torch.stack(losses).mean().backward()
    expected = gradients(ghn)
    assert outcome.losses == pytest.approx([float(loss.detach()) for loss in losses], rel=1e-4)
    expect_close(found, expected)
    assert all(p.is_meta for blueprint in blueprints for p in blueprint.network.parameters()), 'none keeps what it got'


def test_networks_in_parts_add_up(ghn, architectures, batch):
    blueprints = [Blueprints(ghn.config)(architecture) for architecture in architectures]
    train_step(ghn, blueprints, *batch)
    whole = gradients(ghn)
    for blueprint in blueprints:
        train_step(ghn, [blueprint], *batch, networks=len(blueprints))
    expect_close(gradients(ghn), whole)


def test_each_network_can_see_images_of_its_own(ghn, architectures, batch):
    blueprints = [Blueprints(ghn.config)(architecture) for architecture in architectures[:2]]
    images, labels = batch
    other = images.flip(0, -1), (labels + 1) % 10
    outcome = train_step(ghn, blueprints, torch.stack([images, other[0]]), torch.stack([labels, other[1]]))
    together = gradients(ghn)
    first = train_step(ghn, blueprints[:1], *batch, networks=2)
    second = train_step(ghn, blueprints[1:], *other, networks=2)
    assert outcome.losses == pytest.approx(first.losses + second.losses, rel=1e-3)
    expect_close(gradients(ghn), together)


def test_a_network_without_a_finite_loss_is_left_out(architectures, batch):
    torch.manual_seed(0)
    ghn = GHN(CONFIGS['templates'])
    blueprints = [Blueprints(ghn.config)(architecture) for architecture in architectures[:2]]
    images, labels = batch
    train_step(ghn, blueprints[:1], images, labels, networks=2)
    expected = gradients(ghn)
    broken = dataclasses.replace(blueprints[1], network=NotFinite(blueprints[1].network))
    outcome = train_step(ghn, [blueprints[0], broken], images, labels)
    assert (outcome.skipped, len(outcome.losses), len(outcome.accuracies)) == (1, 1, 1)
    expect_close(gradients(ghn), expected)


class NotFinite(torch.nn.Module):
    """Takes the parameters of a network and computes nothing of use."""

    def __init__(self, network):
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        for name, parameter in network.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, images):
        return torch.stack([p.sum() for p in self.parameters()]).sum() * torch.full((len(images), 10), float('nan'))


def test_the_gradient_of_each_network_is_clipped(ghn, architectures, batch):
    blueprint = Blueprints(ghn.config)(architectures[0])
    train_step(ghn, [blueprint], *batch)
    whole = gradients(ghn)
    train_step(ghn, [blueprint], *batch, clip=1e9)
    for name, gradient in gradients(ghn).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-6)
    train_step(ghn, [blueprint], *batch, clip=1e-3)
    clipped = gradients(ghn)
    ratios = [float(clipped[name].norm() / whole[name].norm()) for name in whole if float(whole[name].norm()) > 1e-4]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-2)
    assert max(ratios) < 0.1


@pytest.mark.parametrize('rules', ['auto', 'operators'])
def test_no_architecture_is_traced_twice_whatever_rules_its_graph_follows(rules, architectures, tmp_path, monkeypatch):
    """The graph may follow others than those that are asked for."""
    config = dataclasses.replace(CONFIGS['mlp'], rules=rules)
    first = [Blueprints(config, tmp_path)(architecture) for architecture in architectures]
    with monkeypatch.context() as patch:
        patch.setattr('timm_ghn.train.blueprints.trace', None)
        second = [Blueprints(config, tmp_path)(architecture) for architecture in architectures]
    assert [blueprint.graph.rules for blueprint in second] == [blueprint.graph.rules for blueprint in first]
    assert [blueprint.plan.rows for blueprint in second] == [blueprint.plan.rows for blueprint in first]
    assert all(
        torch.equal(a.fixed[name], b.fixed[name]) for a, b in zip(first, second, strict=True) for name in a.fixed
    )
    other = dataclasses.replace(config, rules='operators' if rules != 'operators' else 'auto')
    again = [Blueprints(other, tmp_path)(architecture).graph.rules for architecture in architectures]
    alone = [Blueprints(other)(architecture).graph.rules for architecture in architectures]
    assert again == alone, 'what was asked for differs, so it is traced again'


def test_a_damaged_blueprint_is_made_again(ghn, architectures, tmp_path):
    first = Blueprints(ghn.config, tmp_path)
    first(architectures[0])
    damaged = tmp_path / f'{architectures[0].key}.safetensors'
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert Blueprints(ghn.config, tmp_path)(architectures[0]).plan.rows == first(architectures[0]).plan.rows
