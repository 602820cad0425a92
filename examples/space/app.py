"""A Gradio Space: choose a network of timm and a GHN; see the graph and the plan, download predicted weights."""

from __future__ import annotations

import html
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch

import timm_ghn
from timm_ghn.drawing import draw_graph
from timm_ghn.hub.catalogue import known_ghns
from timm_ghn.publish.files import write_predicted

#: Most parameters of a network whose weights are predicted, and of a GHN: what a free Space has memory for.
MOST_PARAMETERS = 100_000_000
MOST_OF_GHN = 250_000_000

POSTPROCESS = ('auto', 'orth', 'noise', 'none')


def ghns() -> list[str]:
    """The GHNs to choose from, the one inside the package first: it needs no download."""
    small = [name for name, entry in known_ghns().items() if (entry.num_parameters or 0) <= MOST_OF_GHN]
    return sorted(small, key=lambda name: name != 'ghn_tiny')


def inspect(model: str, ghn: str, num_classes: int) -> tuple[str, str, list[list[Any]]]:
    """The graph as a frame with a page, totals, and a row for each parameter. Nothing is computed or downloaded."""
    with torch.device('meta'):
        network = timm.create_model(model, num_classes=int(num_classes))
    config = known_ghns()[ghn].config
    graph = timm_ghn.trace(network, rules=config.rules)
    plan = timm_ghn.plan_parameters(graph, config)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / 'graph.html'
        draw_graph(graph, page, title=f'{model}: {len(graph):,} nodes')
        text = html.escape(page.read_text(encoding='utf-8'), quote=True)
    # Names come from a network: the page runs in a frame that may do nothing else.
    frame = f'<iframe sandbox="allow-scripts" srcdoc="{text}" style="width: 100%; height: 600px; border: 0"></iframe>'
    rows = [[row.name, 'x'.join(map(str, row.shape)), row.role, row.how] for row in plan]
    return frame, plan.totals(), rows


def predict(model: str, ghn: str, num_classes: int, postprocess: str, seed: int) -> str:
    """Predict the weights: the path of a safetensors file that plain timm reads."""
    with torch.device('meta'):
        size = sum(p.numel() for p in timm.create_model(model, num_classes=int(num_classes)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f'{model} has {size:,} parameters; up to {MOST_PARAMETERS:,} are predicted here')
    torch.manual_seed(int(seed))
    network = timm.create_model(model, num_classes=int(num_classes))
    path = Path(tempfile.mkdtemp()) / f'{model}.{ghn}.safetensors'
    recipe = {'architecture': model, 'num_classes': int(num_classes)}
    write_predicted(network, recipe, path, ghn, postprocess=postprocess, seed=int(seed))
    return str(path)


def build() -> Any:
    """The page; gradio is imported here, so that what it calls can be used without it."""
    import gradio as gr

    def shown(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except (timm_ghn.GHNError, RuntimeError, ValueError) as error:
                raise gr.Error(str(error)) from error

        return call

    with gr.Blocks(title='timm_ghn') as page:
        gr.Markdown('# Predict the parameters of a timm network\n\nA start for training, not a trained network.')
        with gr.Row():
            model = gr.Dropdown(timm.list_models(), value='resnet18', label='network of timm')
            ghn = gr.Dropdown(ghns(), value='ghn_tiny', label='GHN')
            classes = gr.Number(10, label='classes', precision=0, minimum=1, maximum=100_000)
        with gr.Row():
            post = gr.Dropdown(POSTPROCESS, value='auto', label='post-processing')
            seed = gr.Number(0, label='seed', precision=0, minimum=0)
        with gr.Row():
            look, make = gr.Button('graph and plan'), gr.Button('predict weights', variant='primary')
        file = gr.File(label='safetensors, for timm.create_model(..., checkpoint_path=...)')
        graph = gr.HTML()
        totals = gr.Code(label='what is predicted')
        plan = gr.Dataframe(headers=['parameter', 'shape', 'role', 'how'], label='plan', wrap=True)
        look.click(shown(inspect), [model, ghn, classes], [graph, totals, plan])
        make.click(shown(predict), [model, ghn, classes, post, seed], file)
    return page


if __name__ == '__main__':
    build().launch()
