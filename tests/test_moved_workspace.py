"""A workspace that was moved or copied to another place goes on there: nothing that is complete is made again."""

import shutil

import yaml

import get_data_base
import label_tree
import split_data
import train_value_model
from tests.test_cli import load
from utils.config import load_config
from utils.files import same_setting


def test_what_was_trained_is_complete_in_the_place_that_its_workspace_was_moved_to(rival_world, tmp_path, capsys):
    def commands(ws):
        """(script, arguments) of every training, in a workspace."""
        data = yaml.safe_load((rival_world.folder / "world.yaml").read_text())
        (tmp_path / "world.yaml").write_text(yaml.safe_dump(data | {"workspace": str(ws)}))
        trees, split = "tree_data/anthropic/iter_0", ws / "data_for_training/anthropic/iter_0"  # found in the workspace
        small = ("--max_steps", 1, "--batch_size", 4, "--mini_batch_size", 4)
        yield get_data_base, (0, 6, "--dataset", "anthropic", "--root_children", 2)
        yield label_tree, (trees, "help", "--dataset", "anthropic")
        yield split_data, (trees, "--dataset", "anthropic", "--output_dir", split, "--num_val", 2)
        ridge = ("--objective", "help", "--dataset", "anthropic", "--num_epochs", 0, "--head_start", "ridge")
        yield train_value_model, (*ridge, "--data_dir", split)
        first = ws / "value_models/iter_0/help"
        again = ("--init_checkpoint", first, "--data_dir", split, "--output_dir", ws / "value_models/iter_1/help")
        yield train_value_model, (*ridge, *again)
        yield load("Finetuning/SFT/sft.py"), ("--exp_type", "assistant", "--max_steps", 1)
        yield load("Finetuning/PPO/ppo.py"), ("--exp_type", "assistant", "--alpha", 1, *small)
        yield load("Finetuning/ARM/train_arm.py"), ("--dataset", "anthropic", "--objective", "help")

    def outcome(ws):
        said = []
        for script, arguments in commands(ws):
            argv = [*map(str, arguments), "--config", str(tmp_path / "world.yaml"), "--device", "cpu"]
            assert script.main(argv) == 0
            said.append(capsys.readouterr().out)
        return said

    shutil.copytree(rival_world.ws, tmp_path / "here", ignore=shutil.ignore_patterns("*_logs", "morlhf", "arm"))
    outcome(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    weights = {f: f.stat().st_mtime_ns for f in (tmp_path / "there").rglob("adapter_model.safetensors")}
    assert len(weights) == 5
    said = outcome(tmp_path / "there")
    assert "0 trees grown" in said[0] and all("complete" in text for text in said[3:])
    assert weights == {f: f.stat().st_mtime_ns for f in (tmp_path / "there").rglob("adapter_model.safetensors")}


def test_a_path_is_recorded_from_the_workspace_on_and_whole_paths_of_earlier_versions_are_known(rival_world, tmp_path):
    config = load_config(rival_world.folder / "world.yaml")
    assert config.portable(rival_world.ws / "base_model") == "base_model"
    assert config.portable(tmp_path) == str(tmp_path) and config.portable("some/hub-name") == "some/hub-name"
    assert same_setting("/old/place/base_model", "base_model") and same_setting(None, None)
    for known, now in (("/old/base_model", "model"), ("base_model", "sft_model"), ("/a/b", "/c/b"), (1, "1")):
        assert not same_setting(known, now)
