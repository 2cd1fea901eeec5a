"""Reads pickles of arrays, strings, numbers, and collections of them, and trusts none.

Python's own unpickler hashes, allocates and calls what the file says. A file of a few hundred bytes
can make it hang, take all memory, or hand out memory that was never written. So here the few
instructions that official files have are followed one by one. Each takes constant time, or time in
proportion to its length in the file; arrays come of bytes of the file alone.
"""

import math
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Array:
    """An array, as a file describes it: not yet checked, except for the types of the parts.

    Attributes:
      shape: its shape.
      dtype: its dtype's code.
      by_columns: whether the first axis is the fastest.
      content: its bytes.
    """

    shape: tuple[int, ...] = ()
    dtype: str = ""
    by_columns: bool = False
    content: bytes = b""

    def build(self, state: Any) -> None:
        """Takes what the pickle says of it, as NumPy writes it.

        Raises:
          UnpicklingError: If that is no state of an array.
        """
        match state:
            case (int(), tuple(shape), _Dtype(code=code), int(by_columns), bytes(content)):
                if len(shape) <= 4 and all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
                    self.shape, self.dtype = shape, code
                    self.by_columns, self.content = bool(by_columns), content
                    return
        raise pickle.UnpicklingError("it has an array that no NumPy has written")

    def of_bytes(self) -> np.ndarray | None:
        """The array, if it is one of bytes, and whole."""
        if self.dtype != "u1" or math.prod(self.shape) != len(self.content):
            return None
        order = "F" if self.by_columns else "C"
        return np.frombuffer(self.content, np.uint8).reshape(self.shape, order=order)


@dataclass
class _Dtype:
    """A dtype, by its code. What else NumPy writes of it says nothing about bytes."""

    code: str

    def build(self, state: Any) -> None:
        """Takes what the pickle says of it besides."""


def _array(*args: Any) -> Array:
    del args  # a class, and a shape and a dtype without meaning: the state follows
    return Array()


def _dtype(code: Any, *args: Any) -> _Dtype:
    del args
    return _Dtype(code.decode("latin1") if isinstance(code, bytes) else str(code)[:9])


def _encoded(text: Any, encoding: Any) -> bytes:
    """Bytes, as Python 3 writes them for Python 2.

    Raises:
      UnpicklingError: If it is another encoding, or no text.
    """
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes in {shown(encoding)}, as CIFAR never does")
    return text.encode("latin1")


# All names that the official pickles refer to, and the names that newer versions write instead.
_CALLS: dict[str, Callable[..., Any] | None] = {
    "numpy ndarray": None,  # only named
    "numpy dtype": _dtype,
    "numpy.core.multiarray _reconstruct": _array,
    "numpy._core.multiarray _reconstruct": _array,
    "_codecs encode": _encoded,
}
_SKIPPED = {"PROTO", "FRAME"}
_LITERALS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # of Python 2
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def loads(content: bytes) -> Any:
    """What a pickle holds.

    Args:
      content: The pickle's bytes.

    Returns:
      Its value. An array is an `Array`, a string of Python 2 is bytes.

    Raises:
      UnpicklingError: If there is anything in it that CIFAR's files never have.
      Exception: If it is damaged, in any way.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the marks
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    arg: Any
    for opcode, arg, _ in pickletools.genops(content):
        match opcode.name:
            case name if name in _SKIPPED:
                pass
            case name if name in _NUMBERS or name in _TEXTS or name in _BYTES:
                stack.append(arg)
            case name if name in _STRINGS:
                stack.append(arg.encode("latin1"))
            case name if name in _LITERALS:
                stack.append(_LITERALS[name])
            case name if name in _PUTS:
                memo[arg] = stack[-1]
            case name if name in _GETS:
                stack.append(memo[arg])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "MARK":
                below.append(stack)
                stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case name if name in _TUPLES:
                stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "LIST":
                items = since_mark()
                stack.append(items)
            case "DICT":
                items = since_mark()
                stack.append(_updated({}, items))
            case "APPEND":
                item = stack.pop()
                _list(stack[-1]).append(item)
            case "APPENDS":
                items = since_mark()
                _list(stack[-1]).extend(items)
            case "SETITEM":
                items = [stack.pop(), stack.pop()][::-1]
                _updated(stack[-1], items)
            case "SETITEMS":
                items = since_mark()
                _updated(stack[-1], items)
            case "GLOBAL":
                stack.append(_named(arg))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_named(f"{shown(module, '')} {shown(name, '')}"))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                if not (isinstance(function, _Call) and function.call and type(args) is tuple):
                    raise pickle.UnpicklingError("it calls what CIFAR never does")
                stack.append(function.call(*args))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], Array | _Dtype):
                    raise pickle.UnpicklingError("it has a state of what has none")
                stack[-1].build(state)
            case "STOP":
                return stack.pop()
            case name:
                raise pickle.UnpicklingError(f"it has the instruction {name}, as CIFAR never does")
    raise pickle.UnpicklingError("it does not end")


@dataclass
class _Call:
    """A name that the pickle refers to, and what stands for it."""

    call: Callable[..., Any] | None


def _named(name: str) -> _Call:
    if name not in _CALLS:
        words = ".".join(name.split(" ", 1))[:80]
        raise pickle.UnpicklingError(f"it refers to {words}, as CIFAR never does")
    return _Call(_CALLS[name])


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise pickle.UnpicklingError("it appends to what is no list")
    return value


def _updated(found: Any, items: list[Any]) -> dict[Any, Any]:
    """A dictionary with more entries: keys and values in turn.

    Raises:
      UnpicklingError: If it is none, or a key is not bytes, a string or a number: one that has
        others in it may take for ever to hash.
    """
    keys = items[::2]
    if type(found) is not dict or not all(type(key) in (bytes, str, int) for key in keys):
        raise pickle.UnpicklingError("it has a dictionary that CIFAR never has")
    found.update(zip(keys, items[1::2], strict=True))
    return found


def shown(value: Any, quote: str = "'") -> str:
    """A value in a message: short, and without looking into it, however it is nested."""
    match value:
        case None | bool() | float():
            return repr(value)
        case int() if abs(value) < 10**9:
            return repr(value)
        case bytes():
            return shown(value[:40].decode("latin1"), quote)
        case str():
            text = value[:40].encode("unicode_escape").decode("ascii")
            return f"{quote}{text}{quote}"
    return f"<{type(value).__name__}>"
