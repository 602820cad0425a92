import random

import numpy as np
import pytest
import torch
from datasets import Image
from pictures import encoded, make_dataset, picture
from PIL import Image as PILImage

from timm_ghn.data.images import NO_LABEL, EpochSampler, ImageDataset, decoded, eval_transform, train_transform
from timm_ghn.data.options import TransformOptions
from timm_ghn.data.splits import Split
from timm_ghn.errors import ConfigError, DataError

CONFIG = {
    'input_size': (3, 32, 32), 'interpolation': 'bicubic', 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4),
    'crop_pct': 1.0, 'crop_mode': 'center',
}  # fmt: skip


def split(count=6, **options) -> Split:
    rows = make_dataset(count, **options)
    return Split(
        rows.select_columns(['image']).cast_column('image', Image(decode=False)), 'image', np.array(rows['label'])
    )


def augmented(count=6, seed=0, **options) -> ImageDataset:
    transform = train_transform(CONFIG, TransformOptions(**options))
    return ImageDataset(split(count), transform, seed=seed, training=True)


def test_an_evaluated_image_is_normalised_as_the_config_says():
    image, label, damaged = ImageDataset(split(), eval_transform(CONFIG))[1]
    values = np.array(picture((40, 200, 60), 1)) / 255
    expected = (values - np.array(CONFIG['mean'])) / np.array(CONFIG['std'])
    torch.testing.assert_close(image, torch.tensor(expected).permute(2, 0, 1).float(), rtol=1e-5, atol=1e-5)
    assert (label, damaged) == (1, 0)


@pytest.mark.parametrize('mode', ['rrc', 'rkrc', 'rkrr', 'pad'])
def test_what_is_drawn_depends_on_seed_epoch_and_row_alone(mode):
    more = {'train_crop_mode': mode, 'aa': 'rand-m9-mstd0.5', 'color_jitter': 0.4, 'reprob': 0.5}
    first, second, other = (augmented(seed=seed, **more) for seed in (0, 0, 1))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    keys = [0, 5, 2, 6, 17]
    images = {key: first[key][0] for key in keys}
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    torch.manual_seed(123)
    assert all(torch.equal(second[key][0], images[key]) for key in reversed(keys))
    assert any(not torch.equal(first[5 + 6 * epoch][0], images[5]) for epoch in range(1, 8)), 'another epoch'
    assert any(not torch.equal(other[key][0], first[key][0]) for key in range(12)), 'another seed'


def test_a_padded_crop_is_a_shift_by_at_most_four_pixels():
    dataset = augmented(train_crop_mode='pad', hflip=0.0)
    whole = ImageDataset(dataset.split, eval_transform(CONFIG))[4][0]
    black = -torch.tensor(CONFIG['mean']) / torch.tensor(CONFIG['std'])
    padded = black.view(3, 1, 1).expand(3, 40, 40).clone()
    padded[:, 4:36, 4:36] = whole
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)
    found = set()
    for epoch in range(40):
        same = (windows - dataset[4 + 6 * epoch][0].view(3, 1, 1, 32, 32)).abs().amax((0, 3, 4)) < 1e-5
        assert same.any()
        found.add(tuple(same.nonzero()[0].tolist()))
    assert len(found) > 15


def test_a_damaged_training_image_gives_way_to_the_next_and_others_have_no_label():
    dataset = ImageDataset(split(6, damaged=(1, 2)), eval_transform(CONFIG), training=True)
    image, label, damaged = dataset[1]
    assert (label, damaged) == (0, 2)
    assert torch.equal(image, dataset[3][0])
    image, label, damaged = ImageDataset(dataset.split, eval_transform(CONFIG))[1]
    assert (label, damaged, image.shape, bool(image.any())) == (NO_LABEL, 1, (3, 32, 32), False)
    with pytest.raises(DataError, match='none of the 3 training images'):
        ImageDataset(split(3, damaged=(0, 1, 2)), eval_transform(CONFIG), training=True)[0]


@pytest.mark.parametrize(
    ('image', 'value'),
    [
        (PILImage.new('L', (8, 8), 100), 100),
        (PILImage.new('LA', (8, 8), (100, 255)), 100),
        (PILImage.new('1', (8, 8), 1), 255),
        (PILImage.new('RGBA', (8, 8), (100, 100, 100, 255)), 100),
        (PILImage.new('P', (8, 8), 0), 0),
        (PILImage.new('I;16', (8, 8), 65535), 255),
    ],
)
def test_images_of_any_mode_become_rgb(image, value):
    read = decoded({'bytes': encoded(image), 'path': None}, 'RGB')
    assert read.mode == 'RGB'
    assert np.array(read).reshape(-1, 3).tolist() == [[value] * 3] * 64


@pytest.mark.parametrize(
    'value', [None, {'bytes': b'', 'path': None}, {'bytes': b'text', 'path': None}, {'bytes': None, 'path': 'gone.png'}]
)
def test_what_is_no_image_is_none(value):
    assert decoded(value, 'RGB') is None


def test_a_model_of_one_channel_reads_grey():
    config = {**CONFIG, 'input_size': (1, 32, 32), 'mean': (0.5,), 'std': (0.5,)}
    assert ImageDataset(split(), eval_transform(config), channels=1)[0][0].shape == (1, 32, 32)
    with pytest.raises(ConfigError, match='1 or 3 image channels'):
        ImageDataset(split(), eval_transform(config), channels=5)


def test_every_row_comes_once_in_an_epoch_in_an_order_of_its_own():
    sampler = EpochSampler(50, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert sorted(key - 50 * epoch for key in keys) == list(range(50))
        orders.append([key - 50 * epoch for key in keys])
    assert orders[0] == orders[2] != orders[1]
    assert list(EpochSampler(50, seed=2)) != orders[0]


def test_bad_augmentation_is_refused():
    with pytest.raises(ConfigError, match='train_crop_mode to be one of'):
        TransformOptions(train_crop_mode='center')
    with pytest.raises(ConfigError, match='hflip between 0 and 1'):
        TransformOptions(hflip=2)
    with pytest.raises(ConfigError, match='timm cannot build the augmentation'):
        train_transform(CONFIG, TransformOptions(aa='no-such-policy'))
