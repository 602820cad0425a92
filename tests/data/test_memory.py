import numpy as np
import pytest
import torch

from timm_ghn.data.memory import ImageTensors, augmented, evaluation_batches, normalised, training_batch

PLAIN = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0)}


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


@pytest.fixture
def data():
    return ImageTensors(images(10), torch.arange(10), 0)


@pytest.mark.parametrize(('count', 'sizes'), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (3, [3]), (1, [1])])
def test_no_batch_of_an_evaluation_is_too_small_for_its_statistics(data, count, sizes):
    found = list(evaluation_batches(data, count, 4, seed=0, config=PLAIN))
    assert [len(labels) for _, labels in found] == sizes
    labels = torch.cat([labels for _, labels in found])
    assert len(set(labels.tolist())) == count
    assert all(torch.equal(images, normalised(data.images_nchw[labels], PLAIN)) for images, labels in found)


def batch(data, step=0, seed=0, augment='crop'):
    return training_batch(data, step, 4, seed=seed, config=PLAIN, augment=augment)


@pytest.mark.parametrize('crop', [False, True])
def test_augmented_images_depend_on_the_generator_alone(crop):
    first, second, other = (augmented(images(8), np.random.default_rng(seed), crop=crop) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.dtype == torch.uint8
    assert first.shape == (8, 3, 16, 16)


def test_an_image_is_flipped_or_as_it_was():
    given = images(40)
    found = augmented(given, np.random.default_rng(0), crop=False)
    kept = [torch.equal(image, old) for image, old in zip(found, given, strict=True)]
    mirrored = [torch.equal(image, old.flip(2)) for image, old in zip(found, given, strict=True)]
    assert all(one != other for one, other in zip(kept, mirrored, strict=True))
    assert 5 < sum(kept) < 35


def test_a_crop_is_a_part_of_the_image_or_of_its_mirror_image():
    given = images(1)
    padded = torch.nn.functional.pad(torch.cat((given, given.flip(3))), (2,) * 4)
    windows = padded.unfold(2, 16, 1).unfold(3, 16, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    for seed in range(10):
        found = augmented(given, np.random.default_rng(seed))
        assert (windows == found).flatten(1).all(1).any()


def test_an_epoch_has_each_image_at_most_once_and_another_order_than_the_next(data):
    first = torch.cat([batch(data, step)[1] for step in range(2)])
    second = torch.cat([batch(data, step)[1] for step in range(2, 4)])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 8
    assert first.tolist() != second.tolist()


def test_what_is_not_augmented_is_what_was_given(data):
    found, labels = batch(data, augment='none')
    assert torch.equal(found, normalised(data.images_nchw[labels], PLAIN))
