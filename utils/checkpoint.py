"""What a killed training goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from utils.files import write_atomically, write_json
from utils.training_output import STATE


class Checkpoint:
    """Trained parameters and their optimizer's state, if wanted the best parameters so far, and plain data.

    `state.json` is written last and names the files that belong to it, so that a kill between two files leaves the
    checkpoint before. Tensors are safetensors; nothing is pickled.

    Args:
        parameters: {name: parameter} of all that is trained.
        optimizer: of these parameters; what it keeps of each is tensors and numbers of steps.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer):
        self.folder, self.parameters, self.optimizer = Path(folder), dict(parameters), optimizer

    def save(self, state: dict, *, best: bool = False) -> dict:
        """Write the checkpoint of `state["step"]`, and say which files are its own.

        Args:
            state: plain data; "step", and what `save` added to the state before, where there was one.
            best: the parameters are the best so far.

        Returns:
            the state as it was written.
        """
        tensors, steps = {}, {}
        for name, parameter in self.parameters.items():
            tensors[name] = parameter
            for key, value in self.optimizer.state[parameter].items():
                if torch.is_tensor(value):
                    tensors[f"{name}//{key}"] = value
                else:
                    assert key == "step", (name, key, value)
                    steps[name] = value
        state = {**state, "state_file": f"state-{state['step']}.safetensors", "optimizer_steps": steps}
        self._write(state["state_file"], tensors)
        if best:
            state["best_file"] = f"best-{state['step']}.safetensors"
            self._write(state["best_file"], self.parameters)
        write_json(self.folder / STATE, state)
        for path in self.folder.glob("*-*.safetensors"):
            if path.name not in (state["state_file"], state.get("best_file")):
                path.unlink()
        return state

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_atomically(self.folder / name, save(plain))

    def load(self) -> dict | None:
        """Restore parameters and optimizer; returns the state, or None where there is no checkpoint."""
        if not (self.folder / STATE).is_file():
            return None
        state = json.loads((self.folder / STATE).read_text())
        tensors, steps = load_file(self.folder / state["state_file"]), state.get("optimizer_steps", {})
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])
            kept = {
                key.rsplit("//", 1)[1]: value if key.endswith("//step") else value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(f"{name}//")
            }
            kept |= {"step": steps[name]} if name in steps else {}
            if kept:  # none before the first step
                self.optimizer.state[parameter] = kept
        return state

    def load_best(self) -> dict:
        """Put the best parameters of the checkpoint on the disk into the model; returns its state."""
        state = json.loads((self.folder / STATE).read_text())
        tensors = load_file(self.folder / state["best_file"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])
        return state
