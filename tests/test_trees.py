"""Trees: growth, backed-up values, expected log-ratios, and what lies on disk."""

import dataclasses
import itertools
import json
import math

import h5py
import numpy as np
import pytest

from tests import brute_force
from tests.models_for_tests import causal_lm, value_model
from utils.errors import DataError
from utils.growth import TreeShape, grow_trees, segment_length
from utils.hdf5_utils import (
    claim_collection,
    consolidate,
    merge_hdf5_files,
    read_tree,
    read_trees,
    split_folder,
    tree_indices,
    write_discarded,
    write_structure,
    write_tree,
)
from utils.labelling import leaf_texts
from utils.policies import MavisPolicy, ReferencePolicy
from utils.text_formats import answer_texts
from utils.trees import Tree, back_up, check_tree, expected_log_ratio

PARENT = np.array([-1, 0, 0, 1, 1, 1, 3])


def make_tree(index=0, seed=0):
    rng = np.random.default_rng((seed, index))
    tokens = [rng.integers(3, 50, n).astype(np.int32) for n in rng.integers(1, 6, len(PARENT))]
    return Tree(
        PARENT,
        tokens,
        rng.random(len(PARENT)) * (PARENT >= 0),
        {},
        f"prompt {index}",
        index,
        np.zeros(len(PARENT), bool),
    )


# ------------------------------------------------------------------------------------------------------------ values


def test_values_are_means_of_the_children():
    values = back_up(PARENT, [9, 9, 2.0, 9, 4.0, 6.0, 1.0])
    assert values.tolist() == pytest.approx([(11 / 3 + 2) / 2, 11 / 3, 2, 1, 4, 6, 1])


def test_leaves_are_labelled_on_the_text_that_evaluation_scores():
    """A leaf that the length limit cut behind a line break is shown to its reward without that, as an answer is."""
    pieces = {3: " No", 4: ".", 5: "\n\n", 6: " ", 7: "</s>"}

    class Tokenizer:
        def batch_decode(self, rows, skip_special_tokens):
            return ["".join(pieces[int(i)] for i in row if not (skip_special_tokens and i == 7)) for row in rows]

    tokens = [np.array(t, np.int32) for t in ([9], [3, 4], [5], [6, 3, 7])]
    tree = Tree(np.array([-1, 0, 1, 1]), tokens, np.zeros(4))
    assert leaf_texts(tree, Tokenizer()) == ["No.", "No.  No"]
    assert leaf_texts(tree, Tokenizer()) == answer_texts(Tokenizer(), [[3, 4, 5], [3, 4, 6, 3, 7]])


def test_a_node_is_the_mean_of_its_children_not_of_its_leaves():
    parent = [-1, 0, 0, 1, 1, 1]
    assert back_up(parent, [0, 0, 0.0, 3.0, 3.0, 3.0])[0] == pytest.approx(1.5)


def test_expected_log_ratio_counts_the_future_or_the_whole():
    own = np.array([0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    future = expected_log_ratio(PARENT, own)
    assert future.tolist() == pytest.approx([(1 + (9 + 4 + 5) / 3 + 2) / 2, 6, 0, 6, 0, 0, 0])
    whole = expected_log_ratio(PARENT, own, "whole")
    assert whole.tolist() == pytest.approx([((1 + 9 + 1 + 4 + 1 + 5) / 3 + 2) / 2, 7, 2, 10, 5, 6, 10])
    with pytest.raises(ValueError, match="future, whole"):
        expected_log_ratio(PARENT, own, "past")


def test_only_the_future_log_ratio_satisfies_the_soft_bellman_equation():
    """A full binary tree whose branches have probabilities p under the policy and q under the reference.

    The soft value of a node, E[R] - KL(future) / beta, satisfies V(s) = sum_a p(a) (V(s.a) - log(p(a)/q(a)) / beta).
    With a uniform policy every child counts the same, so that means over children are exact expectations.
    """
    beta, p = 2.0, 0.5
    parent = [-1, 0, 0, 1, 1, 2, 2]
    q = np.array([1, 0.2, 0.8, 0.6, 0.4, 0.1, 0.9])
    own = np.log(p / q) * (np.arange(7) > 0)
    reward = back_up(parent, [0, 0, 0, 1.0, 0.5, 0.2, 0.9])

    def residual(mode):
        soft = reward - expected_log_ratio(parent, own, mode) / beta
        return max(abs(soft[n] - np.mean([soft[c] - own[c] / beta for c in (2 * n + 1, 2 * n + 2)])) for n in range(3))

    assert residual("future") < 1e-12
    assert residual("whole") > 0.1


# ------------------------------------------------------------------------------------------------------------ growth


def test_segment_lengths_are_uniform_on_the_published_range():
    draws = [segment_length(30, 0, 3, (0, i)) for i in range(4000)]
    assert set(draws) == set(range(1, 20))  # 2 * floor(30 / 3) - 1 = 19
    # Mean 10, standard deviation 5.48: the mean of 4,000 is within 5 standard errors.
    assert abs(np.mean(draws) - 10) < 5 * 5.48 / math.sqrt(4000)


def test_an_empty_range_of_lengths_gives_one_token_and_the_last_layer_takes_all():
    assert segment_length(2, 0, 5, (0,)) == 1
    assert segment_length(7, 4, 5, (0,)) == 7
    assert all(
        1 <= segment_length(left, layer, 5, (left, layer)) <= left for left in range(1, 60) for layer in range(5)
    )


def grow(policy, prompts, shape, batch_size, eos=None, seed=0):
    texts = {i: f"text {i}" for i in prompts}
    return {
        t.prompt_index: t
        for t in grow_trees(policy, prompts, texts, shape, seed=seed, eos_token_id=eos, batch_size=batch_size)
    }


def same(a, b):
    return (
        a.parent.tolist() == b.parent.tolist()
        and all(np.array_equal(x, y) for x, y in itertools.zip_longest(a.tokens, b.tokens))
        and np.allclose(a.log_ratio, b.log_ratio, atol=1e-9)
    )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_tree_does_not_depend_on_the_batch_or_on_other_prompts(batch_size):
    policy = ReferencePolicy(causal_lm("llama_grouped_tied"), top_k=6)
    shape = TreeShape(3, 2, 3, 12)
    prompts = {4: [5, 6, 7, 8], 9: [10, 11], 2: [20] * 9}
    together = grow(policy, prompts, shape, 16, eos=[2, 9])
    alone = {i: grow(policy, {i: p}, shape, batch_size, eos=[2, 9])[i] for i, p in prompts.items()}
    for index in prompts:
        check_tree(together[index])
        assert same(together[index], alone[index])


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("splitting", [False, True])
def test_forked_segments_equal_brute_force_from_the_whole_prefix(pooling, splitting):
    """Each segment is what decoding from its whole prefix gives for its key, value model included.

    A child of the root that was cut, and its tail, were one segment; what grew from the cut is compared.
    """
    reference, value = causal_lm("llama_full"), value_model("llama_full", pooling=pooling)
    policy = MavisPolicy(reference, {"a": value}, {"a": 1.0}, beta=2.0, top_k=5, normalization="none")
    eos = [2, 9, 11, 13, 17, 23] if splitting else None
    compared = 0
    for index, prompt in {3: [5, 6, 7], 4: [8, 9], 5: [5, 7, 6, 9]}.items():
        tree = grow(policy, {index: prompt}, TreeShape(2, 3, 3, 12, dynamic_splitting=splitting), 3, eos=eos)[index]
        paths, depth = {0: ()}, tree.depth
        cut = {n for n in tree.children(0) if any(tree.finished[tree.children(n)]) and not tree.finished[n]}
        for node in range(1, len(tree)):
            parent = int(tree.parent[node])
            paths[node] = (*paths[parent], list(tree.children(parent)).index(node))
            if splitting and (depth[node] == 1 or (parent in cut and paths[node][-1] == 0)):
                continue
            compared += 1
            end = int(tree.tokens[node][-1]) if tree.finished[node] else None
            tokens, log_ratio, _ = brute_force.decode(
                reference, [value], [1.0], tree.path_tokens(parent).tolist(), (0, index, *paths[node], 2), eos=end,
                start=len(prompt), max_new_tokens=len(tree.tokens[node]), beta=2.0, k=5, temperature=1.0,
                normalization="none",
            )  # fmt: skip
            assert tokens == tree.tokens[node].tolist()
            assert log_ratio == pytest.approx(tree.log_ratio[node], abs=1e-6)
    assert compared > 20


@pytest.mark.parametrize(("root", "inner", "layers"), [(4, 2, 3), (25, 1, 2), (1, 1, 1)])
def test_a_tree_has_the_children_and_layers_that_were_asked_for(root, inner, layers):
    tree = grow(ReferencePolicy(causal_lm("llama_full")), {0: [5, 6]}, TreeShape(root, inner, layers, 16), 32)[0]
    assert len(tree.children(0)) == root
    for node in range(1, len(tree)):
        assert len(tree.children(node)) in (0, inner)
    assert tree.depth.max() <= layers
    for leaf in tree.leaves:
        assert len(tree.response_tokens(leaf)) == 16
    assert len({tuple(tree.response_tokens(n)) for n in tree.leaves}) > 1 or root == 1


def test_text_that_ended_has_no_children():
    tree = grow(
        ReferencePolicy(causal_lm("llama_full"), top_k=3),
        {0: [5, 6]},
        TreeShape(8, 2, 3, 20),
        16,
        eos=list(range(3, 30)),
    )[0]
    assert tree.finished.any()
    for node in np.flatnonzero(tree.finished):
        assert len(tree.children(node)) == 0


def test_dynamic_splitting_leaves_no_child_of_the_root_a_leaf():
    """Ended children are cut: the pieces are the text that would have been, and others grow from the cut."""
    policy, prompts = ReferencePolicy(causal_lm("llama_full"), top_k=6), {i: [5, 6, 7 + i] for i in range(6)}
    eos = [2, 9, 11, 13, 17, 23]
    plain = grow(policy, prompts, TreeShape(2, 3, 3, 20), 16, eos=eos)
    split = grow(policy, prompts, TreeShape(2, 3, 3, 20, dynamic_splitting=True), 16, eos=eos)
    cuts = 0
    for index in prompts:
        check_tree(split[index])
        for place, (a, b) in enumerate(zip(plain[index].children(0), split[index].children(0), strict=True)):
            whole, piece = plain[index].tokens[a], split[index].tokens[b]
            if not plain[index].finished[a] or len(whole) == 1:
                assert np.array_equal(whole, piece), place
                continue
            cuts += 1
            tail, *others = split[index].children(b)
            assert len(others) == 2 and len(split[index].children(tail)) == 0 and split[index].finished[tail]
            assert np.array_equal(np.concatenate([piece, split[index].tokens[tail]]), whole)
            total = split[index].log_ratio[b] + split[index].log_ratio[tail]
            assert total == pytest.approx(plain[index].log_ratio[a], abs=1e-9)
    assert cuts > 2


@pytest.mark.parametrize("name", ["root_children", "non_root_children", "num_layers", "max_new_tokens"])
def test_a_shape_without_nodes_is_refused(name):
    with pytest.raises(ValueError, match=name):
        TreeShape(**{**dict(root_children=2, non_root_children=2, num_layers=2, max_new_tokens=4), name: 0})


# ----------------------------------------------------------------------------------------------------------- on disk


def fill(folder, indices, values=True):
    for index in indices:
        tree = make_tree(index)
        if values:
            tree = tree.labelled("help", np.arange(len(tree), dtype=float))
        write_tree(folder, tree)
    consolidate(folder)


def test_a_tree_comes_back_as_it_was(tmp_path):
    tree = make_tree(7).labelled("help", np.arange(7.0))
    write_tree(tmp_path, tree)
    for _ in range(2):  # from parts/, then from all_tokens.hdf5
        back = read_tree(tmp_path, 7)
        assert same(tree, back) and back.prompt == "prompt 7" and back.finished.tolist() == tree.finished.tolist()
        assert back.values["help"].tolist() == tree.values["help"].tolist()
        consolidate(tmp_path)
    assert not (tmp_path / "parts").exists()


def test_tokens_are_on_disk_before_the_tree_is_called_done(tmp_path, monkeypatch):
    import utils.hdf5_utils as store

    monkeypatch.setattr(store, "write_structure", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_tree(tmp_path, make_tree(0))
    assert tree_indices(tmp_path) == [] and (tmp_path / "parts" / "prompt0.npy").exists()


def test_a_resumed_folder_is_byte_for_byte_that_of_one_run(tmp_path):
    fill(tmp_path / "once", range(12))
    fill(tmp_path / "twice", [3, 1, 0])
    write_tree(tmp_path / "twice", make_tree(5).labelled("help", np.arange(7.0)))  # killed before the store was written
    fill(tmp_path / "twice", [2, 4, 6, 7, 11, 10, 9, 8])
    for file in sorted(p.name for p in (tmp_path / "once").iterdir()):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file


def test_a_part_that_another_process_is_writing_stays(tmp_path):
    fill(tmp_path, [0])
    write_tree(tmp_path, make_tree(1))
    (tmp_path / "prompt1_tree.json").unlink()
    assert consolidate(tmp_path) == 1
    assert (tmp_path / "parts" / "prompt1.npy").exists()


def test_the_split_takes_the_first_prompts_for_validation(tmp_path):
    fill(tmp_path / "trees", [0, 1, 3, 4, 5])
    write_discarded(tmp_path / "trees", 2, "short", "no segment reached a second layer")
    assert split_folder(tmp_path / "trees", tmp_path / "out", 3) == (3, 2)
    assert tree_indices(tmp_path / "out", "val") == [0, 1] and tree_indices(tmp_path / "out", "train") == [3, 4, 5]
    assert split_folder(tmp_path / "trees", tmp_path / "out", 1) == (4, 1)
    assert tree_indices(tmp_path / "out", "val") == [0]
    assert [t.prompt_index for t in read_trees(tmp_path / "out", "train")] == [1, 3, 4, 5]
    with pytest.raises(DataError, match="num_val"):
        split_folder(tmp_path / "trees", tmp_path / "out", 6)


def test_merging_keeps_all_prompts_and_refuses_two_trees_of_one_name(tmp_path):
    fill(tmp_path / "a", [0, 2])
    fill(tmp_path / "b", [1, 2, 10])
    out = tmp_path / "merged" / "all_tokens.hdf5"
    assert merge_hdf5_files([tmp_path / "a" / "all_tokens.hdf5", tmp_path / "b" / "all_tokens.hdf5"], out) == 4
    with h5py.File(out) as file:
        assert sorted(file) == ["prompt0", "prompt1", "prompt10", "prompt2"]
        assert file["prompt10/tokens"][:].tolist() == np.concatenate(make_tree(10).tokens).tolist()
    before = out.read_bytes()
    write_tree(tmp_path / "c", make_tree(2, seed=1))
    consolidate(tmp_path / "c")
    with pytest.raises(DataError, match="two different trees named prompt2"):
        merge_hdf5_files([out, tmp_path / "c" / "all_tokens.hdf5"], out)
    assert out.read_bytes() == before


def test_a_folder_made_with_other_arguments_is_refused(tmp_path):
    claim_collection(tmp_path, {"seed": 0, "top_k": 15})
    claim_collection(tmp_path, {"seed": 0, "top_k": 15})
    with pytest.raises(DataError, match="seed=0.*1"):
        claim_collection(tmp_path, {"seed": 1, "top_k": 15})


def corrupt(kind, folder):
    store, record = folder / "all_tokens.hdf5", folder / "prompt0_tree.json"
    if kind == "truncated store":
        store.write_bytes(store.read_bytes()[: store.stat().st_size // 2])
    elif kind == "foreign store":
        store.write_bytes(b"not an HDF5 file" * 50)
    elif kind == "no store":
        store.unlink()
    elif kind == "store without the entry":
        with h5py.File(store, "w") as f:
            f.create_group("prompt9")
    elif kind == "foreign entry":
        with h5py.File(store, "w") as f:
            f["prompt0"] = np.arange(5)
    elif kind == "offsets that do not fit":
        with h5py.File(store, "r+") as f:
            f["prompt0/offsets"][-1] += 1
    elif kind == "another tree's tokens":
        with h5py.File(store, "w") as f:
            f["prompt0/tokens"], f["prompt0/offsets"] = np.arange(3, dtype=np.int32), np.arange(4)
    elif kind == "torn JSON":
        record.write_text(record.read_text()[:40])
    elif kind == "foreign JSON":
        record.write_text('{"a": 1}')
    else:
        data = json.loads(record.read_text())
        data.update(
            {
                "cycle": {"parent": [-1, 2, 1, 1, 1, 1, 3]},
                "nan": {"values": {"help": [math.nan] * 7}},
                "wrong type": {"parent": "abc"},
            }[kind]
        )
        record.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "kind",
    [
        "truncated store",
        "foreign store",
        "no store",
        "store without the entry",
        "foreign entry",
        "offsets that do not fit",
        "another tree's tokens",
        "torn JSON",
        "foreign JSON",
        "cycle",
        "nan",
        "wrong type",
    ],
)
def test_a_damaged_folder_is_one_clear_error(tmp_path, kind):
    fill(tmp_path, [0])
    corrupt(kind, tmp_path)
    with pytest.raises(DataError) as error:
        read_tree(tmp_path, 0)
    assert "prompt0" in str(error.value) or "all_tokens" in str(error.value) or "prompt 0" in str(error.value)


def test_a_missing_prompt_is_an_error_never_another_sample(tmp_path):
    fill(tmp_path, [0])
    with pytest.raises(DataError, match="no tree of prompt 1"):
        read_tree(tmp_path, 1)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    fill(tmp_path, [0])
    before = (tmp_path / "prompt0_tree.json").read_bytes()
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_structure(tmp_path / "prompt0_tree.json", make_tree(0, seed=5))
    assert (tmp_path / "prompt0_tree.json").read_bytes() == before
    assert not list(tmp_path.glob(".*tmp"))


def test_soft_labels_say_what_soft_values_pay_for(tmp_path):
    """label_tree.py --soft writes the expected log-ratios; training takes their mode, and never two at once."""
    from utils.labelling import label_softly
    from utils.tree_examples import make_examples, validation_nodes

    shape, policy = TreeShape(2, 2, 2, 8), ReferencePolicy(causal_lm("llama_full"), top_k=5)
    for index, tree in grow(policy, {3: [5, 6, 7], 4: [8, 9]}, shape, 3).items():
        assert abs(tree.log_ratio).max() > 0
        write_tree(tmp_path, tree.labelled("help", np.arange(len(tree)) / 10))
        assert read_tree(tmp_path, index).soft is None
    consolidate(tmp_path)
    targets = {}
    for mode in ("whole", "future"):
        found = label_softly(tmp_path, list(read_trees(tmp_path)), mode)
        trees = list(read_trees(tmp_path))
        assert [t.soft for t in trees] == [mode] * 2
        for tree, expected in zip(trees, found, strict=True):
            stored = json.loads((tmp_path / f"prompt{tree.prompt_index}_tree.json").read_text())["expected_log_ratio"]
            assert stored["mode"] == mode and stored["nodes"] == pytest.approx(expected.tolist())
            assert expected.tolist() == pytest.approx(expected_log_ratio(tree.parent, tree.log_ratio, mode).tolist())
        examples = make_examples(trees, "help", validation_nodes, kl_penalty=0.5)
        targets[mode] = np.concatenate([x.targets for x in examples])
        soft = [t.values["help"] - 0.5 * e for t, e in zip(trees, found, strict=True)]
        assert np.allclose(targets[mode], np.concatenate(soft))
    assert not np.allclose(targets["whole"], targets["future"])
    mixed = [dataclasses.replace(trees[0], soft="whole"), trees[1]]
    with pytest.raises(DataError, match="different log-ratios.*--soft"):
        make_examples(mixed, "help", validation_nodes, kl_penalty=0.5)
    assert len(make_examples(mixed, "help", validation_nodes)) == 2  # plain values do not care

    path = tmp_path / "prompt3_tree.json"
    record = json.loads(path.read_text())
    record["expected_log_ratio"]["nodes"][0] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="expected log-ratios"):
        read_tree(tmp_path, 3)
