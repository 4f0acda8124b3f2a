"""Fixtures that several test files share."""

import pytest


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A workspace with the tiny world's data and a base model of its architecture that was hardly trained: seconds."""
    from scripts.tiny.make_world import main

    folder = tmp_path_factory.mktemp("tiny_world")
    assert main(["--workspace", str(folder), "--steps", "2"]) == 0
    return folder
