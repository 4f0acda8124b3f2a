"""Steps that are recorded once and then launched whole: CUDA graphs of a decoding step.

A step of a language model and its value models is some thousand small operations. A GPU that is handed them one by one
waits for the host most of the time where rows are few; a recorded step is handed over in one piece. What is recorded
reads and writes fixed addresses, so the tensors that a step changes are kept in buffers here: what something outside of
a step put in their place (a row's new text, rows that were dropped) is copied there before the next step.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from utils.cli import check_graphs
from utils.errors import DataError

Place = tuple[MutableMapping[str, Any], str]  # a tensor that a step reads or changes: whose it is, and its name there
Replay = Callable[[], None]


class CudaRecorder:
    """Records what is launched on a CUDA device; the recordings of one recorder share their scratch memory.

    cuBLAS keeps a workspace for each stream that it was used on. One that was made within a recording lies in the
    recordings' memory, and another recorder's, on the same stream, would go on using it when that memory is gone. So
    each recorder has a stream of its own, and workspaces are dropped before and after a recording.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = self._pool = None
        self._graphs: weakref.WeakSet = weakref.WeakSet()  # a pool ends with its last graph

    def __call__(self, step: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self._stream = self._stream or torch.cuda.Stream()
            if not self._graphs:
                self._pool = torch.cuda.graph_pool_handle()
            torch._C._cuda_clearCublasWorkspaces()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                step()
            torch._C._cuda_clearCublasWorkspaces()
        self._graphs.add(graph)
        return graph.replay


def graphs_for(device: torch.device, asked: bool | None, default: bool) -> StepGraphs | None:
    """New recordings for a policy on that device, or None: as the user asked, else by default on a CUDA device.

    Raises:
        UsageError: asked for on another device.
    """
    check_graphs(asked, str(device))
    wanted = default and device.type == "cuda" if asked is None else asked
    return StepGraphs(CudaRecorder(device)) if wanted else None


class StepGraphs:
    """The recordings of one policy's step, one for each combination of shapes that occurs.

    With new shapes, the first step is launched as always, which also makes what the libraries make at a first use; the
    second is recorded. A recording does what the step did when it was recorded: nothing of a step may depend on a
    number of the host's that changes, but for the shapes. A policy's beta, weights and temperature are in its
    recordings; another beta is another policy.

    Args:
        record: runs a step without effect and returns what repeats its effect, see `CudaRecorder`.
    """

    def __init__(self, record: Callable[[Callable[[], None]], Replay]):
        self._record = record
        self._buffers: dict[str, Tensor] = {}  # of each place: flat, as large as was ever needed
        self._views: dict[tuple, Tensor] = {}  # of (place, shape)
        self._recorded: dict[tuple, Replay | None] = {}  # by all shapes; None: launched once

    def run(self, places: Mapping[str, Place], step: Callable[[], None]) -> None:
        """Do a step; every tensor in `places` then lies in its place's buffer.

        Raises:
            DataError: the step cannot be recorded. Its effect is then left out.
        """
        views = {place: self._settled(place, *where) for place, where in places.items()}
        shapes = tuple((place, tuple(view.shape)) for place, view in views.items())

        def into_buffers() -> None:
            step()
            for place, (holder, name) in places.items():
                if holder[name] is not views[place]:
                    views[place].copy_(holder[name])
                    holder[name] = views[place]

        if shapes not in self._recorded:
            into_buffers()
            self._recorded[shapes] = None
            return
        if self._recorded[shapes] is None:
            try:
                self._recorded[shapes] = self._record(into_buffers)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # torch says first what came of it, and what it came from in the context
                reason = str(error.__context__ or error).strip().partition("\n")[0]
                raise DataError(
                    f"a step of these models cannot be recorded as a CUDA graph ({reason}); leave --cuda_graphs out"
                ) from error
        self._recorded[shapes]()

    def _settled(self, place: str, holder: MutableMapping[str, Any], name: str) -> Tensor:
        """The buffer of a place, in the shape of its tensor and with its content; it stands in the place then."""
        tensor = holder[name]
        view = self._view(place, tensor)
        if tensor is not view:
            inside = tensor.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
            view.copy_(tensor.clone() if inside else tensor)
            holder[name] = view
        return view

    def _view(self, place: str, tensor: Tensor) -> Tensor:
        key = place, tuple(tensor.shape), tensor.dtype
        if key not in self._views:
            needed, buffer = tensor.numel(), self._buffers.get(place)
            if buffer is None or buffer.numel() < needed or buffer.dtype != tensor.dtype:
                # Half as much again, so that a text that grows moves its cache seldom: every recording is lost then.
                spare = 0 if buffer is None else buffer.numel() * 3 // 2
                self._buffers[place] = tensor.new_zeros(max(needed, spare))
                self._views = {k: v for k, v in self._views.items() if k[0] != place}
                self._recorded.clear()
            self._views[key] = self._buffers[place][: math.prod(tensor.shape)].view(tensor.shape)
        return self._views[key]
