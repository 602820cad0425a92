import pytest
import timm
import torch
from torch import nn

from timm_ghn.errors import UnsupportedModelError
from timm_ghn.small_images import adapt_to_small_images_, size_arguments


def adapted(name, size=32):
    """A model for small images, and the side of its last map there."""
    arguments = size_arguments(name, size, small=True)
    model = timm.create_model(name, num_classes=10, **arguments)
    if 'patch_size' not in arguments:
        adapt_to_small_images_(model, size)
    with torch.no_grad():
        return model, model.eval().forward_features(torch.zeros(1, 3, size, size))


def test_resnet_gets_the_stem_of_the_paper():
    model = timm.create_model('resnet18', num_classes=10)
    before = model.conv1.weight.detach().clone()
    adapt_to_small_images_(model, 32)
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert torch.equal(model.conv1.weight, before[:, :, 2:5, 2:5])
    assert isinstance(model.maxpool, nn.Identity)
    assert model.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 512, 4, 4)


def test_convnext_gets_the_stem_of_the_paper():
    model = timm.create_model('convnext_atto', num_classes=10)
    before = model.stem[0].weight
    edits = adapt_to_small_images_(model, 32)
    assert [str(edit) for edit in edits] == ['stem.0: stride 4 -> 1']
    assert model.stem[0].weight is before
    assert model.stem[0].kernel_size == (4, 4)


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('efficientnet_b0', (1280, 4, 4)),
        ('regnety_002', (368, 4, 4)),
        ('densenet121', (1024, 4, 4)),
        ('mobilenetv3_small_100', (576, 4, 4)),
        ('test_resnet', (96, 4, 4)),
        ('vit_tiny_patch16_224', (65, 192)),
        ('swin_tiny_patch4_window7_224', (4, 4, 768)),
        ('levit_128s', (4, 384)),
        ('coatnet_nano_rw_224', (512, 4, 4)),
    ],
)
def test_families_keep_a_map_of_an_eighth_of_the_image(name, shape):
    assert tuple(adapted(name)[1].shape[1:]) == shape


def test_a_large_enough_image_needs_no_argument():
    assert size_arguments('resnet50', 224, small=False) == {}
    assert size_arguments('vit_tiny_patch16_224', 96, small=False) == {'img_size': 96}


def test_a_model_that_cannot_be_adapted_is_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 8 * 8, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match='keep its stem with small_stem=off'):
        adapt_to_small_images_(net, 32)
    assert (net[0].stride, net[0].kernel_size, net[0].padding) == ((2, 2), (7, 7), (3, 3))
    assert isinstance(net[1], nn.MaxPool2d)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_modes_and_hooks_are_as_they_were():
    model = timm.create_model('test_resnet', num_classes=10)
    model.layer1.eval()
    adapt_to_small_images_(model, 32)
    assert model.training
    assert not model.layer1.training
    assert not any(module._forward_pre_hooks for module in model.modules())
