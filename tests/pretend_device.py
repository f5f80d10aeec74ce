"""Two accelerators that are none: tensors that say they are on `npu:0` or `npu:1` and compute on the CPU.

They refuse what CUDA refuses: tensors of two devices in one operation (but for a CPU scalar, and CPU indices in `x[...]`),
`.numpy()`, a CPU generator for a tensor of theirs. Their memory is counted, and can run out. Counted, too, is how often a CPU
would wait for them. Like Apple's and some of Intel's they can be without float64.

PyTorch knows one device of one's own a process, and from then on takes it for the accelerator. So this is used in a process
of its own; see `PRETEND_DEVICE` in conftest.py. The name is among the few that safetensors reads to.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"
DEVICES = [torch.device("cpu")]  # after `register`, these too

_aten = torch.ops.aten
# What may take tensors of two devices, into the first one's: copies. And indices may lie on the CPU.
_COPIES = {_aten.copy_.default, _aten._to_copy.default, _aten.fill_.Tensor}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
# What the CPU waits for, as the result is a number of its own, or has a shape that depends on values.
_AWAITED = {
    _aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default, _aten.masked_select.default,
    _aten.bincount.default, _aten._unique2.default, _aten.repeat_interleave.Tensor,
}  # fmt: skip
# The shape of a tensor of ours, without a look at what it holds.
_set_shape = functools.partial(_aten.as_strided_.default._op_dk, torch._C.DispatchKey.CompositeExplicitAutogradNonFunctional)
_lock = threading.RLock()  # mergekit has a thread for each device


class Memory:
    """The memory of both devices together.

    Attributes:
        used: bytes in use.
        peak: the most that were in use at a time.
        allocations: how often memory was asked for.
        devices: where.
        moved: bytes that came from main memory or went there.
        waits: how often the CPU waited for a device.
        limit: bytes that there are.
        failing: the allocations that fail, by their number from 0 on.
        has_float64: whether the devices know this type.
    """

    def __init__(self):
        self._blocks: weakref.WeakValueDictionary[int, _Block] = weakref.WeakValueDictionary()  # by their storage's address
        self.used = 0
        self.reset()

    def reset(self) -> None:
        self.peak, self.allocations, self.devices, self.moved, self.waits = self.used, 0, set(), 0, 0
        self.limit, self.failing, self.has_float64 = float("inf"), range(0), True

    def block(self, raw: torch.Tensor, device: torch.device) -> _Block:
        """What a tensor lies in, which a view shares with the tensor that it is of."""
        with _lock:
            storage = raw.untyped_storage()
            block = self._blocks.get(storage._cdata)
            if block is None:
                block = self._blocks[storage._cdata] = _Block(self, storage)
                self.devices.add(str(device))
            return block

    def take(self, size: int) -> None:
        self.allocations += 1
        if self.used + size > self.limit or self.allocations - 1 in self.failing:
            raise torch.OutOfMemoryError(f"{NAME.upper()} out of memory. Tried to allocate {size} bytes.")
        self.used += size
        self.peak = max(self.peak, self.used)


class _Block:
    """Memory that is in use until no tensor refers to it any more."""

    def __init__(self, memory: Memory, storage: torch.UntypedStorage):
        memory.take(storage.nbytes())
        self._storage = storage  # so that its address stands for this block alone
        self._release = weakref.finalize(self, _release, memory, storage.nbytes())
        self._release.atexit = False

    def data_ptr(self) -> int:
        return self._storage.data_ptr()

    def nbytes(self) -> int:
        return self._storage.nbytes()


def _release(memory: Memory, size: int) -> None:
    with _lock:
        memory.used -= size


memory = Memory()


class DeviceTensor(torch.Tensor):
    """A tensor of one of the devices; `raw` is what it holds, on the CPU."""

    raw: torch.Tensor
    block: _Block

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device):
        if raw.dtype == torch.float64 and not memory.has_float64:
            raise TypeError(f"Cannot convert a tensor to float64, which {device} does not support. Please use float32 instead.")
        block = memory.block(raw, device)
        like = {"dtype": raw.dtype, "layout": raw.layout, "device": device, "requires_grad": False}
        made = torch.Tensor._make_wrapper_subclass(cls, raw.size(), raw.stride(), raw.storage_offset(), **like)
        made.raw, made.block = raw, block
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, *args, **(kwargs or {}))

    def numpy(self, *, force: bool = False):
        if force:
            return self.cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    def __repr__(self, **kwargs) -> str:
        return f"{self.raw!r} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    @property
    def data(self) -> DeviceTensor:
        return DeviceTensor(self.raw.data, self.device)

    @data.setter
    def data(self, value: DeviceTensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.raw, self.block = value.raw, value.block

    def untyped_storage(self) -> _Block:
        return self.block


def _run(op: Any, *args, **kwargs):
    """An operation on tensors of the devices, or one that makes such tensors."""
    tensors: list[torch.Tensor] = []
    ours: dict[int, DeviceTensor] = {}

    def opened(value: Any) -> Any:
        if type(value) is torch.Generator:  # whose `isinstance` is slow
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{value.device.type}'")
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        if isinstance(value, DeviceTensor):
            ours[id(value.raw)] = value
            return value.raw
        return value

    raw_args, raw_kwargs = _mapped(opened, args), {name: _mapped(opened, value) for name, value in kwargs.items()}
    device = _place(op, tensors) if kwargs.get("device") is None else torch.device(kwargs["device"])
    if device.type == NAME and device.index is None:
        device = DEVICES[0]
    if kwargs.get("device") is not None:
        raw_kwargs["device"] = "cpu" if device.type == NAME else device
    if kwargs.get("pin_memory"):
        raise RuntimeError("Only dense CPU tensors can be pinned")
    if op is _aten.histc.default and not raw_args[0].is_floating_point():  # which a CPU does not do, and a GPU does
        found = op(raw_args[0].double(), *raw_args[1:]).to(raw_args[0].dtype)
    else:
        found = op(*raw_args, **raw_kwargs)
    for value in ours.values():
        if value.raw.shape != value.shape or value.raw.stride() != value.stride():
            _set_shape(value, value.raw.shape, value.raw.stride(), value.raw.storage_offset())

    if op in _COPIES and {device.type, *(value.device.type for value in tensors)} != {NAME}:
        memory.moved += tensors[-1].nbytes
    by_mask = op in _INDEXED and any(value.dtype in (torch.bool, torch.uint8) for value in tensors[1:])
    memory.waits += op in _AWAITED or by_mask or (op in _COPIES and device.type == "cpu")

    def closed(raw: Any) -> Any:
        return raw if not isinstance(raw, torch.Tensor) else ours[id(raw)] if id(raw) in ours else DeviceTensor(raw, device)

    return _mapped(closed, found) if device.type == NAME else found


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(_mapped(change, item) for item in value) if isinstance(value, list | tuple) else change(value)


def _in_lower_precision(op: Any, *args, **kwargs):
    """What `torch.autocast` makes of a product."""

    def cast(value: Any) -> Any:
        single = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype(NAME)) if single else value

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return op(*_mapped(cast, args), **{name: cast(value) for name, value in kwargs.items()})


def _place(op: Any, tensors: list[torch.Tensor]) -> torch.device:
    """Where an operation takes place."""
    first = tensors[0].device
    if op in _COPIES:
        return first
    if op in _INDEXED:
        others = {value.device for value in tensors[1:]} - {torch.device("cpu")}
    else:
        others = {value.device for value in tensors if value.dim() or value.device.type != "cpu"}
        first = next(iter(others), first)
    if mixed := others - {first}:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {first} and {mixed.pop()}! (in {op})"
        )
    return first


class _Module:
    """What PyTorch and mergekit ask of `torch.<name of a device>`."""

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available

    @staticmethod
    def device_count() -> int:
        return 2

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[float, float]:
        return memory.limit - memory.used, memory.limit

    @staticmethod
    def memory_reserved(device: Any = None) -> int:
        return memory.used

    memory_allocated = memory_reserved

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass


def register() -> None:
    """Make the devices known to PyTorch, for the rest of this process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module)
    DEVICES[:] = [torch.device(NAME, i) for i in range(_Module.device_count())]
    # `__torch_dispatch__` sees operations that are given one of our tensors, but neither what makes one of nothing, nor what
    # PyTorch does below it.
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        if namespace == "aten" and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
            op, _, overload = rest.partition(".")
            _operations.impl(rest, functools.partial(_run, getattr(getattr(_aten, op), overload or "default")), "PrivateUse1")
    _others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"):
        _operations.impl(name, functools.partial(_in_lower_precision, getattr(_aten, name).default), "AutocastPrivateUse1")


_operations, _others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")


def take_all_merges() -> None:
    """Have every merge of this process run on the devices, unless it says `--device` itself: `--cuda` means them, too."""
    from mergekit.options import MergeOptions

    plain = MergeOptions.__init__
    MergeOptions.__init__ = lambda self, **given: plain(self, **given | {"device": given.get("device") or NAME})
    # mergekit's executor for several devices knows the streams of CUDA and XPU only.
    torch.cuda.Stream = lambda device: device
    torch.cuda.stream = contextlib.nullcontext


@contextlib.contextmanager
def all_freed() -> Iterator[None]:
    """Fail if what runs inside leaves anything in the devices' memory."""
    before = memory.used
    memory.reset()
    try:
        yield
    finally:
        memory.reset()
    if memory.used > before:  # by a cycle of references, perhaps
        gc.collect()
    assert memory.used <= before, f"{memory.used - before} bytes are left on the device"
