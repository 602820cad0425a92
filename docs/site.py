"""What `make docs` puts together: pages from where they lie in the checkout, and a reference of the public names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent

#: Pages, and what they show or link to.
PATTERNS = (
    '*.md', 'CITATION.cff', 'LICENSE', 'docs/*.md', 'docs/*.png', 'docs/*.svg', 'benchmarks/results/**/*',
    'examples/**/*', 'tests/golden/*.md', 'timm_ghn/embedded/*/README.md',
)  # fmt: skip

#: Public names beside those of the package itself, by heading.
MORE = {
    'Pictures': ['timm_ghn.drawing.draw_graph'],
    'Fine-tuning': ['timm_ghn.finetune.loop.finetune', 'timm_ghn.finetune.options.FinetuneOptions'],
    'Training GHNs': [
        'timm_ghn.train.loop.train',
        'timm_ghn.train.options.TrainOptions',
        'timm_ghn.train.evaluate.evaluate',
        'timm_ghn.train.evaluate.EvaluateOptions',
        'timm_ghn.nn.register_gnn',
    ],
    'Analysis': [
        'timm_ghn.analysis.embeddings.graph_embeddings',
        'timm_ghn.analysis.properties.predict_property',
        'timm_ghn.analysis.properties.simple_features',
        'timm_ghn.analysis.search.search',
        'timm_ghn.analysis.search.SearchOptions',
    ],
    'Sums over edges': ['timm_ghn.ops.aggregate', 'timm_ghn.ops.Edges', 'timm_ghn.ops.use_backend'],
}

#: Headings for the names of the package, by the part that they come from.
PARTS = {
    'prediction': 'Prediction',
    'hub': 'GHNs by name',
    'nn': 'GHNs',
    'graph': 'Graphs',
    'transfer': 'Weights from relatives, and the race',
    'publish': 'The Hub',
    'timm_source': 'Tags of timm',
    'errors': 'Errors',
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace mkdocs's own choice, the folder docs, by files under their paths in the checkout."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)}):
        relative = path.relative_to(ROOT).as_posix()
        if path.is_file() and '__pycache__' not in relative:
            files.append(File(relative, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, 'api.md', content=reference()))
    return files


def reference() -> str:
    """A page that asks mkdocstrings for each public name."""
    headings: dict[str, list[str]] = {heading: [] for heading in PARTS.values()}
    for node in ast.parse((ROOT / 'timm_ghn' / '__init__.py').read_text(encoding='utf-8')).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.count('.'):
            part = node.module.split('.')[1]
            if part != 'version':  # a new part needs a heading
                headings[PARTS[part]] += [f'timm_ghn.{alias.name}' for alias in node.names if alias.asname]
    lines = ['# API', '', 'Every public name, from its docstring. `import timm_ghn` loads nothing optional.', '']
    for heading, names in (headings | MORE).items():
        lines += [f'## {heading}', '', *(f'::: {name}\n' for name in names)]
    return '\n'.join(lines)


def on_page_content(html: str, **_: object) -> str:
    """Make links of the names that docstrings mention as Sphinx does."""
    role = r':(?:func|class|meth|mod|data|attr):<code>~?([\w.]+)</code>'
    return re.sub(role, r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
