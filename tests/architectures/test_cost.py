import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_ghn.architectures.cost import Cost, Limits, cost_of
from timm_ghn.errors import ConfigError


def test_convolutions_and_linear_layers_are_counted_by_hand():
    with torch.device('meta'):
        model = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 5)
        )
    cost = cost_of(model, (4, 8, 8))
    assert cost.parameters == (8 * 2 * 9 + 8) + 16 + (32 * 5 + 5)
    assert cost.macs == 64 * 8 * 2 * 9 + 32 * 5
    assert cost.activations == 64 * 8 + 5


def test_attention_is_counted_as_torch_counts_it():
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, device='meta')
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 32, 32, device='meta'))
    assert cost_of(model, (3, 32, 32)).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ('cost', 'admitted'),
    [
        (Cost(10, 100, 50), True),
        (Cost(9, 100, 50), False),
        (Cost(21, 100, 50), False),
        (Cost(10, 101, 50), False),
        (Cost(10, 100, 51), False),
        (Cost(10, 100, 39), False),
    ],
)
def test_every_limit_counts(cost, admitted):
    assert Limits(parameters=(10, 20), macs=100, activations=50, least_activations=40).admit(cost) is admitted


@pytest.mark.parametrize('wrong', [{'parameters': (2, 1)}, {'macs': 0}, {'image_size': 0}, {'activations': 0}])
def test_limits_that_exclude_everything_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)
