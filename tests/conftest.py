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
