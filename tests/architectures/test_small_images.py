import pytest
import timm
import torch
from torch import nn

from timm_ghn.architectures.small_images import adapt_to_small_images_, size_arguments
from timm_ghn.errors import UnsupportedModelError


def test_resnet_gets_the_stem_of_the_paper():
    model = timm.create_model('resnet18', num_classes=10)
    model.layer1.eval()
    before = model.conv1.weight.detach().clone()
    adapt_to_small_images_(model, 32)
    assert (model.training, model.layer1.training) == (True, False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert torch.equal(model.conv1.weight, before[:, :, 2:5, 2:5])
    assert isinstance(model.maxpool, nn.Identity)
    assert model.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 512, 4, 4)


@pytest.mark.parametrize(
    ('name', 'edit'),
    [('convnext_atto', 'stem.0: stride 4 -> 1'), ('convmixer_1024_20_ks9_p14', 'stem.0: stride 14 -> 3')],
)
def test_a_patch_convolution_keeps_its_kernel(name, edit):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=10)
    before = model.stem[0].weight
    assert adapt_to_small_images_(model, 32) == (edit,)
    assert model.stem[0].weight is before


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('efficientnet_b0', (1280, 4, 4)),
        ('densenet121', (1024, 4, 4)),
        ('vit_tiny_patch16_224', (65, 192)),
        ('swin_tiny_patch4_window7_224', (4, 4, 768)),
        ('levit_128s', (4, 384)),
    ],
)
def test_families_keep_a_map_of_an_eighth_of_the_image(name, shape):
    arguments = size_arguments(name, 32, small=True)
    with torch.device('meta'), torch.no_grad():
        model = timm.create_model(name, num_classes=10, **arguments)
        if 'patch_size' not in arguments:
            adapt_to_small_images_(model, 32)
        assert model.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape[1:] == shape


def test_a_large_enough_image_needs_no_argument():
    assert size_arguments('resnet50', 224, small=False) == {}
    assert size_arguments('vit_tiny_patch16_224', 96, small=False) == {'img_size': 96}


def sides(model, size):
    """Side of the map that each layer of a model writes, by its name."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if not list(module.children()):

            def record(module, inputs, output, name=name):
                if isinstance(output, torch.Tensor) and output.dim() == 4:
                    found[name] = output.shape[-1]

            handles.append(module.register_forward_hook(record))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device='meta'))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    'name', ['resnetblur18', 'skresnet18', 'nf_resnet26', 'cs3darknet_focus_s', 'dla34', 'test_byobnet']
)
def test_the_total_stride_is_divided_by_four(name):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=10)
    large = sides(model, 128)
    adapt_to_small_images_(model, 32)
    small = sides(model, 32)
    last = [layer for layer, side in large.items() if side > 1 and layer in small][-1]
    assert small[last] == large[last] == 4


@pytest.mark.parametrize('name', ['tresnet_m', 'csatv2'])
def test_a_stem_that_has_no_strides_to_take_out_is_refused(name):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=10)
    before = str(model)
    with pytest.raises(UnsupportedModelError, match='has no strides .*small_stem=off'):
        adapt_to_small_images_(model, 32)
    assert str(model) == before


def test_a_scaled_kernel_keeps_the_gain_of_its_size():
    model = timm.create_model('nf_resnet26', num_classes=10)
    conv = model.stem.conv
    gain = conv.scale * conv.weight[0].numel() ** 0.5
    adapt_to_small_images_(model, 32)
    assert conv.kernel_size == (3, 3)
    assert conv.scale * 27**0.5 == pytest.approx(gain)
