"""The package's layout: imports go one way, and nothing optional or heavy is loaded unasked."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

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
PATHS = sorted(PACKAGE.rglob('*.py'))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(path): ast.parse(path.read_text(encoding='utf-8')) for path in PATHS}


def imports(module: str, *, top_level_only: bool = False) -> set[str]:
    """Full names of what a module imports; `from p import q` gives p.q where that is a module of ours."""
    found = set()
    for node in MODULES[module].body if top_level_only else ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{module} imports by a relative name'
            found |= {
                full if (full := f'{node.module}.{alias.name}') in MODULES else node.module for alias in node.names
            }
    return found


def part_of(module: str) -> str:
    """`timm_ghn.graph.trace` -> `graph`; the package itself -> `__init__`."""
    return [*module.split('.'), '__init__'][1]


def test_imports_only_from_the_parts_above():
    for module in MODULES:
        part = part_of(module)
        if part in FACADE or module.endswith('__main__'):
            continue
        assert part in ORDER, f'{part} has no place in the order: {ORDER}'
        allowed = ORDER[: ORDER.index(part) + 1]
        ours = (name for name in imports(module) if name.split('.')[0] == PACKAGE.name)
        wrong = sorted(name for name in ours if part_of(name) not in allowed)
        assert not wrong, f'{module} is above {wrong}'


def test_no_module_imports_itself_in_a_circle():
    graphlib.TopologicalSorter({module: imports(module, top_level_only=True) for module in MODULES}).prepare()


def test_the_reader_of_imports_sees_them():
    assert {'torch', 'timm_ghn.graph.graph'} <= imports('timm_ghn.graph.build')
    assert 'triton' in imports('timm_ghn.ops.fused')
    assert 'timm_ghn.ops.fused' in imports('timm_ghn.ops.backends') - imports(
        'timm_ghn.ops.backends', top_level_only=True
    )


def test_third_party_imports_are_declared():
    declared = {'huggingface_hub', 'numpy', 'safetensors', 'timm', 'torch', 'torchvision', 'tqdm'}
    optional = {'PIL', 'accelerate', 'datasets', 'fast_sugiyama', 'h5py', 'matplotlib', 'networkx', 'pyarrow', 'scipy'}
    optional |= {'shtab', 'sklearn', 'torch_scatter', 'triton', 'yaml'}
    found = {name.split('.')[0] for module in MODULES for name in imports(module)}
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
    optional = {'torch_scatter', 'triton', 'accelerate', 'datasets', 'h5py', 'joblib', 'matplotlib', 'sklearn'}
    assert not loaded & optional
