"""Value training: which nodes, what targets, the two packings' equality, and a training that a kill cannot spoil."""

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train_value_model
from tests.models_for_tests import CONFIGS, VOCAB, WINDOWED, value_model
from utils import training_output
from utils.cached_models import without_adapter
from utils.checkpoint import Checkpoint
from utils.errors import DataError, UsageError
from utils.fit_measures import (
    correlation,
    correlation_gain,
    errors_within,
    explainable_variance,
    explained_variance,
    target_noise,
)
from utils.hdf5_utils import consolidate, read_trees, write_structure, write_tree
from utils.head_starts import BETWEEN, RIDGES, fit_ridges, start_at_mean, start_at_ridge
from utils.node_values import head_weight, predict, read_states
from utils.optimization import linear_schedule
from utils.specs import LoraSpec, TrainingSpec
from utils.tree_examples import Example, make_examples, node_targets, training_nodes, validation_nodes
from utils.tree_layouts import collate, lay_out, make_units, passes, unit_tokens
from utils.trees import Tree, back_up
from utils.value_training import add_gradients, milestones, plan_epoch, share, train

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers

ROOT = Path(train_value_model.__file__).resolve().parent
SPEC = TrainingSpec(num_epochs=2, batch_size=8, lr=3e-3, warmup_steps=2, packing="tree", deepest_fraction=1.0, seed=3)


def make_tree(index: int, children=(3, 2), prompt: int = 4, segment: int = 5, labelled: bool = True) -> Tree:
    """A random tree to learn from: a branch of the root has low or high tokens, the reward is their mean."""
    vocab = VOCAB
    rng = np.random.default_rng([11, index])
    parent, tokens, level = [-1], [rng.integers(3, vocab, prompt + index % 3)], [0]
    half, high = (vocab - 3) // 2, [False]
    for width in children:
        below = []
        for node in level:
            for _ in range(width):
                below.append(len(parent))
                parent.append(node)
                high.append(high[node] if node else bool(rng.integers(2)))
                tokens.append(rng.integers(0, half, rng.integers(1, segment + 1)) + 3 + half * high[-1])
        level = below
    log_ratio = np.r_[0.0, rng.normal(size=len(parent) - 1)]
    tokens = [t.astype(np.int32) for t in tokens]
    tree = Tree(np.array(parent), tokens, log_ratio, prompt=f"prompt {index}", prompt_index=index)
    if not labelled:
        return tree
    rewards = np.zeros(len(tree))
    for leaf in tree.leaves:
        rewards[leaf] = tree.response_tokens(leaf).mean() * 4 / vocab - 2
    return tree.labelled("help", rewards)


def examples(n: int = 6, choose=lambda t: training_nodes(t, 1.0, 0), start: int = 0, **kwargs) -> list[Example]:
    return make_examples([make_tree(start + i, **kwargs) for i in range(n)], "help", choose)


def lora(model, r: int = 4, dropout: float = 0.0):
    """The model under a PEFT adapter that is not zero, so that every part of it has a gradient."""
    from peft import LoraConfig, get_peft_model

    names = {n.rsplit(".", 1)[-1] for n, _ in model.named_modules()}
    target = sorted(names & {*LoraSpec(1, 1).target_modules, "c_attn", "query_key_value"})
    spec = LoraConfig(task_type="SEQ_CLS", r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=target,
                      modules_to_save=["score"], fan_in_fan_out="c_attn" in names)  # fmt: skip
    model = get_peft_model(model, spec)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.05 if "lora_B" in name else 0.2, generator=generator)
    return model


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


# ------------------------------------------------------------------------------------------------- measures of a fit


def test_explained_variance_of_perfect_constant_and_shifted_predictions():
    targets = np.array([1.0, 2.0, 4.0, 7.0])
    assert explained_variance(targets, targets) == 1.0
    assert explained_variance(targets, np.full(4, 3.0)) == 0.0
    assert explained_variance(targets, targets + 5) == pytest.approx(1.0)
    assert explained_variance(targets, 2 * targets) == pytest.approx(0.0)
    assert math.isnan(explained_variance(np.ones(3), np.arange(3.0)))
    assert math.isnan(explained_variance([], []))


def some_prompts(rng, prompts=60):
    """Targets, predictions and worse predictions at 8 nodes of each prompt; prompts differ in how far they agree."""
    groups = np.repeat(np.arange(prompts), 8)
    level, scale = rng.normal(size=prompts)[groups], rng.uniform(0.2, 2.0, prompts)[groups]
    signal = rng.normal(size=len(groups))
    targets = level + signal + scale * rng.normal(size=len(groups))
    return targets, level + signal, -level + signal + rng.normal(size=len(groups)), groups


def test_errors_within_prompts_are_the_spread_of_new_prompts():
    """A bootstrap's error against that of 400 fresh samples; each is off by a few percent, 25 % is four of that."""
    rng = np.random.default_rng(0)
    samples = [some_prompts(rng) for _ in range(400)]
    measured = [(explained_variance(t, p, g), correlation(t, p, g)) for t, p, _, g in samples]
    claimed = np.mean([errors_within(t, p, g) for t, p, _, g in samples[:40]], axis=0)
    np.testing.assert_allclose(claimed, np.std(measured, axis=0), rtol=0.25)
    assert all(math.isnan(e) for e in errors_within([1.0, 2.0], [1.0, 2.0], [0, 0]))


@pytest.mark.filterwarnings("error")
def test_what_does_not_vary_has_no_error_and_no_warning():
    targets, groups = np.arange(8.0), np.repeat([0, 1], 4)
    explained, related = errors_within(targets, np.zeros(8), groups)
    assert explained == 0 and math.isnan(related)
    assert math.isnan(correlation_gain(targets, np.zeros(8), targets, groups)["low"])


def test_the_gain_of_correlation_is_paired_and_its_interval_covers():
    """95 % of the intervals have the gain of a large sample; of 200, four standard errors of that are 6 %."""
    rng = np.random.default_rng(1)
    t, better, worse, g = some_prompts(rng, prompts=20_000)
    truth = correlation(t, better, g) - correlation(t, worse, g)
    found = [correlation_gain(*some_prompts(rng)) for _ in range(200)]
    assert 0.89 < np.mean([gain["low"] <= truth <= gain["high"] for gain in found]) <= 1
    t, better, worse, g = some_prompts(rng)
    gain = correlation_gain(t, better, worse, g)
    assert gain["difference"] == pytest.approx(correlation(t, better, g) - correlation(t, worse, g))
    same = correlation_gain(t, better, 3 * better + 1, g)
    assert same["difference"] == pytest.approx(0) == pytest.approx(same["low"]) == pytest.approx(same["high"])


def test_explained_variance_within_groups_ignores_what_lies_between_them():
    groups = ["a", "a", "b", "b"]
    targets = np.array([0.0, 1.0, 10.0, 11.0])
    between = np.array([0.5, 0.5, 10.5, 10.5])
    assert explained_variance(targets, between) > 0.99
    assert explained_variance(targets, between, groups) == 0.0
    assert explained_variance(targets, targets + np.array([7, 7, -3, -3]), groups) == pytest.approx(1.0)
    assert correlation(targets, -targets, groups) == pytest.approx(-1.0)
    assert correlation(targets, np.array([0.0, 2.0, 5.0, 7.0]), groups) == pytest.approx(1.0)
    assert math.isnan(correlation(targets, between, groups))


def test_the_explainable_variance_is_what_a_model_reaches_that_knows_the_true_values():
    """10,000 nodes of 4 children with noise 1 around true values of variance 1: 0.8, to a standard error of 0.01."""
    rng = np.random.default_rng(0)
    parent = np.r_[-1, np.zeros(5, int), np.repeat(np.arange(1, 6), 4)]
    targets, truth, noise, groups = [], [], [], []
    for index in range(2000):
        true = rng.normal(size=5)
        leaves = np.repeat(true, 4) + rng.normal(size=20)
        values = back_up(parent, np.r_[np.zeros(6), leaves])
        tree = Tree(parent, [np.array([3], np.int32)] * 26, np.zeros(26), {"help": values})
        nodes = validation_nodes(tree)
        assert nodes.tolist() == [1, 2, 3, 4, 5]
        targets += values[nodes].tolist()
        truth += true.tolist()
        noise += target_noise(tree, values, nodes).tolist()
        groups += [index] * 5
    ceiling = explainable_variance(targets, np.array(noise), groups)
    assert ceiling == pytest.approx(0.8, abs=0.02)
    assert explained_variance(targets, truth, groups) == pytest.approx(ceiling, abs=0.02)
    assert math.isnan(target_noise(tree, values - np.arange(26), [1])[0])  # a soft value is not its children's mean


# ------------------------------------------------------------------------------------------------------ nodes, targets


def test_targets_are_soft_values_and_the_penalty_counts_the_future_only():
    tree = Tree(
        parent=np.array([-1, 0, 1, 1]), tokens=[np.array([3], np.int32)] * 4, log_ratio=np.array([0.0, 10.0, 1.0, 3.0]),
        values={"help": np.array([5.0, 5.0, 4.0, 6.0])},
    )  # fmt: skip
    assert node_targets(tree, "help").tolist() == [5, 5, 4, 6]
    assert node_targets(tree, "help", 0.5).tolist() == [5 - 6, 5 - 1, 4, 6]
    assert node_targets(tree, "help", 0.5, "whole").tolist() == [-1, -1, 4 - 5.5, 6 - 6.5]


def test_the_deepest_level_is_each_trees_own_and_half_of_it_is_left_out():
    deep, shallow = make_tree(0, children=(2, 2, 2)), make_tree(1, children=(4,))
    for tree, deepest in ((deep, 8), (shallow, 4)):
        nodes = training_nodes(tree, 0.5, seed=0)
        chosen_depth = tree.depth[nodes]
        assert (chosen_depth == tree.depth.max()).sum() == deepest // 2
        assert len(nodes) == len(tree) - 1 - deepest // 2 and 0 not in nodes
    assert len(training_nodes(deep, 1.0, 0)) == len(deep) - 1
    assert (deep.depth[training_nodes(deep, 0.0, 0)] < 3).all()


def test_the_chosen_nodes_depend_on_seed_and_prompt_alone():
    tree = make_tree(0, children=(3, 3, 3))
    same = [training_nodes(tree, 0.5, seed=1).tolist() for _ in range(2)]
    other_seed = training_nodes(tree, 0.5, seed=2).tolist()
    other_prompt = training_nodes(dataclasses.replace(tree, prompt_index=9), 0.5, seed=1).tolist()
    assert same[0] == same[1] and same[0] != other_seed and same[0] != other_prompt


def test_validation_reads_inner_nodes_only_and_empty_segments_are_never_read():
    tree = make_tree(0, children=(3, 2))
    nodes = validation_nodes(tree)
    assert set(nodes) == set(range(1, len(tree))) - set(tree.leaves)
    tree.tokens[nodes[0]] = np.zeros(0, np.int32)
    assert nodes[0] not in validation_nodes(tree) and nodes[0] not in training_nodes(tree, 1.0, 0)


def test_unlabelled_trees_name_the_command_that_labels_them():
    message = r"no values of 'help' \(found: none\).*label_tree.py data help"
    with pytest.raises(DataError, match=message):
        make_examples([make_tree(0, labelled=False)], "help", validation_nodes, data_dir="data")
    with pytest.raises(DataError, match=r"token \d+, the value model knows 10 tokens"):
        make_examples([make_tree(0)], "help", validation_nodes, vocab_size=10)


# ------------------------------------------------------------------------------------------------- layouts and packings


def test_in_a_trees_row_each_token_sees_its_own_path_and_nothing_else():
    example = examples(1, children=(3, 2, 2))[0]
    tree, layout = example.tree, lay_out(example, example.nodes)
    owner = np.concatenate([np.full(len(tree.tokens[n]), n) for n in example.preorder])
    mask = collate([layout]).inputs["attention_mask"][0, 0] == 0
    for i in range(len(owner)):
        ancestors = tree.path(owner[i])
        for j in range(len(owner)):
            assert mask[i, j] == (j <= i and owner[j] in ancestors)
    for node, last in zip(example.nodes, layout.places, strict=True):
        seen = mask[last].numpy().nonzero()[0]
        assert layout.tokens[seen].tolist() == tree.path_tokens(node).tolist()
        assert layout.positions[seen].tolist() == list(range(len(seen)))


def plain_values(model, tree: Tree, node: int) -> list[torch.Tensor]:
    """The value at each token of a node's segment, by one plain call on its path."""
    path = torch.tensor(tree.path_tokens(node)[None].astype(np.int64))
    state = model(input_ids=path, output_hidden_states=True).hidden_states[-1][0]
    scores, start = model.get_base_model().score(state)[:, 0], len(tree.tokens[0])
    places = range(len(scores) - len(tree.tokens[node]), len(scores))
    return [scores[i] if model.config.value_pooling == "last" else scores[start : i + 1].mean() for i in places]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("name", "pooling"), [*((n, "last") for n in sorted(CONFIGS)), ("llama_full", "mean"), ("gpt2", "mean")]
)
def test_both_packings_give_the_loss_and_gradients_of_one_plain_call_per_path(name, pooling, dense):
    model = lora(value_model(name, dtype=torch.float32, pooling=pooling))
    data = examples(3)
    total = sum(len(x.nodes) for x in data)

    losses = []
    for x in data:
        for node in x.nodes:
            values = plain_values(model, x.tree, node)
            values = values if dense else values[-1:]
            losses += [(value - x.targets[node]) ** 2 / len(values) for value in values]
    plain = sum(losses) / total
    plain.backward()
    expected = gradients(model)
    assert expected.abs().max() > 1e-3

    for packing in ("node", "tree"):
        for max_tokens in (10_000, 60):  # in one pass, in many
            model.zero_grad()
            units = make_units(data, packing, 1000)
            loss = add_gradients(model, data, units, total, dense=dense, max_tokens=max_tokens)
            assert float(loss) == pytest.approx(plain.item(), rel=1e-5)
            assert torch.allclose(gradients(model), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_predictions_are_in_the_nodes_order_whatever_the_packing_the_pass_and_the_process():
    model, data = value_model("llama_grouped_tied"), examples(5)
    paths = [torch.tensor(x.tree.path_tokens(n)[None].astype(np.int64)) for x in data for n in x.nodes]
    expected = [model(input_ids=path).logits.item() for path in paths]
    for packing in ("node", "tree"):
        for max_tokens in (10_000, 70):
            assert np.allclose(predict(model, data, packing=packing, max_tokens=max_tokens), expected, atol=1e-6)
        halves = [predict(model, data, packing=packing, max_tokens=70, rank=r, world=2) for r in range(2)]
        assert np.allclose(halves[0] + halves[1], expected, atol=1e-6)
        assert all((h == 0).any() for h in halves)


def test_a_tree_larger_than_a_batch_is_cut_and_its_parts_read_what_they_need():
    model = lora(value_model("llama_full"))
    data = examples(1, children=(4, 3, 2))
    units = make_units(data, "tree", batch_size=8)
    assert len(units) == 5 and np.concatenate([n for _, n in units]).tolist() == data[0].nodes.tolist()
    total = len(data[0].nodes)
    add_gradients(model, data, make_units(data, "tree", 1000), total)
    whole = gradients(model)
    model.zero_grad()
    for unit in units:
        add_gradients(model, data, [unit], total)
    assert torch.allclose(gradients(model), whole, atol=1e-8)
    assert max(unit_tokens(data[0], n) for _, n in units) < unit_tokens(data[0], data[0].nodes)


def test_a_tree_has_fewer_tokens_than_its_paths():
    example = examples(1, children=(4, 2, 2))[0]
    assert unit_tokens(example, example.nodes) == sum(len(t) for t in example.tree.tokens)
    assert unit_tokens(example, example.nodes) < example.path_lengths[example.nodes].sum() / 2


def test_passes_are_within_their_tokens_and_hold_each_layout_once():
    layouts = [lay_out(x, x.nodes) for x in examples(9, children=(3,))]
    groups = passes(layouts, max_tokens=60)
    assert sorted(i for g in groups for i in g) == list(range(9))
    assert all(len(g) == 1 or len(g) * max(len(layouts[i].tokens) for i in g) <= 60 for g in groups)


# ------------------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("packing", ["node", "tree"])
@pytest.mark.parametrize("batch_size", [4, 9, 30])
def test_an_epoch_reads_every_node_once_in_steps_of_about_the_batch(packing, batch_size):
    data = examples(40)
    units = make_units(data, packing, batch_size)
    lengths = np.array([unit_tokens(data[i], n) for i, n in units])
    steps = plan_epoch(units, lengths, packing, batch_size, seed=0, epoch=0)
    assert sorted(u for step in steps for u in step) == list(range(len(units)))
    sizes = np.array([sum(len(units[u][1]) for u in step) for step in steps])
    assert abs(sizes[:-1].mean() / batch_size - 1) < 0.2, sizes
    assert steps == plan_epoch(units, lengths, packing, batch_size, seed=0, epoch=0)
    assert steps != plan_epoch(units, lengths, packing, batch_size, seed=0, epoch=1)


@pytest.mark.parametrize("world", [1, 2, 3, 40])
def test_processes_share_a_steps_nodes_without_loss_or_overlap(world):
    step = make_units(examples(3), "tree", 1000)
    parts = [share(step, rank, world) for rank in range(world)]
    assert [(i, n) for p in parts for i, nodes in p for n in nodes] == [(i, n) for i, nodes in step for n in nodes]
    sizes = [sum(len(n) for _, n in p) for p in parts]
    assert max(sizes) - min(sizes) <= 1


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [linear_schedule(s, 10, 3) for s in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[9] == pytest.approx(1 / 7)
    assert linear_schedule(0, 10, 0) == 1.0
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))


# --------------------------------------------------------------------------------------------------------- training


def trained(folder, packing="tree", dropout=0.0, log=lambda row: None, **changes):
    folder.mkdir(exist_ok=True)
    model = lora(value_model("llama_grouped_tied", dtype=torch.float32), dropout=dropout)
    torch.nn.init.zeros_(model.get_base_model().score.weight)  # as `new_value_model` starts
    spec = dataclasses.replace(SPEC, packing=packing, **changes)
    metrics = train(model, examples(24), examples(8, validation_nodes, start=100), spec, folder, log=log)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]), metrics


def test_a_new_head_predicts_the_targets_mean_and_stays_zero_for_a_mean_of_zero():
    model, data = lora(value_model("llama_grouped_tied", dtype=torch.float32)), examples(12)
    torch.nn.init.zeros_(model.get_base_model().score.weight)
    mean = np.concatenate([x.targets[x.nodes] for x in data]).mean()
    centred = [dataclasses.replace(x, targets=x.targets - mean) for x in data]
    start_at_mean(model, centred)
    assert predict(model, data).abs().max() < 1e-4
    start_at_mean(model, [dataclasses.replace(x, targets=x.targets + 30) for x in data], max_trees=12)
    assert predict(model, data).mean().item() == pytest.approx(30 + mean, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def log_of(folder):
    with open(folder / "training_log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def started_at_ridge(model, data, **how) -> float:
    """Start a model's head so; returns the penalty."""
    [ridge] = fit_ridges(model, [data], **how)
    start_at_ridge(model, ridge)
    return ridge.penalty


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_ridge_start_is_the_regression_that_explicit_rows_give(pooling, dense):
    """From one plain call per path; a second fit from another head is drawn towards that head."""
    model, data = lora(value_model("llama_full", pooling=pooling)), examples(12)
    head = model.get_base_model().score.weight
    rows, targets, groups, weights = [], [], [], []
    for group, x in enumerate(data):
        for node in x.nodes:
            path = torch.tensor(x.tree.path_tokens(node)[None].astype(np.int64))
            state = model(input_ids=path, output_hidden_states=True).hidden_states[-1][0].detach()
            start, length = len(x.tree.tokens[0]), len(x.tree.tokens[node]) if dense else 1
            for end in range(len(state) - length + 1, len(state) + 1):
                rows.append((state[end - 1] if pooling == "last" else state[start:end].mean(0)).numpy())
                targets.append(x.targets[node])
                groups.append(group)
                weights.append(1 / length)
    x, targets, groups, weights = map(np.array, (rows, targets, groups, weights))

    def within_and_mean(a):
        """Each row's difference from its group's mean, and that mean, times the root of the row's weight."""
        root = np.sqrt(weights).reshape(-1, *[1] * (a.ndim - 1))
        means = np.array([np.average(a[groups == g], axis=0, weights=weights[groups == g]) for g in groups])
        return root * (a - means), root * means

    def fit(kept, ridge, y):
        (xw, xm), (yw, ym) = within_and_mean(x), within_and_mean(y)
        root = math.sqrt(BETWEEN)
        a = np.concatenate([xw[kept], root * xm[kept]])
        b = np.concatenate([yw[kept], root * ym[kept]])
        unit = (np.square(xw).sum() + BETWEEN * np.square(xm).sum()) / x.shape[1]
        return np.linalg.solve(a.T @ a + ridge * unit * np.eye(x.shape[1]), a.T @ b)

    for start in (np.zeros(x.shape[1]), np.linspace(-1, 1, x.shape[1])):
        with torch.no_grad():
            head.copy_(torch.tensor(start)[None])
        y = targets - x @ start
        errors = []
        for ridge in RIDGES:
            left = [
                within_and_mean(y - x @ fit(groups % 5 != fold, ridge, y))[0][groups % 5 == fold] for fold in range(5)
            ]
            errors.append(sum(np.square(e).sum() for e in left))
        chosen = started_at_ridge(model, data, dense=dense)
        assert chosen == RIDGES[int(np.argmin(errors))]
        expected = start + fit(groups >= 0, chosen, y)
        assert np.allclose(head.detach().numpy()[0], expected, atol=1e-6 * abs(expected).max())
    assert correlation(targets, x @ expected, groups) > 0.5


def test_ridge_regressions_of_several_objectives_are_those_of_each_to_the_last_bit():
    """Also from a head that is there; the pass is one, its moments with each objective's targets are apart."""
    model, data = lora(value_model("llama_full", pooling="mean")), examples(12)
    other = [dataclasses.replace(x, targets=np.sin(40 * x.targets)) for x in data]
    together = fit_ridges(model, [data, other, data])
    for found, alone in zip(together, (data, other, data), strict=True):
        [expected] = fit_ridges(model, [alone])
        assert torch.equal(found.step, expected.step) and found.penalty == expected.penalty
    assert not torch.allclose(together[0].step, together[1].step)
    with pytest.raises(AssertionError):
        fit_ridges(model, [data, examples(12, validation_nodes)])


@pytest.mark.parametrize("standardize", [False, True])
def test_a_ridge_start_without_epochs_is_the_model_and_its_error_is_reported(tmp_path, standardize):
    spec = dataclasses.replace(SPEC, num_epochs=0, head_start="ridge", standardize=standardize)
    model, data, held_out = lora(value_model("llama_full", pooling="mean")), examples(12), examples(4, start=50)
    with torch.no_grad():
        model.get_base_model().score.weight.zero_()
    started_at_ridge(model, data)
    before = model.get_base_model().score.weight.detach().clone()
    metrics = train(model, data, held_out, spec, tmp_path)
    assert torch.allclose(model.get_base_model().score.weight, before, rtol=1e-6)
    assert metrics["num_steps"] == metrics["best_step"] == 0 and math.isnan(metrics["train_loss"])
    targets = np.concatenate([x.targets[x.nodes] for x in held_out])
    assert metrics["val_loss"] == pytest.approx(np.square(predict(model, held_out).numpy() - targets).mean(), rel=1e-5)


def test_training_in_standard_deviations_learns_the_same_values_whatever_the_rewards_unit(tmp_path):
    spec = dataclasses.replace(SPEC, standardize=True, num_epochs=1)
    predictions = []
    for unit in (1.0, 1e-3):
        model = lora(value_model("llama_full"))
        with torch.no_grad():
            model.get_base_model().score.weight.zero_()
        data, held_out = [
            [dataclasses.replace(x, targets=unit * x.targets) for x in part]
            for part in (examples(8), examples(4, start=50))
        ]
        train(model, data, held_out, spec, tmp_path / str(unit))
        predictions.append(predict(model, held_out).numpy() / unit)
    assert abs(predictions[0]).max() > 0.05
    assert np.allclose(*predictions, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("packing", ["node", "tree"])
def test_training_learns_and_keeps_the_best_parameters(tmp_path, packing):
    _, metrics = trained(tmp_path, packing, num_epochs=3, lr=1e-2)
    fit, rows = metrics["validation"], log_of(tmp_path)
    losses = {int(r["step"]): float(r["val_loss"]) for r in rows if r["val_loss"]}
    assert metrics["best_step"] == min(losses, key=losses.get)
    assert fit["mse"] == pytest.approx(min(losses.values()), rel=1e-4) == pytest.approx(metrics["val_loss"], rel=1e-4)
    assert fit["mse"] < 0.8 * fit["target_variance"]  # the targets' mean alone reaches 1; with these seeds about 0.3
    assert fit["correlation_within_prompt"] > 0.4 and fit["explained_variance_within_prompt"] > 0.1
    assert set(fit["by_depth"]) == {1} and fit["by_depth"][1]["nodes"] == fit["nodes"] == 24
    assert (metrics["tokens_read"] < metrics["tokens_as_paths"]) == (packing == "tree")


def test_a_killed_training_goes_on_to_the_same_model_to_the_last_bit(tmp_path):
    expected, metrics = trained(tmp_path / "whole", dropout=0.3)

    class Killed(Exception):
        pass

    def kill_at(step):
        def log(row):
            if row["step"] >= step:
                raise Killed

        return log

    for step in (3, 17, 29):  # before the first evaluation's row, and in later epochs
        with pytest.raises(Killed):
            trained(tmp_path / "killed", dropout=0.3, log=kill_at(step))
    resumed, again = trained(tmp_path / "killed", dropout=0.3)
    assert torch.equal(resumed, expected)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    timing = {"seconds", "tokens_per_second"}
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in metrics.items() if k not in timing}


def test_a_resumed_training_refuses_other_trees(tmp_path):
    trained(tmp_path)
    model = lora(value_model("llama_grouped_tied", dtype=torch.float32))
    with pytest.raises(DataError, match="trees have changed"):
        train(model, examples(23), examples(8, validation_nodes, start=100), SPEC, tmp_path)


def test_weights_that_the_last_step_broke_are_no_value_model(tmp_path):
    """The training loss is taken before a step's update, so that of a single step says nothing of what it did."""
    with pytest.raises(DataError, match="the validation loss is (nan|inf) at step 1"):
        trained(tmp_path, num_epochs=1, batch_size=1000, lr=1e36, warmup_steps=0)
    assert not (tmp_path / "state.json").exists()


def test_validation_stays_a_fifth_of_the_training_however_many_trees_it_has():
    data, many = examples(10), examples(60, validation_nodes, start=100)
    epoch = sum(unit_tokens(x, x.nodes) for x in data)
    evaluated, logged = milestones(data, many, SPEC, epoch, total=40)
    assert max(evaluated) == 40 and len(evaluated) == SPEC.num_epochs and evaluated <= logged
    assert len(milestones(data, many[:1], SPEC, epoch, total=40)[0]) == 10 * SPEC.num_epochs


# ------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A workspace with a base model, its configuration and labelled, split trees."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("world")
    words = ["[PAD]", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIGS["llama_grouped_tied"]).save_pretrained(folder / "base")
    config = {
        "workspace": str(folder), "base_model": {"path": "base"},
        "value_model": {"path": "base", "num_layers": 2, "lora": {"r": 4, "alpha": 8, "dropout": 0.0}},
        "datasets": {"anthropic": {
            "exp_type": "assistant", "prompt_format": "dialogue", "reference_template": "{prompt}", "splits": {},
            "sft_model": "base", "objectives": ["help", "harm"], "max_new_tokens": 8, "max_prompt_tokens": 20,
            "training": {"num_epochs": 1, "batch_size": 9, "lr": 3e-3, "warmup_steps": 1, "packing": "tree"}}},
        "objectives": dict.fromkeys(
            ("help", "harm"), {"kind": "callable", "function": "a:b", "deepest_fraction_continued": 1.0}),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    data = folder / "trees"
    for index in range(20):
        write_tree(data, make_tree(index))
    consolidate(data)
    for index in range(20):
        write_structure(data / ("val" if index < 5 else "train") / f"prompt{index}_tree.json", make_tree(index))
        (data / f"prompt{index}_tree.json").unlink()
    return folder


def command(world, *more, objective="help"):
    where = ["--config", str(world / "config.yaml"), "--data_dir", str(world / "trees")]
    return [*where, "--objective", objective, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def value_model_of_help(world):
    assert train_value_model.main(command(world)) == 0
    return world / "value_models" / "iter_0" / "help"


def test_the_output_folder_holds_an_adapter_its_metrics_and_nothing_else(value_model_of_help):
    names = {p.name for p in value_model_of_help.iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert names == adapter | {"args.yaml", "metrics.json", "training_log.csv"}
    assert [p.name for p in value_model_of_help.parent.iterdir()] == ["help"]
    metrics = json.loads((value_model_of_help / "metrics.json").read_text())
    assert metrics["objective"] == "help" and metrics["num_trees"] == 15 and metrics["num_val_nodes"] == 15
    assert metrics["num_nodes"] == 15 * (3 + 3) and metrics["best_step"] >= 1  # half of the six leaves
    record = yaml.safe_load((value_model_of_help / "args.yaml").read_text())
    assert record["settings"]["training"]["lr"] == 3e-3 and record["settings"]["value_model"]["num_layers"] == 2
    assert "torch" in record["versions"]


def test_the_adapter_loads_with_plain_peft_and_gives_the_reported_error(world, value_model_of_help):
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=1, num_hidden_layers=2)
    model = PeftModel.from_pretrained(base, value_model_of_help).eval()
    errors = []
    for index in range(5):
        tree = make_tree(index)
        for node in validation_nodes(tree):
            with torch.no_grad():
                value = model(input_ids=torch.tensor(tree.path_tokens(node)[None].astype(np.int64))).logits[0, 0]
            errors.append(float(value) - tree.values["help"][node])
    metrics = json.loads((value_model_of_help / "metrics.json").read_text())
    assert np.square(errors).mean() == pytest.approx(metrics["validation"]["mse"], rel=1e-4)
    with safe_open(value_model_of_help / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in k or "score" in k for k in file.keys()) and not any("embed" in k for k in file.keys())  # noqa: SIM118


def test_a_complete_model_is_not_trained_again_and_other_arguments_are_refused(world, value_model_of_help, capsys):
    before = (value_model_of_help / "adapter_model.safetensors").stat().st_mtime_ns
    assert train_value_model.main(command(world)) == 0
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"made with training\.lr=.*--rerun"):
        train_value_model.main(command(world, "--lr", "1e-3"))
    assert (value_model_of_help / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_rerun_trains_again_and_gives_the_same_bytes(world, tmp_path):
    out = tmp_path / "help"
    assert train_value_model.main(command(world, "--output_dir", str(out))) == 0
    first = (out / "adapter_model.safetensors").read_bytes()
    assert train_value_model.main(command(world, "--output_dir", str(out), "--rerun")) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["help"]
    assert train_value_model.main(command(world, "--output_dir", str(out), "--rerun", "--seed", "1")) == 0
    assert (out / "adapter_model.safetensors").read_bytes() != first


@pytest.fixture
def two_objectives(world, tmp_path):
    """A workspace whose trees have values of help and of harm; returns the command's arguments."""
    data = tmp_path / "trees"
    for split in ("train", "val"):
        for tree in read_trees(world / "trees", split):
            values = np.random.default_rng(tree.prompt_index).normal(size=len(tree)) - tree.values["help"]
            write_structure(data / split / f"prompt{tree.prompt_index}_tree.json", tree.labelled("harm", values))
    shutil.copy(world / "trees" / "all_tokens.hdf5", data)
    (tmp_path / "base").symlink_to(world / "base")
    return ["--data_dir", str(data), "--workspace", str(tmp_path)]


def test_several_objectives_are_trained_in_turn_each_as_alone(
    world, two_objectives, value_model_of_help, tmp_path, capsys
):
    world_of_base = [*command(world, *two_objectives, objective="all")]
    assert train_value_model.main(world_of_base) == 0
    made = tmp_path / "value_models" / "iter_0"
    same = [(folder / "adapter_model.safetensors").read_bytes() for folder in (made / "help", value_model_of_help)]
    assert same[0] == same[1] != (made / "harm" / "adapter_model.safetensors").read_bytes()
    assert json.loads((made / "harm" / "metrics.json").read_text())["objective"] == "harm"
    assert train_value_model.main(world_of_base) == 0 and capsys.readouterr().out.count("is complete (--rerun") == 2


RIDGE = ("--head_start", "ridge", "--num_epochs", "0", "--standardize")


class Passes:
    """Counts the passes of all backbones, and the times that a split's trees are read."""

    def __init__(self, monkeypatch):
        from utils import common_start

        self.backbone, self.splits, real = 0, [], common_start.read_trees

        def counted(data_dir, split):
            self.splits.append(split)
            return real(data_dir, split)

        monkeypatch.setattr(common_start, "read_trees", counted)

    def __enter__(self):
        def count(module, inputs):
            self.backbone += type(module).__name__ == "LlamaModel"

        self.backbone, self.splits[:] = 0, []
        self.handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
        return self

    def __exit__(self, *_):
        self.handle.remove()


def adapter_and_metrics(folder):
    """What a value model is: its weights' bytes, and its metrics without times."""
    metrics = json.loads((folder / "metrics.json").read_text())
    times = ("seconds", "start_seconds", "tokens_per_second")
    return (folder / "adapter_model.safetensors").read_bytes(), {k: v for k, v in metrics.items() if k not in times}


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_ridge_starts_of_several_objectives_take_the_passes_of_one_and_are_those_of_each_alone(
    world, two_objectives, tmp_path, monkeypatch, pooling
):
    """To the last bit, and also where the command is killed between the two."""
    config = yaml.safe_load((world / "config.yaml").read_text())
    config["value_model"]["pooling"] = pooling
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    two_objectives += ["--config", str(tmp_path / "config.yaml"), *RIDGE]
    alone, needed = {}, set()
    for objective in ("help", "harm"):
        with Passes(monkeypatch) as passes:
            out = ["--output_dir", str(tmp_path / objective)]
            assert train_value_model.main(command(world, *two_objectives, *out, objective=objective)) == 0
        assert passes.splits == ["train", "val"]
        needed.add(passes.backbone)
        alone[objective] = adapter_and_metrics(tmp_path / objective)
    assert alone["help"][0] != alone["harm"][0] and needed == {2}  # training and validation trees, a pass each

    def made():
        return {n: adapter_and_metrics(tmp_path / "value_models" / "iter_0" / n) for n in ("help", "harm")}

    with Passes(monkeypatch) as passes:
        assert train_value_model.main(command(world, *two_objectives, objective="all")) == 0
    assert made() == alone and passes.splits == ["train", "val"] and {passes.backbone} == needed

    for objective in alone:
        shutil.rmtree(tmp_path / "value_models" / "iter_0" / objective)
    save, killed_at = training_output.save_adapter, ["harm.partial"]

    def killed(model, folder):
        if folder.name in killed_at:
            raise KeyboardInterrupt
        save(model, folder)

    monkeypatch.setattr(training_output, "save_adapter", killed)
    with pytest.raises(KeyboardInterrupt):
        train_value_model.main(command(world, *two_objectives, objective="all"))
    assert {p.name for p in (tmp_path / "value_models" / "iter_0").iterdir()} == {"help", "harm.partial"}
    killed_at.clear()
    assert train_value_model.main(command(world, *two_objectives, objective="all")) == 0
    assert made() == alone


def test_a_killed_script_leaves_no_folder_and_the_same_command_completes_it(world, tmp_path, monkeypatch):
    expected, out = tmp_path / "whole", tmp_path / "killed"
    train_value_model.main(command(world, "--output_dir", str(expected), "--packing", "node"))
    calls, real = [], add_gradients

    def killed(*args, **kwargs):
        calls.append(0)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("utils.value_training.add_gradients", killed)
    with pytest.raises(KeyboardInterrupt):
        train_value_model.main(command(world, "--output_dir", str(out), "--packing", "node"))
    assert not out.exists()
    assert train_value_model.main(command(world, "--output_dir", str(out), "--packing", "node")) == 0
    assert len(calls) < 2 * 10  # ten steps: some were not done again
    assert (out / "adapter_model.safetensors").read_bytes() == (expected / "adapter_model.safetensors").read_bytes()


def test_an_adapter_is_written_over_a_torn_one(tmp_path):
    model = lora(value_model("llama_full"))
    for folder in (tmp_path / "whole", tmp_path / "torn"):
        training_output.save_adapter(model, folder)
    for path in (tmp_path / "torn").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    training_output.save_adapter(model, tmp_path / "torn")
    whole, again = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "torn"))
    assert whole == again and len(whole) == 3


def test_continuing_goes_to_the_next_iteration_and_starts_from_the_given_model(world, value_model_of_help, capsys):
    init = ["--init_checkpoint", str(value_model_of_help), "--no_warmup", "--KL_penalty", "0.05", "--lr", "1e-9"]
    assert train_value_model.main(command(world, *init)) == 0
    folder = world / "value_models" / "iter_1" / "help"
    from safetensors.torch import load_file

    old, new = (load_file(f / "adapter_model.safetensors") for f in (value_model_of_help, folder))
    assert old.keys() == new.keys() and all(torch.allclose(old[k], new[k], atol=1e-6) for k in old)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["num_nodes"] == 15 * 9 and metrics["warmup_steps"] == 0  # the objective's deepest_fraction_continued
    with pytest.raises(UsageError, match=r"is not .*iter_<N>/harm, so --output_dir is needed"):
        train_value_model.main(command(world, "--init_checkpoint", str(folder), objective="harm"))


@pytest.mark.parametrize("start", [(), RIDGE], ids=["trained", "ridge"])
def test_validation_trees_without_inner_nodes_are_refused_and_nothing_is_left(world, tmp_path, start):
    data, out = tmp_path / "trees", tmp_path / "out" / "help"
    for index in range(4):
        write_tree(data, make_tree(index, children=(3,)))
    consolidate(data)
    for split in ("train", "val"):
        (data / split).mkdir()
    for index in range(4):
        (data / f"prompt{index}_tree.json").rename(data / ("val", "train")[index % 2] / f"prompt{index}_tree.json")
    arguments = command(world, *start, "--data_dir", str(data), "--output_dir", str(out))
    with pytest.raises(DataError, match="no nodes to use in the validation trees in .*; inner nodes are needed"):
        train_value_model.main(arguments)
    assert not list(out.parent.iterdir())


def test_texts_beyond_what_a_value_model_attends_to_are_refused(world, tmp_path):
    """Decoding could not use such a model, and a tree's rows know of no window."""
    from transformers import MistralForCausalLM

    settings = yaml.safe_load((world / "config.yaml").read_text())
    MistralForCausalLM(WINDOWED["mistral_window"]).save_pretrained(tmp_path / "base")
    settings["value_model"]["path"] = str(tmp_path / "base")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = command(world, "--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "out" / "it"))
    with pytest.raises(DataError, match=r"texts of up to \d+ tokens, and value models on .* attend to 12"):
        train_value_model.main(arguments)
    assert not list((tmp_path / "out").iterdir())


def test_user_mistakes_are_one_line_that_says_what_to_do(world, tmp_path):
    with pytest.raises(DataError, match=r"no values of 'harm'.*label_tree.py"):
        train_value_model.main(command(world, objective="harm"))
    with pytest.raises(DataError, match=r"no trees in .*train.*split_data.py"):
        train_value_model.main([*command(world), "--data_dir", str(tmp_path)])
    with pytest.raises(DataError, match=r"no folder .*missing.*get_data_base.py.*label_tree.py"):
        train_value_model.main([*command(world), "--data_dir", str(tmp_path / "missing")])
    with pytest.raises(ValueError, match="did you mean 'help'"):
        train_value_model.main(command(world, objective="hepl"))
    with pytest.raises(UsageError, match="--lr must be a positive number, got nan"):
        train_value_model.main(command(world, "--lr", "nan"))
    with pytest.raises(UsageError, match="--deepest_fraction must be at least 0 and at most 1, got 1.5"):
        train_value_model.main(command(world, "--deepest_fraction", "1.5"))
    with pytest.raises(UsageError, match="exclude each other"):
        train_value_model.main(command(world, "--no_warmup", "--warmup_steps", "3"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(DataError, match="holds no value model"):
        train_value_model.main(command(world, "--output_dir", str(tmp_path / "mine"), "--rerun"))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_dry_run_says_what_would_be_read_and_makes_nothing(world, tmp_path, capsys):
    assert train_value_model.main(command(world, "--dry_run", "--output_dir", str(tmp_path / "x"))) == 0
    out = capsys.readouterr().out
    assert "validation trees" in out and "made by this command" in out and not list(tmp_path.iterdir())


class TwoThreads:
    """An accelerator's part that training uses, for two processes that are threads."""

    num_processes = 2

    def __init__(self, rank, barrier, board):
        self.process_index, self.barrier, self.board = rank, barrier, board

    def wait_for_everyone(self):
        self.barrier.wait(timeout=30)

    def reduce(self, tensor, how):
        assert how == "sum"
        self.board[self.process_index] = tensor
        self.wait_for_everyone()
        total = self.board[0] + self.board[1]
        self.wait_for_everyone()
        return total


@pytest.mark.parametrize("packing", ["node", "tree"])
def test_two_processes_learn_what_one_learns(tmp_path, packing):
    """In float64, where sums in another order differ by 1e-16 a step: Adafactor's signs do not turn that into 1e-6."""

    def fit(folder, accelerator=None):
        model = lora(value_model("llama_grouped_tied"))
        spec = dataclasses.replace(SPEC, packing=packing, num_epochs=1)
        trees, val = examples(9), examples(3, validation_nodes, start=100)
        metrics = train(model, trees, val, spec, folder, accelerator=accelerator)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]), metrics

    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    expected, one = fit(tmp_path / "one")
    barrier, board = threading.Barrier(2), [None, None]
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(fit, tmp_path / "two", TwoThreads(r, barrier, board)) for r in range(2)]
        for parameters, metrics in (r.result() for r in results):
            assert torch.allclose(parameters, expected, atol=1e-6)
            assert metrics["val_loss"] == pytest.approx(one["val_loss"], abs=1e-6) and metrics["processes"] == 2


def test_no_process_goes_on_to_publish_before_all_have_read_what_is_best(tmp_path, monkeypatch):
    """Without epochs nothing is read behind the last checkpoint that would hold the first process up."""
    spec = dataclasses.replace(SPEC, num_epochs=0, head_start="ridge")
    data, held_out = examples(4), examples(3, validation_nodes, start=100)
    load_best, late = Checkpoint.load_best, threading.local()

    def slow(checkpoint):
        time.sleep(0.5 * late.rank)
        return load_best(checkpoint)

    def fit(accelerator):
        late.rank = accelerator.process_index
        model = lora(value_model("llama_full"))
        states = read_states(model, held_out)
        metrics = train(model, data, held_out, spec, tmp_path, accelerator=accelerator, validation_states=states)
        if late.rank == 0:  # as `publish` does
            (tmp_path / training_output.STATE).unlink()
        return metrics["val_loss"]

    monkeypatch.setattr(Checkpoint, "load_best", slow)
    barrier, board = threading.Barrier(2), [None, None]
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(fit, [TwoThreads(r, barrier, board) for r in range(2)])
    assert one == two


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_two_processes_share_the_ridge_of_one(pooling):
    """Each reads half of the passes; the head is that of one process, and the same bits in both."""
    data, read = examples(12), []

    def start(accelerator=None):
        model = lora(value_model("llama_grouped_tied", pooling=pooling))
        backbone = without_adapter(model).model
        backbone.register_forward_pre_hook(lambda *a, **kw: read.append(accelerator and accelerator.process_index))
        ridge = started_at_ridge(model, data, max_tokens=60, accelerator=accelerator)
        return ridge, head_weight(model).clone()

    expected_ridge, expected = start()
    barrier, board = threading.Barrier(2), [None, None]
    with ThreadPoolExecutor(2) as pool:
        (ridge, one), (_, two) = pool.map(start, [TwoThreads(r, barrier, board) for r in range(2)])
    assert torch.equal(one, two) and torch.allclose(one, expected, rtol=1e-6, atol=1e-8) and ridge == expected_ridge
    passes = Counter(read)
    assert passes[None] == passes[0] + passes[1] and abs(passes[0] - passes[1]) <= 1 < passes[1]


@pytest.mark.slow
@pytest.mark.parametrize("start", [(), ("--head_start", "ridge", "--num_epochs", "0")], ids=["trained", "ridge"])
def test_the_launched_script_learns_with_two_processes_what_it_learns_with_one(world, tmp_path, start):
    """Float32 sums in another order differ by about 1e-7 a step; ten steps at lr 3e-3 leave them within 1e-4."""
    from safetensors.torch import load_file

    train_value_model.main(command(world, *start, "--output_dir", str(tmp_path / "one")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "train_value_model.py"), *command(world, *start, "--output_dir", str(tmp_path / "two"))],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["processes"] == 2
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)
