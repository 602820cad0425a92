"""Nothing that is read is executed: no source of ours unpickles, evaluates or imports what a file says."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).resolve().parent.parent / 'timm_ghn'
SOURCES = sorted(PACKAGE.rglob('*.py'))

#: Modules whose use is to bring code or arbitrary objects to life. pickletools only describes.
MODULES = {'pickle', '_pickle', 'cPickle', 'joblib', 'dill', 'cloudpickle', 'marshal', 'shelve', 'runpy', 'code'}
#: Functions that execute what they are given, by the ends of their names.
CALLS = {
    'eval', 'exec', '__import__', 'os.system', 'os.popen', 'yaml.load', 'yaml.full_load', 'yaml.unsafe_load',
    'yaml.load_all', 'torch.hub.load', 'torch.jit.load', 'torch.package', 'pd.read_pickle', 'pandas.read_pickle',
    # accelerate unpickles what is registered for it without weights_only.
    'register_for_checkpointing',
}  # fmt: skip
#: Keywords that allow it, and the value that does.
KEYWORDS = {'trust_remote_code': True, 'allow_pickle': True, 'weights_only': False, 'shell': True}
#: Calls that unpickle unless they are told otherwise, and what tells them.
UNLESS = {'torch.load': 'weights_only'}
#: The one reader of pickles, which keeps Python's machine and cuts down its table of instructions.
READER = 'hub/pickles.py'
#: Where a module whose name is not written in the call is imported; the names are constants of these files.
IMPORTERS = {PACKAGE / path for path in ('cli/main.py', 'cli/runs.py', 'ops/backends.py', 'timm_source.py')}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name; a question mark stands for anything else."""
    if isinstance(node, ast.Attribute):
        return f'{dotted(node.value)}.{node.attr}'
    return node.id if isinstance(node, ast.Name) else '?'


def dangers(tree: ast.AST) -> Iterator[str]:
    """What may execute something that a file says."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {alias.asname or alias.name: f'{node.module}.{alias.name}' for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or '']
            yield from (f'import {name}' for name in names if name.split('.')[0] in MODULES)
        if isinstance(node, ast.Call):
            first, _, rest = dotted(node.func).partition('.')
            name = '.'.join(filter(None, [aliases.get(first, first), rest]))
            if any(name == call or name.endswith(f'.{call}') for call in CALLS - {'eval', 'exec'}):
                yield name
            if name in ('eval', 'exec', 'builtins.eval', 'builtins.exec'):
                yield name
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            for key, value in given.items():
                if key in KEYWORDS and not (isinstance(value, ast.Constant) and value.value is not KEYWORDS[key]):
                    yield f'{name}({key}=...)'
            if name in UNLESS and UNLESS[name] not in given:
                yield f'{name} without {UNLESS[name]}'
            if name.endswith('import_module') and not isinstance(node.args[0], ast.Constant):
                yield 'import_module'


def test_no_source_executes_what_it_reads():
    for path in SOURCES:
        found = set(dangers(ast.parse(path.read_text(encoding='utf-8'))))
        allowed = {'import_module'} if path in IMPORTERS else {'import pickle'} if path == PACKAGE / READER else set()
        assert found <= allowed, path


def test_the_reader_of_pickles_replaces_what_could_execute():
    from timm_ghn.hub.pickles import _Unpickler

    for name in ('find_class', 'persistent_load', 'load_build'):
        assert name in vars(_Unpickler)
    instances = (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID)
    assert not {code[0] for code in instances} & _Unpickler.dispatch.keys()
    source = (PACKAGE / READER).read_text(encoding='utf-8')
    assert not any(f'pickle.{name}' in source for name in ('load(', 'loads(', 'Unpickler('))


def test_the_walk_sees_it():
    for code in (
        'from joblib import load',
        'from torch import load as read\nread(f)',
        'import torch\ntorch.load(f, weights_only=careful)',
        'import numpy as np\nnp.load(f, allow_pickle=True)',
        'from yaml import unsafe_load\nunsafe_load(f)',
        'exec(text)',
        'import os\nos.system(text)',
        'accelerator.register_for_checkpointing(x)',
        'import importlib\nimportlib.import_module(text)',
    ):
        assert list(dangers(ast.parse(code))), code
    for code in (
        'import torch\ntorch.load(f, weights_only=True)',
        'model.eval()',
        "import importlib\nimportlib.import_module('timm')",
    ):
        assert not list(dangers(ast.parse(code))), code


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_accelerate_does_not_execute_a_checkpoint(tmp_path):
    # checkpoints.py leaves reading to Accelerator.load_state, which reads torch's files of tensors and numbers only.
    accelerate = pytest.importorskip('accelerate')
    marker = tmp_path / 'executed'
    model = torch.nn.Linear(2, 2)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.save_state(str(tmp_path / 'state'))
    torch.save({'state': Payload(marker)}, tmp_path / 'state' / 'optimizer.bin')
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # the payload works
    marker.unlink()
    with pytest.raises(pickle.UnpicklingError, match='[Ww]eights.only'):
        accelerator.load_state(str(tmp_path / 'state'))
    assert not marker.exists()
    accelerator.free_memory()
