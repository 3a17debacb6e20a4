"""Reads plain data from pickles: known names become records, and all others are refused.

Python's own unpickler runs what a pickle names, and a few bytes can make it fill the memory. This
is its version in Python with some operations only: none calls anything but a given function with
few arguments, and their number is bounded.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

_MOST_OPERATIONS, _MOST_ARGUMENTS, _MOST_KEY = 2**25, 16, 2**60
_OPERATIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "LONG1", "BINFLOAT"),
    *("BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINUNICODE", "BINPERSID"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL"),
    *("REDUCE", "NEWOBJ", "BUILD"),
    *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
)


class Record:
    """Any object of a pickle; ``state`` is what was pickled of it."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments

    def get(self, name: str) -> Any:
        """A field of the object.

        Raises:
            ValueError: it has no such field.
        """
        if not isinstance(self.state, dict) or name not in self.state:
            raise ValueError(f"{name}: missing")
        return self.state[name]


# names in pickles, (module, name), and their meanings: Record, a function or a plain value
Known = Mapping[tuple[str, str], Any]


def unpickle(data: bytes, known: Known, persistent_load: Callable[[Any], Any] | None = None) -> Any:
    """The object in a pickle; ``persistent_load`` gives the objects that lie outside of it.

    Raises:
        ValueError: the pickle is damaged, too long, or names something that is not known.
    """
    try:
        return _Unpickler(data, known, persistent_load).load()
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot be read: {reason:.200}") from None


class _Unpickler(pickle._Unpickler):
    def __init__(
        self, data: bytes, known: Known, persistent_load: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._known, self._persistent_load = known, persistent_load
        self.left = _MOST_OPERATIONS

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise ValueError(f"{module}.{name} is not known")
        return self._known[module, name]

    def persistent_load(self, found: Any) -> Any:
        if self._persistent_load is None:
            raise ValueError("it refers to objects elsewhere")
        return self._persistent_load(found)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not any(function is one for one in self._known.values()):
            raise ValueError("it calls what is no function")
        if type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS:
            raise ValueError(f"a call has more than {_MOST_ARGUMENTS} arguments")
        return function(*arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is dict:
            return  # torch's notes on a dictionary of weights
        if type(self.stack[-1]) is not Record:
            raise ValueError("it changes what is no record")
        self.stack[-1].state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def _set(self, target: Any, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        # the hash of nested tuples can take forever, and large numbers can have equal hashes
        if type(target) is not dict or not all(map(_is_key, keys)):
            raise ValueError("a key is neither a text nor a small number")
        target.update(zip(keys, values, strict=True))


def _is_key(found: object) -> bool:
    return type(found) in (str, Record) or (type(found) is int and abs(found) < _MOST_KEY)


def _counted(function: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(unpickler: _Unpickler) -> None:
        unpickler.left -= 1
        if unpickler.left < 0:
            raise ValueError(f"it has more than {_MOST_OPERATIONS} operations")
        function(unpickler)

    return run


def _dispatch() -> dict[int, Callable[[Any], None]]:
    """The operations by their code: those of Python, or of ``_Unpickler`` where it has its own."""
    codes = {getattr(pickle, name)[0]: f"load_{name.lower()}" for name in _OPERATIONS}
    own = vars(_Unpickler)
    return {
        code: _counted(own.get(name) or pickle._Unpickler.dispatch[code])
        for code, name in codes.items()
    }


_Unpickler.dispatch = _dispatch()
