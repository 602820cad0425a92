"""A race between starts and learning rates; and what a network begins with."""

from __future__ import annotations

import contextlib
import copy
import json
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from tiny import TINY, make_ghn, snapshot
from torch import nn

from timm_ghn.errors import ConfigError, TrainingError, UnsupportedModelError
from timm_ghn.transfer import race, start
from timm_ghn.transfer.race import OWN, Runner, _best_half, _rounds, race_
from timm_ghn.transfer.rank import RankedDonor
from timm_ghn.transfer.start import choose_init, start_

LRS = (1e-3, 1e-2)


class Net(nn.Module):
    """A convolution, a norm and a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(width, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))


def batches(count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images of two classes: a little brighter in the first or in the second channel."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        labels = torch.randint(2, (16,), generator=generator)
        images = torch.randn(16, 3, 8, 8, generator=generator)
        images[range(16), labels] += 0.5
        found.append((images, labels))
    return found


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for images, labels in batches() * 4:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope='module')
def nets() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A network, and the weights of one like it that is trained."""
    model = first_net()
    return model, trained(copy.deepcopy(model)).state_dict()


def first_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def test_the_better_start_wins_and_stays_in_the_model(nets):
    model, good = copy.deepcopy(nets[0]).eval(), nets[1]
    state = torch.random.get_rng_state()
    found = race_(model, {'good': lambda net: net.load_state_dict(good)}, batches(), lrs=LRS, steps=2)
    assert found.winner.start == 'good'
    assert found.winner.rounds[-1][1] > 90
    assert 50 < found.winner.score < found.winner.rounds[-1][1], 'probabilities are not as sure as choices'
    assert {(one.start, one.lr) for one in found.runners} == {(name, lr) for name in (OWN, 'good') for lr in LRS}
    assert found.steps == 4 * 2 + 2 * 4  # four runners, then two for twice as long
    again = copy.deepcopy(nets[0])
    assert race_(again, {'good': lambda net: net.load_state_dict(good)}, batches(), lrs=LRS, steps=2).steps == 16
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    json.dumps(found.to_dict())
    assert 'good at' in str(found).splitlines()[-1]


def test_a_bad_start_never_wins_and_the_own_one_runs_to_the_end(nets):
    model = copy.deepcopy(nets[0])

    def spoil(net: nn.Module) -> None:
        for parameter in net.parameters():
            parameter.data.mul_(0)

    found = race_(model, {'bad': spoil}, batches(), lrs=LRS, steps=4)
    assert found.winner.start == OWN
    assert max(len(one.rounds) for one in found.runners if one.start == OWN) == len(_rounds(4))
    ranked = [Runner(name, 1.0, [(1, 0.0, share)]) for name, share in (('a', 9.0), ('b', 8.0), ('c', 7.0), (OWN, 1.0))]
    assert [one.start for one in _best_half(ranked)] == ['a', OWN]
    assert [one.start for one in _best_half([ranked[0], ranked[3]])] == ['a']


def test_an_interrupted_race_goes_on_and_ends_the_same(nets, tmp_path, monkeypatch):
    starts = {'good': lambda net: net.load_state_dict(nets[1])}
    whole = copy.deepcopy(nets[0])
    expected = race_(whole, starts, batches(), lrs=LRS, steps=2)
    model = copy.deepcopy(nets[0])
    calls = []
    compare = race._Field._compare

    def stop(field: race._Field) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 5:  # the first is that of the estimate
            raise KeyboardInterrupt
        return compare(field)

    monkeypatch.setattr(race._Field, '_compare', stop)
    with pytest.raises(KeyboardInterrupt):
        race_(model, starts, batches(), lrs=LRS, steps=2, folder=tmp_path)
    assert all(torch.equal(value, nets[0].state_dict()[key]) for key, value in model.state_dict().items())
    found = race_(model, starts, batches(), lrs=LRS, steps=2, folder=tmp_path)
    assert len(calls) == 5 + 1 + 2  # one of the first round, two of the second
    assert [one.rounds for one in found.runners] == [one.rounds for one in expected.runners]
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(ConfigError, match='another race'):
        race_(model, starts, batches(), lrs=(1e-4,), folder=tmp_path)


def _race_in_process(rank: int, folder: Path, good: dict[str, torch.Tensor]) -> None:
    """What each of two processes does: a race, interrupted in the second round, and the same race again."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', f'file://{folder / "meet"}', rank=rank, world_size=2)
    starts = {'good': lambda net: net.load_state_dict(good), 'absent': fail if rank else lambda net: None}
    rounds, finished = race._Field._round, []

    def stop(field: race._Field, number: int, steps: int) -> None:
        rounds(field, number, steps)
        finished.append(number)
        if field.runners[number].rounds[1:]:
            raise KeyboardInterrupt

    model = first_net()
    warnings.simplefilter('ignore')
    with mock.patch.object(race._Field, '_round', stop), contextlib.suppress(KeyboardInterrupt):
        race_(model, starts, batches(), lrs=(*LRS, 3e-2), steps=2, folder=folder / 'race')
    torch.distributed.barrier()  # both were interrupted
    finished += [-1]
    found = race_(model, starts, batches(), lrs=(*LRS, 3e-2), steps=2, folder=folder / 'race')
    torch.save([finished, [one.rounds for one in found.runners], model.state_dict()], folder / f'{rank}.pt')
    torch.distributed.destroy_process_group()


def fail(net: nn.Module) -> None:
    raise UnsupportedModelError('it cannot be had')


def test_processes_share_the_runners_and_find_what_one_finds(nets, tmp_path):
    torch.multiprocessing.spawn(_race_in_process, (tmp_path, nets[1]), nprocs=2)
    whole = first_net()
    expected = race_(whole, {'good': lambda net: net.load_state_dict(nets[1])}, batches(), lrs=(*LRS, 3e-2), steps=2)
    took_part = []
    for rank in range(2):
        finished, rounds, state = torch.load(tmp_path / f'{rank}.pt')
        took_part.append(finished)
        assert rounds == [one.rounds for one in expected.runners]
        assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
    assert sorted(took_part[0][:3] + took_part[1][:3]) == list(range(6)), 'each runner in one process'


def test_time_bounds_the_steps_and_what_cannot_take_part_is_left_out(nets, tmp_path):
    model = copy.deepcopy(nets[0])
    with pytest.raises(TrainingError, match='allow more'):
        race_(model, {}, batches(), minutes=1e-9)
    found = race_(model, {}, batches(), lrs=(1e-3,), steps=10_000, minutes=0.01)
    assert found.steps < 10_000
    made = []

    def slow(net: nn.Module, lr: float) -> torch.optim.Optimizer:  # but for the first step, by which the time is told
        time.sleep(0.3 if made else 0)
        made.append(lr)
        return torch.optim.SGD(net.parameters(), lr)

    limits = {'lrs': (1e-3, 2e-3, 3e-3, 4e-3), 'steps': 1, 'minutes': 0.02, 'folder': tmp_path}
    found = race_(model, {}, batches(), optimizer=slow, **limits)
    assert [len(one.rounds) for one in found.runners] == [1] * 4, 'there is no time for a second round'
    assert found.winner.score == max(one.score for one in found.runners)
    count = len(made)
    again = race_(model, {}, batches(), optimizer=slow, **limits)
    assert (again.winner.lr, len(made)) == (found.winner.lr, count), 'a race that has ended stays so'

    with pytest.warns(UserWarning, match='does not take part'):
        found = race_(model, {'absent': fail}, batches(), lrs=(1e-3,), steps=1)
    assert found.left_out == {'absent': 'it cannot be had'}
    assert 'left out: absent' in str(found)
    with pytest.raises(ConfigError, match='batches to train on'):
        race_(model, {}, batches(1))
    with pytest.raises(TrainingError, match='not finite'):
        race_(model, {}, [(images * torch.nan, labels) for images, labels in batches()], lrs=(1e-3,))


@pytest.fixture
def relatives(monkeypatch) -> list[RankedDonor]:
    """What the ranking finds, in place of the pretrained networks of timm."""
    found = [RankedDonor('test_resnet.r160_in1k', 0.1, 2_000_000, False)]
    monkeypatch.setattr(start, 'rank_donors', lambda model: found)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    return found


def test_without_the_hub_the_ghn_serves(relatives):
    model = timm.create_model('test_resnet', num_classes=2)
    ghn = make_ghn(TINY['gated'])
    with pytest.warns(UserWarning, match='cannot serve as a donor'):
        report = start_(model, ghn=ghn)
    assert report.origin == 'ghn'
    assert report.considered == tuple(relatives)
    assert 'nearest: test_resnet.r160_in1k (distance 0.10, a download of 2 MB)' in str(report)
    with (
        pytest.warns(UserWarning, match='cannot serve as a donor'),
        pytest.raises(UnsupportedModelError, match='no relative and no GHN'),
    ):
        start_(model, ghn=None)


def test_start_takes_the_donor_and_the_data_decide(relatives):
    donor = trained(Net())
    report = start_(model := Net(12), donor, ghn=make_ghn(TINY['gated']), input_size=8)
    assert report.origin == 'donor:Net'
    assert report.transfer.summary()['resized']['tensors'] > 0
    assert torch.equal(model.head.bias, donor.head.bias)
    decided = start_(Net(12), [donor], batches(), ghn=None, input_size=8, lrs=(1e-3,), steps=2)
    assert decided.origin == decided.race.winner.start == 'donor:Net'
    both = start_(Net(12), [donor, Net()], batches(), ghn=None, input_size=8, lrs=(1e-3,), steps=1)
    assert {one.start for one in both.race.runners} == {OWN, 'donor:Net', 'donor:Net 2'}
    before = snapshot(model)
    with (
        pytest.warns(UserWarning, match='cannot serve as a donor'),
        pytest.warns(UserWarning, match='does not take part'),
    ):
        found = choose_init(model, batches(), ['donor:auto'], lrs=(1e-4,), steps=1, input_size=8)
    assert found.winner.start == OWN
    assert snapshot(model).keys() == before.keys()
