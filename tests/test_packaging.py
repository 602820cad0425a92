"""What is shipped: the metadata, the files in the wheel, and the words of the README and the pages."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import timm_ghn
from timm_ghn.hub.catalogue import EMBEDDED, known_ghns

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = {path.stem: path.read_text(encoding='utf-8') for path in sorted((ROOT / 'docs').glob('*.md'))}
#: Folder and name of the pages beside them.
OTHERS = (('', 'CONTRIBUTING.md'), ('', 'CHANGELOG.md'), ('examples', 'README.md'), ('examples/space', 'README.md'))
BLOCKS = [
    pytest.param(code, id=f'{name}-{number}')
    for name, text in {'README': README, **PAGES}.items()
    for number, code in enumerate(re.findall(r'^```python\n(.*?)^```', text, flags=re.MULTILINE | re.DOTALL))
]


def test_one_version():
    assert importlib.metadata.version('timm-ghn') == timm_ghn.__version__
    changelog = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(r'^## (\S+)', changelog, flags=re.MULTILINE).group(1) == timm_ghn.__version__


def test_the_command_is_declared():
    (command,) = importlib.metadata.entry_points(group='console_scripts', name='timm-ghn')
    assert command.value == 'timm_ghn_command:main'


def test_the_files_of_the_package_are_found():
    entries = known_ghns()
    assert {path.stem for path in (ROOT / 'hub_configs').glob('*.json')} == set(entries)
    files = sorted(path.name for path in entries[EMBEDDED].place.iterdir())
    assert files == ['README.md', 'config.json', 'model.safetensors']


def test_the_readme_begins_with_a_short_example():
    assert len(README.splitlines()) <= 150
    start = README.index('```python')
    assert README.count('\n', 0, start) < 12
    assert README.count('\n', start, README.index('```', start + 3)) < 16


def test_links_of_the_readme_and_the_pages_lead_somewhere():
    more = [(ROOT / folder, (ROOT / folder / name).read_text(encoding='utf-8')) for folder, name in OTHERS]
    for folder, text in ((ROOT, README), *((ROOT / 'docs', page) for page in PAGES.values()), *more):
        for link in re.findall(r'\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)', text):
            assert not link or (folder / link).exists(), link


@pytest.mark.parametrize('code', BLOCKS)
def test_the_readme_runs(code, tmp_path):
    # Its own process, where importing the package and choosing a default are new; nothing is downloaded.
    environment = {**os.environ, 'TIMM_GHN_DEFAULT': EMBEDDED}
    subprocess.run([sys.executable, '-W', 'error', '-c', code], cwd=tmp_path, env=environment, check=True)


def test_the_readme_names_what_exists():
    named = re.findall(r'^\| `(\w+)\(', PAGES['reference'], flags=re.MULTILINE)
    assert named
    assert not [name for name in named if not callable(getattr(timm_ghn, name, None))]
    text = README + PAGES['reference']
    ghns = set(re.findall(r'(?<!recipes/)(?:\bghn\d\w*_\w+|\bghn_tiny\w*)', text)) - {'ghn3_results'}
    assert ghns
    assert ghns <= set(known_ghns())


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert citation['version'] == timm_ghn.__version__
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys(), 'what the format requires'
    assert all(paper['url'] in README for paper in citation['references'])


def test_every_page_is_on_the_site():
    site = (ROOT / 'mkdocs.yml').read_text(encoding='utf-8')
    others = ('README.md', 'examples/README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'api.md')
    pages = sorted([*(f'docs/{page}.md' for page in PAGES), *others])
    assert sorted(re.findall(r': (\S+\.md)$', site, flags=re.MULTILINE)) == pages


def test_the_workflow_runs_what_is_run_here():
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text(encoding='utf-8'))
    commands = [step['run'] for job in workflow['jobs'].values() for step in job['steps'] if 'run' in step]
    assert commands == ['.ci/run', 'make test']
    versions = set(workflow['jobs']['test']['strategy']['matrix']['python'])
    versions |= {workflow['jobs']['all']['steps'][1]['with']['python-version']}
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    assert versions == set(re.findall(r"Python :: (3\.\d+)'", project))
