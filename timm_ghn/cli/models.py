"""The commands about one timm model: ``timm-ghn predict`` and ``timm-ghn inspect``."""

from __future__ import annotations

import argparse
import json
from typing import Any

import timm
from torch import nn
from tqdm import tqdm

from timm_ghn.architectures.timm_models import build_timm_model, check_model_name, check_side
from timm_ghn.cli.tables import diversity_table
from timm_ghn.errors import ConfigError, printable
from timm_ghn.files import check_output
from timm_ghn.graph.build import trace
from timm_ghn.hub.load import load_ghn
from timm_ghn.prediction.diversity import compare
from timm_ghn.prediction.plan import plan_parameters
from timm_ghn.prediction.postprocess import PostProcess, layers
from timm_ghn.prediction.predict import predict
from timm_ghn.publish.files import write_predicted


def run_predict(args: argparse.Namespace) -> int:
    """Predict the weights of a timm model and write them with those that are kept, raw unless asked otherwise."""
    check_output(args.output)
    model = _build_model(args)
    recipe = {'architecture': args.model, **_model_args(args)}
    options = {'input_size': _input_size(args, model), 'head': args.head, 'seed': args.seed, 'device': args.device}
    plan, facts = write_predicted(model, recipe, args.output, args.ghn, postprocess=args.postprocess, **options)
    if args.json:
        print(json.dumps({'file': str(args.output), **recipe, 'provenance': facts}, indent=2))
        return 0
    print(plan.totals())
    done = 'none: as predicted; --postprocess auto makes it the start for training that the GHN recommends'
    if facts['postprocess']:
        done = PostProcess(**facts['postprocess']).describe()
    print(f'\npost-processing: {done}')
    given = ''.join(f', {name}={value}' for name, value in _model_args(args).items())
    print(f"\n{args.output} is read by\n  timm.create_model('{args.model}'{given}, checkpoint_path='{args.output}')")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print the plan of a timm model and draw its graph, or do so with the diversity of what is predicted for it."""
    if args.diversity:
        return _inspect_diversity(args)
    if args.plot:
        from timm_ghn.drawing import check_picture, draw_graph

        check_picture(args.plot)
    elif args.virtual_edges > 1:
        raise ConfigError('--virtual-edges says what --plot draws: give it a file')
    model = _build_model(args)
    ghn = load_ghn(args.ghn)
    graph = trace(model, input_size=_input_size(args, model), rules=ghn.config.rules)
    plan = plan_parameters(graph, ghn.config, head=args.head)
    if args.plot:
        title = f'{args.model}: {len(graph):,} nodes, {len(graph.edges_E2):,} edges'
        draw_graph(graph, args.plot, title=title, virtual_edges=args.virtual_edges)
    facts = {'architecture': args.model, **_model_args(args), 'ghn': ghn.config.name}
    print(json.dumps({**facts, **plan.to_dict()}, indent=2) if args.json else plan)
    return 0


def _inspect_diversity(args: argparse.Namespace) -> int:
    """Print, and draw, how different the channels are: predicted, post-processed and random."""
    if args.plot:
        from timm_ghn.plots import SUFFIXES, draw  # needs matplotlib

        check_output(args.plot, SUFFIXES)
    model = _build_model(args)
    ghn = load_ghn(args.ghn)
    options = PostProcess.of(args.postprocess, seed=args.seed, auto=ghn.config.postprocess)
    prediction = predict(model, ghn, input_size=_input_size(args, model), head=args.head, seed=args.seed)
    plan = prediction.plan
    found = compare(prediction.state_dict, dict(model.named_parameters()), plan, options)
    comparisons = list(tqdm(found, desc='measuring', unit='layer', total=len(layers(plan)), disable=None))
    if args.plot:
        how = options.describe() if options else 'none'
        name = printable(ghn.config.name or args.ghn)
        draw(comparisons, args.plot, title=f'{args.model}, {name}; post-processing: {how}')
    if args.json:
        facts = {'architecture': args.model, **_model_args(args), 'ghn': ghn.config.name}
        facts['postprocess'] = options.to_dict() if options else None
        print(json.dumps({**facts, 'diversity': [comparison.to_dict() for comparison in comparisons]}, indent=2))
    else:
        print('\n'.join(diversity_table(comparisons)))
    return 0


def _build_model(args: argparse.Namespace) -> nn.Module:
    """The timm model of the command line, initialised by timm with ``--seed``."""
    check_model_name(args.model)  # before timm is asked what its configuration says
    check_side(args.img_size)
    return build_timm_model(args.model, _model_args(args), seed=args.seed)


def _model_args(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``create_model`` beside the name. Only models of a fixed image size get the size."""
    cfg = timm.get_pretrained_cfg(args.model)
    size = args.img_size if cfg is not None and cfg.fixed_input_size else None
    given = {'num_classes': args.num_classes, 'in_chans': args.in_chans, 'img_size': size}
    return {name: value for name, value in given.items() if value is not None}


def _input_size(args: argparse.Namespace, model: nn.Module) -> tuple[int, int, int] | None:
    """Size of the image to trace with; None leaves it to the model's own metadata."""
    if args.in_chans is None and args.img_size is None:
        return None
    cfg: Any = model.pretrained_cfg
    channels, height, width = cfg['input_size']
    return (args.in_chans or channels, args.img_size or height, args.img_size or width)
