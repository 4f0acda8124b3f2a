"""A GPU that is none: tensors that say they lie on one, and operations that refuse to mix them with the CPU's.

What is on the device has its data on the CPU, so results are the CPU's to the last bit; what differs is that a tensor
that was left on the wrong side is found, as on a GPU.
"""

import contextlib
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
# Operations that take tensors of both sides on a real GPU: an index may be the CPU's, and either side of a copy.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPYING = {"copy_", "_to_copy", "copy", "_copy_from"}
JOINING = {"cat", "stack"}  # in all others, a number of the CPU's without dimensions may stand for a plain number


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU; `elem` is its data. `operations` counts what was done there."""

    operations = 0

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem):
        made = torch.Tensor._make_subclass(cls, elem, elem.requires_grad)
        made.elem = elem.detach()
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        flat = tree_flatten((args, kwargs))[0]
        here = [x for x in flat if isinstance(x, torch.Tensor)]
        checked = [x for x in (args[0], *args[2:3]) if isinstance(x, torch.Tensor)] if name in INDEXING else here
        strangers = [x for x in checked if not isinstance(x, OnGpu) and (x.dim() > 0 or name in JOINING)]
        OnGpu.operations += 1
        if any(isinstance(x, torch.Generator) for x in flat):
            raise RuntimeError(f"{function}: expected a 'cuda' device type for generator but found 'cpu'")
        if name in INDEXING and not isinstance(here[0], OnGpu):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if strangers and name not in COPYING:
            raise RuntimeError(
                f"{function}: expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                f"and cpu (shape {tuple(strangers[0].shape)})"
            )
        if torch.Tag.inplace_view in function.tags:  # both shapes change
            function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
            with torch._C._DisableTorchDispatch():
                return function(*args, **kwargs)
        wrappers = {id(x.elem): x for x in here if isinstance(x, OnGpu)}
        result = function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
        if name in COPYING and here and not isinstance(here[0], OnGpu):
            return result  # to the CPU
        return tree_map(lambda x: wrappers.get(id(x), OnGpu(x)) if type(x) is torch.Tensor else x, result)


def unwrapped(x):
    return x.elem if isinstance(x, OnGpu) else x


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Placing(TorchFunctionMode):
    """Follows the devices that are named: `to`, `cpu`, `cuda`, and whatever takes device=."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self.move(function, *args, **kwargs)
        if function is torch.Tensor.backward:  # what autograd functions make is placed too
            with self:
                return torch.autograd.backward(args[0], kwargs.pop("gradient", None), **kwargs)
        if function is torch.Tensor.tolist:
            return unwrapped(args[0]).tolist()
        if name in ("as_tensor", "tensor") and kwargs.get("device") is None and args and isinstance(args[0], OnGpu):
            return OnGpu(function(args[0].elem, *args[1:], **kwargs))
        if not is_gpu(kwargs.get("device")):
            if kwargs.get("device") is not None and any(isinstance(x, OnGpu) for x in tree_flatten(args)[0]):
                return unwrapped(function(*tree_map(unwrapped, args), **kwargs))  # new_zeros(..., device="cpu")
            return function(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")
        kwargs["device"] = "cpu"
        return OnGpu(unwrapped(function(*tree_map(unwrapped, args), **kwargs)))

    def move(self, function, tensor, *args, device=None, dtype=None, **kwargs):
        if function is torch.Tensor.cuda:
            args = (GPU,)
        elif function is torch.Tensor.cpu:
            args = ("cpu",)
        for x in args:
            if isinstance(x, torch.Tensor):
                device, dtype = x.device, x.dtype
            elif isinstance(x, torch.dtype):
                dtype = x
            elif isinstance(x, (str, torch.device)):
                device = x
        there, here = is_gpu(device), isinstance(tensor, OnGpu)
        if device is None or there == here:
            return tensor.to(dtype or tensor.dtype)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("a move that carries a gradient is not pretended")
        moved = tensor.elem if here else tensor.detach()
        moved = moved.to(dtype or tensor.dtype, copy=True)
        return OnGpu(moved) if there else moved


@contextlib.contextmanager
def pretended_gpu():
    """Within it, cuda:0 is there."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: "pretended",
        "max_memory_allocated": lambda device=None: 0,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "empty_cache": lambda: None,
        "is_initialized": lambda: True,
    }
    AcceleratorState._reset_state(reset_partial_state=True)  # it is the process's, and of the device that it first saw
    with contextlib.ExitStack() as stack:
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(Placing())
        try:
            yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
