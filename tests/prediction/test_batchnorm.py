"""Statistics of batch normalisation are those of the batches; all else about the model stays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
from networks import plain
from tiny import snapshot
from torch import Tensor, nn

from timm_ghn import ConfigError, PredictionError, batch_statistics, calibrate_batchnorm_


def images(count: int = 3, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [1 + 2 * torch.randn(size, 3, 16, 16, generator=generator) for _ in range(count)]


def settings(model: nn.Module) -> list[tuple[object, ...]]:
    return [
        (module.training, getattr(module, 'momentum', 0), getattr(module, 'track_running_stats', 0))
        for module in model.modules()
    ]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


WAYS = {
    'tensors': lambda batch: batch,
    'tuples': lambda batch: (batch, torch.zeros(len(batch))),
    'mapping, image': lambda batch: {'label': torch.zeros(len(batch)), 'image': batch},
    'mapping, pixel_values': lambda batch: {'pixel_values': batch},
}


@pytest.mark.parametrize('wrap', WAYS.values(), ids=WAYS)
def test_statistics_are_the_means_over_the_batches(wrap):
    model = plain().eval()
    model.body[1].running_mean.fill_(7)
    before = settings(model)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert calibrate_batchnorm_(model, (wrap(batch) for batch in images())) is model
    inputs = [model.body[0](batch).detach().transpose(0, 1).flatten(1) for batch in images()]
    norm = model.body[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(1) for x in inputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(1) for x in inputs]).mean(0))
    assert settings(model) == before
    assert equal(parameters, dict(model.named_parameters()))


def test_after_calibration_eval_mode_gives_what_the_batch_itself_gives():
    """On the one batch of the calibration, up to the variance, which is unbiased in running statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('test_efficientnet', drop_rate=0.5, drop_path_rate=0.5)
    batch = torch.randn(16, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with batch_statistics(model):
            expected = model(batch)
        untrained = model.eval()(batch)
        calibrate_batchnorm_(model.train(), [batch])
        assert model.training
        found = model.eval()(batch)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert (untrained - expected).norm() > 0.2 * expected.norm()


def broken() -> Iterator[Tensor]:
    yield images()[0]
    raise OSError('the disk is gone')


@pytest.mark.parametrize(
    ('batches', 'error', 'message'),
    [
        ([], ConfigError, r'at least one batch .*\(got none\)'),
        (broken(), OSError, 'the disk is gone'),
        (
            [images()[0], torch.full((2, 3, 16, 16), torch.nan)],
            PredictionError,
            r"'body\.1\.running_mean' are not finite",
        ),
        ([{'x': images()[0]}], ConfigError, 'image, images, pixel_values'),
        (['image'], ConfigError, r'got str'),
        ([images()[0], torch.zeros(1, 3, 3, 3)], ConfigError, 'too few images'),
    ],
)
def test_an_error_leaves_the_model_as_it_was(batches, error, message):
    model = plain()
    model.body[1].running_var.fill_(3)
    model.body[1].momentum = 0.3
    before, modes = snapshot(model), settings(model)
    with pytest.raises(error, match=message):
        calibrate_batchnorm_(model, batches)
    assert equal(before, snapshot(model))
    assert settings(model) == modes


def test_without_running_statistics_there_is_nothing_to_do():
    model = timm.create_model('test_vit')
    assert calibrate_batchnorm_(model, broken()) is model
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    calibrate_batchnorm_(model, images())
    assert model[1].running_mean is None


def test_batch_statistics_read_and_change_no_running_ones():
    model = plain()
    model.head.eval()
    before, modes = snapshot(model), settings(model)
    with pytest.raises(ZeroDivisionError), batch_statistics(model):
        1 / 0  # noqa: B018
    assert settings(model) == modes
    (batch,) = images(1)
    with torch.no_grad():
        expected = model.train()(batch)
        model.load_state_dict(before)
        model.head.eval()
        with batch_statistics(model) as same:
            assert same is model
            assert [name for name, module in model.named_modules() if module.training] == ['body.1']
            torch.testing.assert_close(model(batch), expected)
            model.body[1].running_mean.fill_(1e9)
            torch.testing.assert_close(model(batch), expected)
            model.body[1].running_mean.zero_()
    assert equal(before, snapshot(model))
    assert settings(model) == modes
