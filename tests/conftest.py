"""Fixtures that several test files share."""

import pytest

from tests.toy_world import Script, make_toy


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A workspace with the tiny world's data and a base model of its architecture that was hardly trained: seconds."""
    from scripts.tiny.make_world import main

    folder = tmp_path_factory.mktemp("tiny_world")
    assert main(["--workspace", str(folder), "--steps", "2"]) == 0
    return folder


@pytest.fixture(scope="session")
def rival_world(tiny_world, tmp_path_factory):
    """A world of `small_runs` in which every stage is on the CPU."""
    return small_runs(tiny_world, tmp_path_factory.mktemp("rivals"), device="cpu")


def small_runs(tiny_world, folder, device):
    """The tiny world with prompts, small training runs, and rewards that need no model: its configuration, workspace
    and the arguments of every script."""
    import json
    import shutil
    from types import SimpleNamespace

    import yaml

    import dataset_preprocess
    from utils.config import REPOSITORY, load_config

    shutil.copytree(tiny_world, folder / "ws")
    data = json.loads(json.dumps(yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())))
    data["workspace"] = str(folder / "ws")
    del data["objectives"]["humor"]  # its reward model takes a minute to train
    for spec in data["datasets"].values():
        spec["sft_model"] = "base_model"
        spec["objectives"] = [o for o in spec["objectives"] if o != "humor"]
        spec["ppo"] |= {"batch_size": 8, "mini_batch_size": 4, "micro_batch_size": 4, "num_prompts": 16}
        spec["ppo"]["lora"]["r"] = spec["arm"]["lora"]["r"] = 4
        spec["arm"] |= {"batch_size": 8, "num_prompts": 12, "num_epochs": 1}
    file = folder / "world.yaml"
    file.write_text(yaml.safe_dump(data))
    common = ["--config", str(file), "--device", device]
    for split in ("train", "test"):
        assert dataset_preprocess.main(["anthropic", "--split", split, *common]) == 0
    return SimpleNamespace(config=load_config(file), ws=folder / "ws", common=common, folder=folder)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The folder of a toy world: toy.yaml and its workspace."""
    folder = tmp_path_factory.mktemp("toy")
    make_toy(folder)
    return folder


@pytest.fixture
def script(toy, tmp_path):
    """Call a script's main in a workspace of its own that shares the toy's models."""
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    for name in ("base_model", "value_models", "datasets"):
        (workspace / name).symlink_to(toy / "workspace" / name)
    return Script(toy, workspace)
