"""The timm source, with a stand-in for GHNs that draws each parameter from its name.

timm's own tests hold with and without this package. They come in its source distribution, and run from its folder::

    pip download timm==$(python -c 'import timm; print(timm.__version__)') --no-binary timm --no-deps
    python -m pytest tests/test_factory.py tests/test_hub.py tests/test_model_input.py tests/test_models.py
    python -m pytest -p timm_ghn tests/...  # the same files
"""

import copy
import dataclasses
import json
import re
import sys
import types
import zlib
from pathlib import Path

import pytest
import timm
import timm.data
import torch
from timm.models import _factory, _registry
from torch import nn

from timm_ghn import timm_source as source
from timm_ghn.files import crc32_of

NAMED = 'ghn-of-the-catalogue'
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
CONTAINERS = [path.rpartition('.')[2] for path in source.PRIVATE if path.startswith('timm.models._registry.')]


@dataclasses.dataclass(frozen=True)
class FakeOrigin:
    name: str
    repo_id: str | None = 'someone/some-ghn'
    revision: str | None = '0123abc'
    file: str | None = '/home/someone/ghn.pt'
    embedded: bool = False


class FakeHub:
    """Stands in for ``shared_ghn``, ``known_ghns`` and ``initialise``, and records what is asked of them."""

    def __init__(self):
        self.loaded = []
        self.inputs = []
        self.error = None

    def shared_ghn(self, name, *, cache_dir=None):
        self.loaded.append((name, cache_dir))
        if self.error is not None:
            raise self.error
        config = types.SimpleNamespace(mean=MEAN, std=STD, num_classes=1000, name=None, postprocess='orth')
        return types.SimpleNamespace(config=config, origin=FakeOrigin('some-ghn' if name == 'ghn' else name))

    def initialise(self, model, ghn, *, input_size=None, seed=0):
        self.inputs.append(input_size)
        cfg = getattr(model, 'pretrained_cfg', {})
        kept = cfg.get('classifier') if getattr(model, 'num_classes', 1000) != ghn.config.num_classes else None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not (kept and name.startswith(kept)):
                    parameter.copy_(predicted(name, parameter))
        return None, {'ghn': ghn.origin.name, 'origin': dataclasses.asdict(ghn.origin)}


def predicted(name, parameter):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(parameter.shape, generator=generator)


def is_predicted(model, *, but=''):
    """Whether each parameter is the predicted one; but those that start with ``but``, which must not be."""
    return all(
        torch.equal(parameter, predicted(name, parameter).to(parameter)) != bool(but and name.startswith(but))
        for name, parameter in model.named_parameters()
    )


def notes(model):
    return dict(note.split(': ', 1) for note in model.pretrained_cfg['notes'])


def registry():
    """Copies of the containers of timm's registry that the source touches."""
    copies = {name: copy.copy(getattr(_registry, name)) for name in CONTAINERS}
    return copies | {'_model_with_tags': {name: list(tags) for name, tags in _registry._model_with_tags.items()}}


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    fake = FakeHub()
    for name, content in {
        'timm_ghn.hub.catalogue': {'known_ghns': lambda: {NAMED: None}},
        'timm_ghn.hub.load': {'shared_ghn': fake.shared_ghn},
        'timm_ghn.prediction.predict': {'initialise': fake.initialise},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    source.enable_timm_tags()
    yield fake
    source.enable_timm_tags()


@pytest.fixture
def user_module(monkeypatch):
    """A module of a user's, whose architectures are forgotten afterwards."""
    module = types.ModuleType('users_own_models')
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    source.disable_timm_tags()
    for name in getattr(module, '__all__', ()):
        for tagged in (name, *_registry._model_with_tags.pop(name, ())):
            _registry._model_pretrained_cfgs.pop(tagged, None)
            _registry._model_has_pretrained.discard(tagged)
        for container in (_registry._model_entrypoints, _registry._model_default_cfgs, _registry._model_to_module):
            container.pop(name, None)
    _registry._module_to_models.pop(module.__name__, None)


def add_architecture(module, name):
    """Register an architecture that does not use timm's builder."""

    def entrypoint(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        assert not pretrained
        return nn.Sequential(nn.Conv2d(kwargs.get('in_chans', 3), 4, 3), nn.ReLU())

    entrypoint.__name__, entrypoint.__module__ = name, module.__name__
    return timm.models.register_model(entrypoint)


class TestRequest:
    REQUESTS = (
        ('test_resnet.ghn', None),
        ('test_resnet', 'ghn'),
        ('test_resnet', {'tag': 'ghn', 'classifier': 'fc', 'num_classes': 1000}),
        ('test_resnet', timm.models.PretrainedCfg(tag='ghn', classifier='fc')),
        ('test_resnet.r160_in1k', 'ghn'),
    )

    @pytest.mark.parametrize(('name', 'cfg'), REQUESTS)
    def test_naming_the_tag_is_the_request(self, hub, name, cfg):
        for said in ({}, {'pretrained': True}):
            model = timm.create_model(name, pretrained_cfg=cfg, **said)
            assert is_predicted(model)
            assert model.training
            assert str(model) == str(timm.create_model('test_resnet'))
        assert hub.loaded == [('ghn', None)] * 2

    @pytest.mark.parametrize(('name', 'cfg'), [*REQUESTS[:3], (f'test_resnet.{NAMED}', None)])
    def test_pretrained_false_takes_the_request_back(self, hub, name, cfg):
        torch.manual_seed(0)
        model = timm.create_model(name, False, pretrained_cfg=cfg)
        torch.manual_seed(0)
        plain = timm.create_model('test_resnet')
        assert all(torch.equal(plain.state_dict()[key], value) for key, value in model.state_dict().items())
        assert model.num_classes == plain.num_classes
        if cfg is None:
            assert model.pretrained_cfg == plain.pretrained_cfg
        assert timm.create_model(name, pretrained=False, features_only=True).feature_info.channels()
        assert not hub.loaded

    def test_name_of_the_catalogue_is_a_tag_of_that_ghn(self, hub):
        model = timm.create_model(f'test_resnet.{NAMED}', cache_dir='somewhere')
        assert is_predicted(model)
        assert hub.loaded == [(NAMED, 'somewhere')]
        assert model.pretrained_cfg['tag'] == notes(model)['ghn'] == NAMED

    @pytest.mark.parametrize('cfg', [None, 'r160_in1k', {'tag': 'mine', 'num_classes': 7}, timm.models.PretrainedCfg()])
    def test_other_requests_are_timms(self, hub, cfg):
        model = timm.create_model('test_resnet', pretrained_cfg=cfg)
        source.disable_timm_tags()
        assert model.pretrained_cfg == timm.create_model('test_resnet', pretrained_cfg=cfg).pretrained_cfg
        assert not hub.loaded
        assert not is_predicted(model)

    def test_weights_that_a_cfg_brings_win_over_its_tag(self, hub, tmp_path):
        torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'weights.pth')
        here = {'file': str(tmp_path / 'weights.pth')}
        for request in (
            {'pretrained_cfg': {'tag': 'ghn', 'num_classes': 1000, 'classifier': 'fc'} | here},
            {'pretrained_cfg': 'ghn', 'pretrained_cfg_overlay': here},
        ):
            model = timm.create_model('test_resnet', pretrained=True, **request)
            loaded = torch.load(tmp_path / 'weights.pth')
            assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
        assert 'tag' not in model.pretrained_cfg
        assert not hub.loaded

    def test_unknown_tag_is_refused_by_timm(self):
        with pytest.raises(RuntimeError, match=r'Invalid pretrained tag \(ghn-of-nobody\)'):
            timm.create_model('test_resnet.ghn-of-nobody')
        with pytest.raises(RuntimeError, match='Unknown model'):
            timm.create_model('no_such_architecture.ghn')

    def test_deprecated_names_still_map(self, hub):
        with pytest.warns(UserWarning, match='Mapping deprecated model name'):
            plain = timm.create_model('vit_tiny_patch16_224_in21k')
        assert plain.pretrained_cfg['tag'] == 'augreg_in21k'
        assert not hub.loaded
        with pytest.warns(UserWarning, match='Mapping deprecated model name'):
            model = timm.create_model('vit_tiny_patch16_224_in21k.ghn')
        assert model.num_classes == plain.num_classes
        assert model.pretrained_cfg['architecture'] == 'vit_tiny_patch16_224'
        assert is_predicted(model, but='head.')


class TestArguments:
    def test_num_classes_other_than_the_ghns_keep_the_head(self):
        model = timm.create_model('test_resnet.ghn', num_classes=7)
        assert model.get_classifier().weight.shape[0] == 7
        assert is_predicted(model, but='fc.')
        assert isinstance(timm.create_model('test_resnet.ghn', num_classes=0).get_classifier(), nn.Identity)

    def test_in_chans_and_img_size_are_predicted_for(self, hub):
        model = timm.create_model('test_vit.ghn', in_chans=1, img_size=96)
        assert hub.inputs == [(1, 96, 96)]
        assert model(torch.zeros(1, 1, 96, 96)).shape == (1, 1000)
        timm.create_model('test_vit.ghn', img_size=(64, 96))
        timm.create_model('test_vit.ghn')
        assert hub.inputs[1:] == [(3, 64, 96), (3, 160, 160)]
        assert is_predicted(model)

    @pytest.mark.parametrize(
        ('name', 'arguments'),
        [
            ('test_resnet', {'out_indices': (1, 3), 'in_chans': 1, 'pretrained': True}),
            ('test_resnet', {'feature_cls': 'getter'}),
            ('test_vit', {'img_size': 96, 'out_indices': [-1]}),
        ],
    )
    def test_features_are_those_of_the_whole_model(self, name, arguments):
        extractor = timm.create_model(f'{name}.ghn', features_only=True, **arguments)
        whole = {key: value for key, value in arguments.items() if key in ('in_chans', 'img_size')}
        known = {tensor.numpy().tobytes() for tensor in timm.create_model(f'{name}.ghn', **whole).state_dict().values()}
        plain = timm.create_model(name, features_only=True, **{**arguments, 'pretrained': False})
        assert extractor.feature_info.channels() == plain.feature_info.channels()
        assert extractor.state_dict().keys() == plain.state_dict().keys()
        assert extractor.pretrained_cfg['tag'] == 'ghn'
        assert not {'state_dict', 'num_classes', 'classifier'} & extractor.pretrained_cfg.keys()
        assert all(parameter.detach().numpy().tobytes() in known for parameter in extractor.parameters())

    def test_overlay_wins(self, hub):
        overlay = {'mean': (0.5, 0.5, 0.5), 'input_size': (3, 96, 96), 'crop_pct': 1.0}
        model = timm.create_model('test_vit.ghn', pretrained_cfg_overlay=overlay)
        assert {key: model.pretrained_cfg[key] for key in overlay} == overlay
        assert model.pretrained_cfg['std'] == STD
        assert hub.inputs == [(3, 96, 96)]
        assert model.patch_embed.img_size == (96, 96)

    def test_checkpoint_is_loaded_last_and_plain_timm_reads_ours(self, tmp_path):
        model = timm.create_model('test_resnet.ghn')
        nn.init.constant_(model.fc.bias, 3.0)
        torch.save(model.state_dict(), tmp_path / 'trained.pth')
        assert timm.create_model('test_resnet.ghn', checkpoint_path=tmp_path / 'trained.pth').fc.bias.eq(3).all()
        source.disable_timm_tags()
        plain = timm.create_model('test_resnet', checkpoint_path=tmp_path / 'trained.pth')
        assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.state_dict().items())


class TestTruth:
    def test_cfg_names_the_ghn_and_no_weights_file(self):
        model = timm.create_model('test_resnet.ghn')
        cfg = model.pretrained_cfg
        assert (cfg['tag'], cfg['architecture'], cfg['source']) == ('ghn', 'test_resnet', 'ghn')
        said = json.loads(notes(model)['provenance'])
        assert notes(model)['ghn'] == said['ghn'] == 'some-ghn'
        assert said['weights'] == crc32_of(model.state_dict())
        assert said['origin'] == dataclasses.asdict(FakeOrigin('some-ghn', file='ghn.pt'))
        assert 'some-ghn' in cfg['description']
        assert (cfg['num_classes'], cfg['classifier'], cfg['first_conv']) == (1000, 'fc', 'conv1.0')
        assert cfg['input_size'] == timm.get_pretrained_cfg('test_resnet').input_size
        assert not {'url', 'file', 'hf_hub_id', 'license', 'origin_url', 'state_dict'} & cfg.keys()
        assert model.default_cfg is cfg
        assert is_predicted(timm.create_model('test_resnet', pretrained_cfg=cfg)), 'asks for another like it'
        data = timm.data.resolve_model_data_config(model)
        assert (data['mean'], data['std']) == (MEAN, STD)


class TestListing:
    def test_answers_of_timm_do_not_change(self):
        def answers():
            names = timm.list_models()
            return {
                'models': names,
                'tagged': timm.list_models(include_tags=True),
                'of a module': timm.list_models('*18*', module='resnet', include_tags=True),
                'list_pretrained': timm.list_pretrained(),
                'of an architecture': timm.list_pretrained('resnet50'),
                'weights by cfg': timm.list_models(pretrained=True, name_matches_cfg=True),
                'pretrained': [timm.is_model_pretrained(name) for name in names],
                'cfgs': [(timm.get_pretrained_cfg(name), timm.models.get_arch_pretrained_cfgs(name)) for name in names],
            }

        with_ghns = answers()
        source.disable_timm_tags()
        assert answers() == with_ghns

    def test_a_tag_of_every_architecture_is_known_though_not_listed(self):
        assert all(timm.is_model_pretrained(f'{name}.ghn') for name in timm.list_models())
        assert timm.is_model_pretrained(f'resnet50.{NAMED}')
        for unknown in ('resnet50.ghn-of-nobody', 'no_such_architecture.ghn', 'ghn', '', None):
            assert not timm.is_model_pretrained(unknown)
        assert timm.list_pretrained('*.ghn') == timm.list_models('resnet50.ghn', pretrained=True) == []

    def test_cfg_of_a_tag_claims_no_weights(self):
        for name in timm.list_models():
            cfg = timm.get_pretrained_cfg(f'{name}.ghn')
            assert not cfg.has_weights
            assert cfg.tag == 'ghn'
            assert cfg.architecture == name
            assert cfg.classifier == timm.get_pretrained_cfg(name).classifier
        assert timm.get_pretrained_cfg(f'resnet50.{NAMED}').tag == NAMED
        with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
            timm.get_pretrained_cfg('resnet50.ghn-of-nobody')


class TestUsersArchitectures:
    def test_architecture_without_cfgs(self, hub, user_module):
        source.disable_timm_tags()
        source.enable_timm_tags()
        add_architecture(user_module, 'users_net')
        model = timm.create_model('users_net.ghn', pretrained=True)
        assert is_predicted(model)
        assert model.pretrained_cfg['tag'] == 'ghn'
        assert model.pretrained_cfg['architecture'] == 'users_net'
        assert timm.is_model_pretrained('users_net.ghn')
        assert not timm.is_model_pretrained('users_net')
        assert timm.get_pretrained_cfg('users_net') is None
        timm.create_model('users_net', pretrained_cfg='ghn', in_chans=2)
        assert hub.inputs == [None, (2, 224, 224)]
        assert not is_predicted(timm.create_model('users_net'))

    def test_tag_of_that_name_of_the_users_own_is_left_alone(self, hub, user_module):
        user_module.default_cfgs = timm.models.generate_default_cfgs(
            {'users_net.ghn': {'url': 'https://example.org/w'}}
        )
        add_architecture(user_module, 'users_net')
        assert not is_predicted(timm.create_model('users_net.ghn'))
        assert not hub.loaded
        source.disable_timm_tags()
        assert timm.list_pretrained('users_net*') == ['users_net.ghn']


class TestRegistration:
    def test_reversible_and_idempotent(self):
        source.disable_timm_tags()
        before, entrypoint = registry(), _factory.model_entrypoint
        objects = {name: getattr(_registry, name) for name in CONTAINERS}
        assert entrypoint is timm.model_entrypoint
        source.enable_timm_tags()
        once, hooked = registry(), _factory.model_entrypoint
        source.enable_timm_tags()
        assert registry() == once
        assert _factory.model_entrypoint is hooked is not entrypoint
        source.disable_timm_tags()
        source.disable_timm_tags()
        assert registry() == before
        assert _factory.model_entrypoint is entrypoint
        assert all(getattr(_registry, name) is value for name, value in objects.items())
        assert timm.create_model.__defaults__[0] is False
        with pytest.raises(RuntimeError, match=r'Invalid pretrained tag \(ghn\)'):
            timm.create_model('test_resnet.ghn')
        source.enable_timm_tags()
        assert registry() == once
        assert is_predicted(timm.create_model('test_resnet.ghn'))

    def test_patch_of_another_package_on_top_survives(self, hub):
        ours = _factory.model_entrypoint

        def theirs(*args, **kwargs):
            return ours(*args, **kwargs)

        _factory.model_entrypoint = theirs
        try:
            source.disable_timm_tags()
            assert _factory.model_entrypoint is theirs
            assert not is_predicted(timm.create_model('test_resnet'))
            source.enable_timm_tags()
            assert is_predicted(timm.create_model('test_resnet.ghn'))
            assert len(hub.loaded) == 1
            source.disable_timm_tags()
            assert _factory.model_entrypoint is theirs
        finally:
            _factory.model_entrypoint = timm.model_entrypoint

    def test_another_timm_is_left_alone_with_a_warning(self, monkeypatch):
        source.disable_timm_tags()
        before = registry()
        with monkeypatch.context() as other_timm:
            other_timm.setattr(_registry, '_model_has_pretrained', [])
            with pytest.warns(RuntimeWarning, match=re.escape(timm.__version__) + r'.*_model_has_pretrained.*ghn_init'):
                source.enable_timm_tags()
            other_timm.undo()
            other_timm.setattr(_factory.create_model, '__defaults__', (True, *timm.create_model.__defaults__[1:]))
            with pytest.warns(RuntimeWarning, match=r'timm\.create_model\(model_name, pretrained=False\)'):
                source.enable_timm_tags()
        assert registry() == before
        assert _factory.model_entrypoint is timm.model_entrypoint


class TestPrivateSurface:
    def test_each_private_name_is_there(self):
        source.disable_timm_tags()
        assert source._missing() == [], f'timm {timm.__version__} has other internals: adapt timm_source.py'

    def test_no_other_private_name_is_used(self):
        package = Path(source.__file__).parent
        used = re.findall(r'\btimm(?:\.\w+)*\._(?!_)[\w.]+', Path(source.__file__).read_text(encoding='utf-8'))
        assert sorted(used) == sorted(source.PRIVATE)
        private = re.compile(r'(?:from|import) timm(?:\.\w+)*(?:\._|(?:\.\w+)* import _)|\btimm\.(?:\w+\.)*_')
        others = [
            str(path.relative_to(package))
            for path in package.rglob('*.py')
            if path.name != 'timm_source.py' and private.search(path.read_text(encoding='utf-8'))
        ]
        assert not others, f"these use timm's private names, which is left to timm_source.py: {others}"
