"""Reading pickles without unpickling: an own little stack machine that makes plain data and calls nothing.

Unpickling runs what a file says, so a pickle is read here opcode by opcode (`pickletools.genops`). What it can make is
plain: None, bool, int, float, str, bytes, list, tuple, dict, set, numpy arrays and scalars of numbers, and `Instance`,
the attributes of an object of any class, which is never imported. Every other opcode, and every call of anything but
`CALLS`, is refused with its position.
"""

from __future__ import annotations

import math
import pickletools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.errors import DataError

MAX_BYTES = 1 << 30
MAX_OPCODES = 100_000_000
MAX_MEMO = 20_000_000
MAX_DIMENSIONS = 50  # of an array
NUMBER = re.compile(r"[<>=|]?([biuf])([1248])")

# ------------------------------------------------------------------------------------------------- the stack machine


@dataclass(eq=False)
class Instance:
    """An object's attributes; `cls` is the name of its class."""

    cls: str
    attributes: dict[str, Any] | None = None  # None until the pickle gives them


@dataclass(frozen=True, eq=False)
class Global:
    """A name that the pickle refers to."""

    name: str


@dataclass(eq=False)
class _Array:
    """A numpy array between its making and its state."""

    value: np.ndarray | None = None


@dataclass(eq=False)
class _DType:
    """A numpy data type of numbers."""

    text: str

    def numpy(self) -> np.dtype:
        return np.dtype(self.text)


class _Mark:
    pass


MARK = _Mark()


class Refused(ValueError):
    """What a pickle asks for and is not given."""


def _is(value, *types) -> bool:
    return type(value) in types


def _plain_key(key) -> bool:
    if _is(key, tuple):
        return len(key) < 100 and all(map(_plain_key, key)) and not any(_is(k, tuple) for k in key)
    return key is None or _is(key, bool, int, float, str, bytes)


def _dtype(*args) -> _DType:
    if not args or not _is(args[0], str) or not NUMBER.fullmatch(args[0]):
        raise Refused(f"numpy.dtype of {args[0] if args else 'nothing'!r}, which is no plain number")
    return _DType(args[0])


def _array_of(data, dtype, shape, order="C") -> np.ndarray:
    """Numbers from bytes, whose count must be what the shape says."""
    if not _is(dtype, _DType) or not _is(data, bytes, bytearray) or not _is(shape, tuple, int):
        raise Refused("an array whose data are no plain numbers")
    shape = (shape,) if _is(shape, int) else shape
    if len(shape) > MAX_DIMENSIONS or not all(_is(n, int) and n >= 0 for n in shape):
        raise Refused("an array of an impossible shape")
    kind = dtype.numpy()
    if math.prod(shape) * kind.itemsize != len(data):
        raise Refused(f"an array of shape {shape} with {len(data)} bytes")
    return np.frombuffer(bytes(data), kind).reshape(shape, order="F" if order in ("F", True) else "C")


def _scalar(dtype, data) -> Any:
    return _array_of(data, dtype, ()).item()


def _encoded(text, encoding) -> bytes:
    """How protocols 0 to 2 write bytes."""
    if not _is(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("_codecs.encode of something else than bytes")
    return text.encode("latin1")


def _ordered(*args) -> dict:
    if not args:
        return {}
    if len(args) == 1 and _is(args[0], list) and all(_is(p, tuple, list) and len(p) == 2 for p in args[0]):
        return _dict_of([x for pair in args[0] for x in pair])
    raise Refused("a collections.OrderedDict of something else than pairs")


def _set_of(*args) -> set:
    items = args[0] if len(args) == 1 and _is(args[0], list, tuple) else None
    if (items is None and args) or not all(map(_plain_key, items or ())):
        raise Refused("a set of something else than plain values")
    return set(items or ())


def _bytes_of(*args) -> bytes:
    if args and not (len(args) == 1 and _is(args[0], bytes)):
        raise Refused("bytes of something else than bytes")
    return args[0] if args else b""


def _object_of(cls, base, state) -> Instance:
    """copyreg._reconstructor of a class without a built-in base."""
    if not _is(cls, Global) or not _is(base, Global) or base.name not in OBJECT or state is not None:
        raise Refused("copyreg._reconstructor of an object with a built-in base class")
    return Instance(cls.name)


OBJECT = ("builtins.object", "__builtin__.object")
CALLS: dict[str, Callable] = {
    "collections.OrderedDict": _ordered,
    "copyreg._reconstructor": _object_of,
    "copy_reg._reconstructor": _object_of,
    "_codecs.encode": _encoded,
    "numpy.dtype": _dtype,
}
for _builtins in ("builtins", "__builtin__"):
    CALLS |= {f"{_builtins}.set": _set_of, f"{_builtins}.frozenset": _set_of, f"{_builtins}.bytes": _bytes_of}
for _core in ("numpy.core", "numpy._core"):
    CALLS |= {
        f"{_core}.multiarray._reconstruct": lambda *args: _Array(),
        f"{_core}.multiarray.scalar": _scalar,
        f"{_core}.numeric._frombuffer": _array_of,
    }


def _dict_of(items: Sequence) -> dict:
    if len(items) % 2:
        raise Refused("a key without its value")
    for key in items[::2]:
        if not _plain_key(key):
            raise Refused(f"a {type(key).__name__} as a dictionary's key")
    return dict(zip(items[::2], items[1::2], strict=True))


@dataclass
class _Machine:
    """The stack and the memo of one pickle."""

    stack: list = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self):
        if not self.stack or self.stack[-1] is MARK:
            raise Refused("nothing on the stack")
        return self.stack.pop()

    def top(self, *types):
        if not self.stack or type(self.stack[-1]) not in types:
            raise Refused(f"no {' or '.join(t.__name__ for t in types)} on the stack")
        return self.stack[-1]

    def to_mark(self) -> list:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise Refused("no mark on the stack")

    def popped(self, count: int) -> tuple:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def remember(self, index: int) -> None:
        if len(self.memo) >= MAX_MEMO:
            raise Refused(f"more than {MAX_MEMO} memo entries")
        if not self.stack or self.stack[-1] is MARK:
            raise Refused("nothing to remember")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"memo entry {index}, which was never made")
        value = self.memo[index]
        self.stack.append(value.value if _is(value, _Array) and value.value is not None else value)

    def set_items(self, items: Sequence) -> None:
        self.top(dict).update(_dict_of(items))

    def add_items(self, items: Sequence) -> None:
        if not all(map(_plain_key, items)):
            raise Refused("something in a set that is no plain value")
        self.top(set).update(items)

    def new_object(self, arguments) -> None:
        cls = self.pop()
        if not _is(cls, Global):
            raise Refused("an object of something that is no class")
        if arguments not in ((), {}):
            raise Refused(f"{cls.name} made with arguments")
        self.stack.append(Instance(cls.name))

    def call(self) -> None:
        args, function = self.pop(), self.pop()
        if not _is(function, Global) or not _is(args, tuple):
            raise Refused("a call of something that is no name")
        if function.name not in CALLS:
            raise Refused(f"a call of {function.name}")
        try:
            self.stack.append(CALLS[function.name](*args))
        except TypeError as error:
            raise Refused(f"{function.name} with arguments that it does not take") from error

    def build(self) -> None:
        """An object's attributes, an array's data, a data type's byte order."""
        state = self.pop()
        target = self.top(Instance, _Array, _DType)
        if _is(target, _Array):
            if target.value is not None or not _is(state, tuple) or len(state) != 5:
                raise Refused("an array with a second or an unknown state")
            _, shape, dtype, fortran, data = state
            target.value = self.stack[-1] = _array_of(data, dtype, shape, bool(fortran))
        elif _is(target, _DType):
            if not _is(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
                raise Refused("a numpy.dtype that is no plain number")
            target.text = state[1] + target.text.lstrip("<>=|")
        else:
            if target.attributes is not None:
                raise Refused(f"a second state of one object of {target.cls}")
            target.attributes = _attributes(target.cls, state)


def _attributes(cls: str, state) -> dict:
    """A state as Python gives it by itself: a dictionary, or a pair of it and the slots'."""
    parts = state if _is(state, tuple) and len(state) == 2 else (state,)
    found: dict = {}
    for part in parts:
        if part is None:
            continue
        if not _is(part, dict) or not all(_is(k, str) for k in part):
            raise Refused(f"a state of {cls} that is no dictionary, for a __setstate__ of its own")
        if special := [k for k in part if k.startswith("__")]:
            raise Refused(f"the attribute {special[0]} of {cls}")
        found |= part
    return found


def _stack_global(m: _Machine) -> None:
    module, name = m.popped(2)
    if not _is(module, str) or not _is(name, str):
        raise Refused("a name that is no text")
    m.stack.append(Global(f"{module}.{name}"))


def _frozen(m: _Machine, items: list) -> None:
    m.stack.append(set())
    m.add_items(items)


def _push(m: _Machine, value) -> None:
    m.stack.append(value)


STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, a: None),
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
         "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
         "BINBYTES8", "BYTEARRAY8"), _push,
    ),
    "NONE": lambda m, a: _push(m, None),
    "NEWTRUE": lambda m, a: _push(m, True),
    "NEWFALSE": lambda m, a: _push(m, False),
    "MARK": lambda m, a: _push(m, MARK),
    "POP": lambda m, a: m.stack.pop() if m.stack else m.pop(),
    "POP_MARK": lambda m, a: m.to_mark(),
    "DUP": lambda m, a: _push(m, m.stack[-1] if m.stack else m.pop()),
    "EMPTY_LIST": lambda m, a: _push(m, []),
    "EMPTY_TUPLE": lambda m, a: _push(m, ()),
    "EMPTY_DICT": lambda m, a: _push(m, {}),
    "EMPTY_SET": lambda m, a: _push(m, set()),
    "LIST": lambda m, a: _push(m, m.to_mark()),
    "TUPLE": lambda m, a: _push(m, tuple(m.to_mark())),
    "TUPLE1": lambda m, a: _push(m, m.popped(1)),
    "TUPLE2": lambda m, a: _push(m, m.popped(2)),
    "TUPLE3": lambda m, a: _push(m, m.popped(3)),
    "DICT": lambda m, a: _push(m, _dict_of(m.to_mark())),
    "FROZENSET": lambda m, a: _frozen(m, m.to_mark()),
    "APPEND": lambda m, a: (lambda item: m.top(list).append(item))(m.pop()),
    "APPENDS": lambda m, a: (lambda items: m.top(list).extend(items))(m.to_mark()),
    "SETITEM": lambda m, a: (lambda items: m.set_items(items))(m.popped(2)),
    "SETITEMS": lambda m, a: (lambda items: m.set_items(items))(m.to_mark()),
    "ADDITEMS": lambda m, a: (lambda items: m.add_items(items))(m.to_mark()),
    "GLOBAL": lambda m, a: _push(m, Global(a.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda m, a: _stack_global(m),
    "REDUCE": lambda m, a: m.call(),
    "NEWOBJ": lambda m, a: m.new_object(m.pop()),
    "NEWOBJ_EX": lambda m, a: m.new_object(m.pop() or m.pop()),
    "BUILD": lambda m, a: m.build(),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, a: m.remember(a)),
    "MEMOIZE": lambda m, a: m.remember(len(m.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, a: m.recall(a)),
}  # fmt: skip


def _opcodes(data: bytes):
    """`pickletools.genops`, without its warnings of strange escapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from pickletools.genops(data)


def read_pickle(data: bytes, name: str = "the pickle") -> Any:
    """The plain data of a pickle, of any protocol; nothing is imported, called or executed.

    Raises:
        DataError: truncated, too large, or an opcode or name that is not allowed; the message has its position.
    """
    if len(data) > MAX_BYTES:
        raise DataError(f"{name} has {len(data)} bytes, more than {MAX_BYTES}; split it")
    machine, operation, position = _Machine(), "its start", 0
    try:
        for count, (opcode, argument, place) in enumerate(_opcodes(data)):
            operation, position = opcode.name, place
            if count >= MAX_OPCODES:
                raise Refused(f"more than {MAX_OPCODES} opcodes")
            if operation == "STOP":
                result = machine.pop()
                if machine.stack:
                    raise Refused("more than one thing at the end")
                return result
            if operation not in STEPS:
                raise Refused("an opcode that plain data does not need")
            STEPS[operation](machine, argument)
    except Refused as error:
        raise DataError(f"{name}: refused {operation} at byte {position}: {error}; nothing was executed") from None
    except (ValueError, UnicodeError, OverflowError, IndexError, MemoryError, RecursionError) as error:
        what = " ".join(str(error).split())[:200]
        raise DataError(f"{name} is no readable pickle behind byte {position} ({what})") from None
    raise DataError(f"{name} ends without STOP")
