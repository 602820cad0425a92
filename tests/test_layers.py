"""The package's layout: imports go one way, and nothing optional or heavy is loaded unasked."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'timm_ghn'
#: A part imports itself and the parts before it.
ORDER = (
    'version', 'errors', 'contexts', 'files', 'graph', 'ops', 'nn', 'hub',
    'prediction', 'plots', 'drawing', 'timm_source', 'runs', 'architectures', 'publish', 'transfer', 'data',
    'finetune', 'train', 'analysis', 'cli',
)  # fmt: skip
#: Names the public parts for users; nobody inside imports it.
FACADE = ('__init__', '__main__')
MODULES = sorted(PACKAGE.rglob('*.py'))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def part_of(module: str) -> str:
    """`timm_ghn.graph.trace` -> `graph`; the package itself -> `__init__`."""
    parts = module.split('.')
    return parts[1] if len(parts) > 1 else '__init__'


def own_modules() -> set[str]:
    return {module_name(path) for path in MODULES}


def imports(tree: ast.AST, *, module: str, is_package: bool) -> Iterator[str]:
    """Full names of what the nodes of a tree import; `from p import q` gives p.q where that is a module of ours."""
    known = own_modules()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parents = module.split('.')
                parents = parents[: len(parents) - node.level + is_package]
                base = '.'.join([*parents, base] if base else parents)
            for alias in node.names:
                full = f'{base}.{alias.name}'
                yield full if full in known else base


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding='utf-8'))
    if top_level_only:
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return set(imports(tree, module=module_name(path), is_package=path.name == '__init__.py'))


def is_ours(module: str) -> bool:
    return module.split('.')[0] == PACKAGE.name


@pytest.mark.parametrize('path', MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_only_from_the_parts_above(path):
    part = part_of(module_name(path))
    if path.stem == '__main__' or (path.parent == PACKAGE and path.stem in FACADE):
        return
    assert part in ORDER, f'{part} has no place in the order: {ORDER}'
    allowed = ORDER[: ORDER.index(part) + 1]
    wrong = sorted(name for name in imports_of(path) if is_ours(name) and part_of(name) not in allowed)
    assert not wrong, f'{module_name(path)} is above {wrong}'


def test_no_module_imports_itself_in_a_circle():
    graph = {
        module_name(path): {name for name in imports_of(path, top_level_only=True) if is_ours(name)} for path in MODULES
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, ' -> '.join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ('from timm_ghn.graph import paths', {'timm_ghn.graph.paths'}),
        ('from timm_ghn.errors import GHNError', {'timm_ghn.errors'}),
        ('from . import graph', {'timm_ghn.graph.graph'}),
        ('from ..errors import GHNError', {'timm_ghn.errors'}),
        ('def f():\n    import timm_ghn.graph.graph', {'timm_ghn.graph.graph'}),
        ('from timm_ghn import anything', {'timm_ghn'}),
    ],
)
def test_the_reader_of_imports_sees_every_form(source, expected):
    assert set(imports(ast.parse(source), module='timm_ghn.graph.paths', is_package=False)) == expected


def test_third_party_imports_are_declared():
    declared = {'huggingface_hub', 'numpy', 'safetensors', 'timm', 'torch', 'torchvision', 'tqdm'}
    optional = {
        'PIL',
        'accelerate',
        'datasets',
        'fast_sugiyama',
        'h5py',
        'matplotlib',
        'pyarrow',
        'scipy',
        'shtab',
        'sklearn',
    }
    optional |= {'torch_scatter', 'triton', 'yaml'}
    found = {name.split('.')[0] for path in MODULES for name in imports_of(path)}
    foreign = found - set(sys.stdlib_module_names) - {PACKAGE.name}
    assert foreign <= declared | optional
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    called = {'PIL': 'pillow', 'sklearn': 'scikit-learn', 'yaml': 'pyyaml'}
    named = {called.get(name, name) for name in declared | optional - {'pyarrow', 'scipy', 'triton'}}  # of others
    missing = [name for name in named if not re.search(rf'["\']{name.replace("_", "-")}>=', project)]
    assert not missing, f'pyproject.toml does not name {missing}'


def test_importing_the_package_loads_no_optional_package():
    code = (
        'import sys, timm; before = set(sys.modules); import timm_ghn; '
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(ast.literal_eval(run.stdout))
    assert 'timm_ghn' in loaded
    assert not loaded & {
        'torch_scatter',
        'triton',
        'accelerate',
        'datasets',
        'h5py',
        'joblib',
        'matplotlib',
        'sklearn',
    }
