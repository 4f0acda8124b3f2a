"""Token tables: the ridge finds planted token values within a prompt, and the files refuse what does not fit."""

import numpy as np
import pytest
import yaml

import fit_token_table
from utils.errors import DataError
from utils.hdf5_utils import consolidate, write_tree
from utils.token_table import (
    collect_leaves,
    explained_within,
    fit_and_report,
    inverse_document_frequency,
    load_token_table,
    load_token_tables,
    prompt_words_table,
    save_token_table,
    solve_ridge,
)
from utils.trees import Tree

VOCAB = 30
PLANTED = np.random.default_rng(7).normal(size=VOCAB)


def make_tree(index: int, noise: float = 0.0, lexical: bool = True) -> Tree:
    """A tree of 2 x 3 leaves whose reward is a prompt's level plus its tokens' planted values (or noise alone)."""
    rng = np.random.default_rng([3, index])
    parent = np.array([-1, 0, 0, 1, 1, 1, 2, 2, 2])
    tokens = [rng.integers(0, VOCAB, 6).astype(np.int32) for _ in parent]
    tree = Tree(parent, tokens, np.zeros(len(parent)), prompt=f"p{index}", prompt_index=index)
    rewards = np.zeros(len(parent))
    for leaf in tree.leaves:
        signal = PLANTED[tree.response_tokens(leaf)].sum() if lexical else 0.0
        rewards[leaf] = 50 * index + signal + noise * rng.normal()
    return tree.labelled("help", rewards)


def test_the_ridge_recovers_planted_token_values():
    leaves = collect_leaves([make_tree(i) for i in range(60)], "help", VOCAB + 5)
    table = solve_ridge(leaves, 1e-6)
    # A constant for all tokens is free only where lengths differ, which they do not here: compare up to it.
    difference = table[:VOCAB] - PLANTED
    assert np.abs(difference - difference.mean()).max() < 1e-3
    assert (table[VOCAB:] == 0).all()
    assert explained_within(leaves, table) == pytest.approx(1.0, abs=1e-6)


def test_the_ridge_equals_the_dense_solution():
    leaves = collect_leaves([make_tree(i, noise=1.0) for i in range(10)], "help", VOCAB)
    x = np.stack([leaves.centre(column) for column in leaves.counts.toarray().T], axis=1)
    dense = np.linalg.solve(x.T @ x + 2.0 * np.eye(VOCAB), x.T @ leaves.centre(leaves.rewards))
    np.testing.assert_allclose(solve_ridge(leaves, 2.0), dense, atol=1e-6)


def test_the_report_tells_a_lexical_reward_from_one_that_is_not():
    train, val = range(80), range(80, 110)
    for lexical, low, high in ((True, 0.8, 1.0), (False, -0.2, 0.1)):
        sets = [[make_tree(i, noise=1.0, lexical=lexical) for i in part] for part in (train, val)]
        _, report = fit_and_report(*sets, "help", VOCAB)
        # 180 held-out leaves: noise alone gives an R^2 of at most a few hundredths at the penalty chosen.
        assert low < report["leaves"]["explained_variance_within_prompt"] <= high and report["val_trees"] == 30
        assert report["inner_nodes"]["nodes"] == 30 * 2 and report["leaves"]["nodes"] == 30 * 6
        related = report["inner_nodes"]["correlation_within_prompt"]
        assert related > 0.8 if lexical else abs(related) < 5 * report["inner_nodes"]["correlation_within_prompt_error"]


def test_a_table_of_another_vocabulary_is_refused(tmp_path):
    save_token_table(tmp_path / "help.safetensors", PLANTED, {"l2": 1.0})
    np.testing.assert_allclose(load_token_tables(tmp_path, ["help"], VOCAB)["help"], PLANTED, rtol=1e-6)
    with pytest.raises(DataError, match=f"has {VOCAB} tokens, the reference has 31"):
        load_token_tables(tmp_path, ["help"], 31)
    with pytest.raises(DataError, match="no token table .*fit_token_table.py DATA_DIR harm"):
        load_token_tables(tmp_path, ["harm"], VOCAB)
    (tmp_path / "harm.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="is no token table"):
        load_token_table(tmp_path / "harm.safetensors")


def test_a_table_has_the_same_bytes_each_time_it_is_saved(tmp_path):
    """Its file is part of the identity of every run that decodes with it. By chance alone 20 times the same order of
    two entries: 2 in a million."""
    table, report = np.arange(7.0), {"objective": "hélp", "l2": 10.0}
    saved = set()
    for n in range(20):
        save_token_table(tmp_path / f"{n}.safetensors", table, report)
        saved.add((tmp_path / f"{n}.safetensors").read_bytes())
    assert len(saved) == 1 and np.array_equal(load_token_table(tmp_path / "0.safetensors", 7), table)


def test_unlabelled_trees_and_foreign_tokens_are_named():
    with pytest.raises(DataError, match="prompt 4 has no values of harm"):
        collect_leaves([make_tree(4)], "harm", VOCAB)
    with pytest.raises(DataError, match="outside a vocabulary of 10"):
        collect_leaves([make_tree(4)], "help", 10)


def test_the_script_fits_on_one_split_and_reports_on_the_other(tmp_path, capsys):
    for i in range(24):
        write_tree(tmp_path / "trees", make_tree(i, noise=0.5))
    consolidate(tmp_path / "trees")
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "config.json").write_text(f'{{"model_type": "llama", "vocab_size": {VOCAB}}}')
    dataset = {
        "exp_type": "assistant", "prompt_format": "dialogue", "reference_template": "{prompt}",
        "sft_model": "reference", "splits": {}, "objectives": ["help"], "max_new_tokens": 8, "max_prompt_tokens": 64,
    }  # fmt: skip
    data = {
        "workspace": str(tmp_path),
        "base_model": {"path": "reference"},
        "value_model": {"path": "reference"},
        "datasets": {"talk": dataset},
        "objectives": {"help": {"kind": "callable", "function": "a:b"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    command = [str(tmp_path / "trees"), "all", "--dataset", "talk", "--config", str(tmp_path / "config.yaml")]
    assert fit_token_table.main([*command, "--dry_run"]) == 0
    assert not (tmp_path / "token_tables").exists()
    assert fit_token_table.main(command) == 0
    assert "on 5 held-out trees" in capsys.readouterr().out
    table = load_token_table(tmp_path / "token_tables" / "help.safetensors", VOCAB)
    assert np.corrcoef(table, PLANTED)[0, 1] > 0.8
    with pytest.raises(DataError, match="no trees|0 trees"):
        fit_token_table.main([str(tmp_path / "nothing"), *command[1:]])


class _Words:
    """A tokenizer of whole words."""

    vocabulary = {" bread": 1, "bread": 2, " the": 3, " Bread": 4, "the": 5}

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [self.vocabulary[text]] if text in self.vocabulary else []}


def test_the_prompts_own_words_are_worth_their_rarity():
    idf = inverse_document_frequency([[3, 5], [3, 5, 1], [3], [3]], 8)
    assert idf[3] == 0 and idf[1] > idf[5] > 0
    table = prompt_words_table("Bread, the bread?", _Words(), idf)
    assert (np.flatnonzero(table) == [1, 2, 4, 5]).all() and table[1] == idf[1]
