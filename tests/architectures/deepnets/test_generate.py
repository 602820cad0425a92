from __future__ import annotations

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest
import torch

from timm_ghn import ghn_init, trace
from timm_ghn.architectures.deepnets.generate import OPS, POOLS, SPLITS, candidate, draw_config, generate
from timm_ghn.architectures.deepnets.isomorphism import is_isomorphic, wl_hash
from timm_ghn.architectures.deepnets.network import Genotype, NetworkConfig
from timm_ghn.architectures.deepnets.records import NetRecord
from timm_ghn.architectures.samplers import build_sampler
from timm_ghn.errors import ConfigError, DataError

PLAIN = NetworkConfig(Genotype((('conv_1x1', 0), ('msa', 1)), (2,), (('skip_connect', 0), ('cse', 1)), (2,)), 4, C=8)


def drawn(split: str, count: int) -> list[NetworkConfig]:
    rng = np.random.default_rng(0)
    return [config for config in (draw_config(rng, split) for _ in range(count)) if config is not None]


@pytest.mark.parametrize('split', SPLITS)
def test_draws_stay_within_the_published_ranges_and_reach_their_ends(split):
    ranges, configs = SPLITS[split], drawn(split, 2000)
    fewest, most, medium = ranges.steps
    cells = [config.n_cells for config in configs]
    steps = [len(config.genotype.normal) // 2 for config in configs]
    assert (min(cells), max(cells)) == ranges.cells
    assert (min(steps), max(steps)) == (fewest, most)
    assert all(s <= medium for s, n in zip(steps, cells, strict=True) if n > max(ranges.depths))
    assert {config.norm for config in configs} <= {None, 'bnorm'}
    assert ({config.norm for config in configs} == {None}) == (ranges.norm == 'none')
    for config in configs:
        assert config.preproc or (config.genotype.normal_concat == (2,) and config.C_mult == 1)
        assert config.glob_avg or not config.genotype.is_vit
        assert config.genotype.normal_concat[-1] == 1 + len(config.genotype.normal) // 2


def test_probabilities_are_those_published():
    configs = drawn('train', 6000)
    multi = [config for config in configs if len(config.genotype.normal) > 2]
    assert {op for config in configs for op in config.genotype.ops} == set(OPS)
    assert np.mean([{op for op, _ in c.genotype.reduce} <= set(POOLS) for c in multi]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([c.stem_pool for c in configs if c.stem_type == 0]) == pytest.approx(0.5, abs=0.05)
    shallow = [c for c in configs if c.n_cells <= 7 and not c.genotype.is_vit]
    assert np.mean([c.glob_avg for c in shallow]) == pytest.approx(0.9, abs=0.04)
    small = [c for c in configs if c.n_cells <= 5 and len(c.genotype.normal) <= 4]
    assert np.mean([c.norm is None for c in small]) == pytest.approx(0.5, abs=0.08)


def test_an_interrupted_run_is_continued_with_the_same_result(tmp_path):
    pytest.importorskip('datasets')
    from timm_ghn.architectures.deepnets.store import open_nets

    whole, cut = tmp_path / 'whole.arrow', tmp_path / 'cut.arrow'
    generate(whole, 'val', 4, seed=3)
    nets = open_nets(whole, 'val')
    numbered = ((number, candidate('val', 3, number)) for number in itertools.count())
    number, first = next((number, record) for number, record in numbered if record is not None)
    lines = [json.dumps({'split': 'val', 'seed': 3}), json.dumps([number, first.to_dict()]), '[7, {"conf']
    partial = tmp_path / 'cut.arrow.partial'
    partial.write_text('\n'.join(lines))
    with pytest.raises(ConfigError, match='was begun with'):
        generate(cut, 'val', 4, seed=4)
    generate(cut, 'val', 4, seed=3)
    assert not partial.exists()
    assert cut.read_bytes() == whole.read_bytes()
    assert nets[0] == first
    assert len({wl_hash(record) for record in nets}) == 4


@pytest.mark.slow
def test_processes_change_nothing(tmp_path):
    one, two = tmp_path / 'one.arrow', tmp_path / 'two.arrow'
    generate(one, 'test', 6)
    generate(two, 'test', 6, workers=2)
    assert one.read_bytes() == two.read_bytes()


def test_damaged_files_give_clear_errors(tmp_path):
    pytest.importorskip('datasets')
    from timm_ghn.architectures.deepnets.store import open_nets, write_records

    with pytest.raises(FileNotFoundError):
        open_nets(tmp_path / 'none.arrow')
    damaged = tmp_path / 'damaged.arrow'
    damaged.write_bytes(b'ARROW1' + bytes(100))
    with pytest.raises(DataError, match='damaged'):
        open_nets(damaged)
    write_records(damaged, [('train', small_record())])
    with pytest.raises(ConfigError, match='has the splits train'):
        open_nets(damaged, 'test')
    pytest.importorskip('h5py')
    bad = tmp_path / 'bad.hdf5'
    bad.write_bytes(bytes(100))
    with pytest.raises(FileNotFoundError, match='bad_meta.json'):
        open_nets(bad, 'train')
    meta = {'nets': [dataclasses.asdict(PLAIN)], 'meta': {'primitives_ext': {}, 'unique_op_names': {}}}
    (tmp_path / 'bad_meta.json').write_text(json.dumps({'train': meta}))
    with pytest.raises(DataError, match='expected an HDF5 file'):
        open_nets(bad)[0]


def small_record() -> NetRecord:
    primitives = ('input', 'conv', 'bn', 'conv', 'bn', 'sum')
    edges = ((0, 1), (0, 3), (1, 2), (2, 5), (3, 4), (4, 5))
    return NetRecord(PLAIN, {'cifar10': 1, 'imagenet': 2}, primitives, (0,) * 6, primitives, edges)


def test_isomorphism_looks_at_edges_and_primitives_but_not_at_the_order():
    record = small_record()
    primitives = ('input', 'conv', 'conv', 'bn', 'bn', 'sum')
    turned = dataclasses.replace(
        record, primitives=primitives, names=primitives, edges=((0, 1), (0, 2), (1, 4), (2, 3), (3, 5), (4, 5))
    )
    other = dataclasses.replace(record, edges=((0, 1), (0, 3), (1, 2), (2, 5), (3, 4), (1, 4)))
    assert wl_hash(record) == wl_hash(turned)
    assert is_isomorphic(record, turned)
    assert not is_isomorphic(record, other)


def test_graphs_with_one_hash_are_compared_exactly():
    """Two hexagons and a ring of twelve: refinement of colours cannot tell them apart."""

    def rings(length: int) -> NetRecord:
        # Sources 0-5 and sinks 6-11, each source with two sinks.
        edges = sorted(
            (ring + i, 6 + ring + j)
            for ring in range(0, 6, length)
            for i in range(length)
            for j in (i, (i + 1) % length)
        )
        return NetRecord(PLAIN, {}, ('sum',) * 12, (0,) * 12, ('sum',) * 12, tuple(edges))

    assert wl_hash(rings(3)) == wl_hash(rings(6))
    assert not is_isomorphic(rings(3), rings(6))
    assert is_isomorphic(rings(3), rings(3))


def test_the_sampler_draws_by_seed_or_from_a_file(tmp_path, ghn):
    sampler = build_sampler('deepnets', {'channels': 8, 'parameters': 500_000, 'num_classes': 7})
    first, again = (sampler.sample(np.random.default_rng(5)) for _ in range(2))
    assert first == again == pickle.loads(pickle.dumps(first))
    assert first.family == 'deepnets'
    model = first.build('cpu')
    ghn_init(model, ghn)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    pytest.importorskip('datasets')
    from timm_ghn.architectures.deepnets.store import write_records

    file = tmp_path / 'nets.arrow'
    write_records(file, [('train', small_record())])
    sampler = build_sampler('deepnets', {'file': str(file), 'channels': 16})
    options = sampler.sample(np.random.default_rng(0)).options
    assert (options['C'], options['normal']) == (16, PLAIN.genotype.normal)


@pytest.mark.parametrize('size', [32, 224])
@pytest.mark.parametrize('stem_type', [0, 1])
def test_flattened_maps_have_the_size_that_the_classifier_expects(size, stem_type):
    genotype = Genotype((('conv_1x1', 0), ('conv_3x3', 1)), (2,), (('skip_connect', 0), ('dil_conv_5x5', 1)), (2,))
    config = NetworkConfig(genotype, 4, C=8, stem_type=stem_type, preproc=False, glob_avg=False)
    model = build_sampler('deepnets', {'channels': 8, 'image_size': size}).architecture(config).build()
    assert len(trace(model)) > 10


def test_wrong_networks_are_refused():
    with pytest.raises(ConfigError, match='before their use'):
        Genotype((('conv_1x1', 2), ('msa', 0)), (2,), (('cse', 0), ('msa', 0)), (2,))
    with pytest.raises(ConfigError, match='preproc'):
        dataclasses.replace(PLAIN, preproc=False, C_mult=2)


def test_the_command_generates_describes_and_converts(tmp_path, call_cli):
    pytest.importorskip('h5py')
    pytest.importorskip('datasets')
    file, official = tmp_path / 'nets.arrow', tmp_path / 'nets.hdf5'
    assert call_cli(f'deepnets generate --split bnfree --num 2 -o {file}')[0] == 0
    code, table, _ = call_cli(f'deepnets stats {file}')
    assert code == 0
    assert '2 networks of bnfree' in table
    assert '4-18' in table
    assert call_cli(f'deepnets convert {file} {official}')[:2] == (0, f'{official}: 2 networks\n')
    assert json.loads(call_cli(f'deepnets stats {official} --json')[1])[0]['name'] == 'cells'
    assert call_cli(f'deepnets stats {tmp_path}/none.arrow')[0] == 2
