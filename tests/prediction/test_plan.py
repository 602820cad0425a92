"""The plan has each parameter of a model once, and says for each what becomes of it."""

from __future__ import annotations

import json
import math

import pytest
import timm
import torch
from networks import NETWORKS, SIZE, Case, plain
from tiny import TINY
from torch import nn

from timm_ghn import ParameterPlan, plan_parameters, trace
from timm_ghn.nn.requests import DecodeKind

CONFIG = TINY['graphormer']
HEADS = ('auto', 'predict', 'keep')
TIMM = [*timm.list_models('test_*'), 'deit_tiny_distilled_patch16_224', 'swin_tiny_patch4_window7_224']


def case(name: str) -> Case:
    if name in NETWORKS:
        return NETWORKS[name]()
    with torch.device('meta'):
        return Case(timm.create_model(name), {})


@pytest.mark.parametrize('name', [*NETWORKS, *TIMM])
def test_each_parameter_is_in_the_plan_once(name):
    graph_case = case(name)
    graph = trace(graph_case.model, **graph_case.options)
    names = [info for info, _ in graph_case.model.named_parameters()]
    for head in HEADS:
        plan = plan_parameters(graph, CONFIG, head=head)
        assert [row.name for row in plan] == names
        assert {*plan.predicted, *plan.kept} == set(plan.rows)
        assert len(plan) == len(plan.predicted) + len(plan.kept)
        every = [name for row in plan for name in (row.name, *row.aliases)]
        assert sorted(every) == sorted(name for name, _ in graph_case.model.named_parameters(remove_duplicate=False))
        for row in plan:
            check_row(row, len(graph))
        check_words(plan)
    totals = plan_parameters(graph, CONFIG).summary()
    assert name in NETWORKS or totals['predicted_elements'] > 0.95 * totals['elements']


def check_row(row, nodes: int) -> None:
    assert row.predicted == (row.reason is None) == (row.fit is not None) == (row.node is not None)
    assert row.predicted == (row.role != 'kept')
    if not row.predicted:
        assert row.reason.strip()
        assert row.how == f'kept: {row.reason}'
        return
    assert row.dtype.is_floating_point
    assert 0 <= row.node < nodes
    assert row.request.node == row.node
    assert math.prod(row.request.size) <= row.numel or row.role == 'position'
    assert row.fit.scale is None or row.fit.scale > 0


def check_words(plan: ParameterPlan) -> None:
    """The plan can be read by people and by programs."""
    lines = str(plan).splitlines()
    assert lines[len(plan) + 1 :] == ['', *plan.totals().splitlines()]
    assert all(line.startswith(row.name) and row.how in line for row, line in zip(plan, lines[1:], strict=False))
    read = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert [row['name'] for row in read['rows']] == [row.name for row in plan]
    assert [row['reason'] for row in read['rows']] == [row.reason for row in plan]
    totals = read['summary']
    for what in ('tensors', 'elements'):
        assert totals[what] == totals[f'predicted_{what}'] + sum(kept[what] for kept in totals['kept'].values())


@pytest.mark.parametrize(
    ('classes', 'head', 'predicted', 'reason'),
    [
        (1000, 'auto', True, None),
        (10, 'auto', False, 'head for 10 classes, the GHN was trained with 1000'),
        (10, 'predict', True, None),
        (10, 'keep', False, 'head kept on request'),
        (2000, 'predict', True, None),
    ],
)
def test_the_head_is_predicted_where_its_classes_are_those_of_the_ghn(classes, head, predicted, reason):
    rows = {row.name: row for row in plan_parameters(trace(plain(classes), input_size=SIZE), CONFIG, head=head)}
    for name, kind in (('head.weight', DecodeKind.HEAD_WEIGHT), ('head.bias', DecodeKind.HEAD_BIAS)):
        assert rows[name].predicted is predicted
        assert rows[name].reason == reason
        assert not predicted or rows[name].request.kind is kind
    assert all(row.predicted for name, row in rows.items() if not name.startswith('head'))


@pytest.mark.parametrize('head', HEADS)
def test_a_network_without_classes_has_no_head_to_keep(head):
    with torch.device('meta'):
        graph = trace(timm.create_model('resnet18', num_classes=0))
    plan = plan_parameters(graph, CONFIG, head=head)
    assert not plan.kept
    assert not {DecodeKind.HEAD_WEIGHT, DecodeKind.HEAD_BIAS} & {row.request.kind for row in plan}


def test_roles_are_what_parameters_are_for():
    with torch.device('meta'):
        graph = trace(timm.create_model('test_vit'))
    roles = {row.name: row.role for row in plan_parameters(graph, CONFIG)}
    assert roles.items() >= {
        'cls_token': 'kept', 'pos_embed': 'position', 'patch_embed.proj.weight': 'weight',
        'blocks.0.attn.qkv.weight': 'weight', 'patch_embed.proj.bias': 'bias', 'blocks.0.norm1.weight': 'norm weight',
        'blocks.0.norm1.bias': 'norm bias', 'head.weight': 'head weight', 'head.bias': 'head bias',
    }.items()  # fmt: skip


def test_what_the_published_rules_leave_out_is_kept_for_that_reason():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 10, 1))
    plan = plan_parameters(trace(model, input_size=SIZE, rules='published'), CONFIG, head='predict')
    assert {row.name: row.reason for row in plan.kept} == {
        f'1.{key}': f'GroupNorm.{key} is left out by the published rules' for key in ('weight', 'bias')
    }
    assert plan.summary()['rules'] == 'published'


def test_what_cannot_be_predicted_is_kept_and_says_why():
    found = NETWORKS['direct']()
    rows = {row.name: row for row in plan_parameters(trace(found.model, **found.options), CONFIG)}
    kept = {name for name, row in rows.items() if not row.predicted}
    assert kept == {'scale', 'cls_token', 'empty', 'unused', 'counts'}
    assert rows['empty'].reason == 'has no elements'
    assert rows['counts'].reason == 'not of a floating-point type'
    assert rows['unused'].reason == 'not used in the forward pass'
