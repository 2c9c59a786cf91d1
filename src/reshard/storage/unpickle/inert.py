"""What a pickle names and nobody imports: Globals, and the objects that they did not make.

    Global      a class or a function by its name
    Inert       an object: the call that makes it, and what is done to it afterwards
    Rebuilt     an Inert around a tensor
    Record      an instance of a class that there are hundreds of thousands of: its state and nothing else

An Inert's type is the Global that made it, and a Global's base says what its instances are. So `isinstance`, NEWOBJ
and BUILD do what the C unpickler expects of them, and reach nothing but what is here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

from reshard.storage.unpickle.limits import spend

COPYREG = ("copyreg", "copy_reg")
CLASS_ARGUMENT = ("_reconstructor", "__newobj__", "__newobj_ex__")
"""Functions of `copyreg` whose first argument is the class of what they return."""


Call = Callable[["Global", tuple[Any, ...]], object]
"""What calling a Global with these arguments gives; None where the call is to be recorded."""


class Inert:
    """An object that was not made: how the pickle makes it, and what it then does to it, in order.

    Equality and hash are of the identity.
    """

    __slots__ = ("args", "changes", "constructor", "kwargs")

    constructor: str
    """`reduce`: the Global was called. `newobj`: its `__new__` was. `call`: an Inert was, the first of `args`."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any] | None
    changes: list[tuple[str, Any]]
    """("build", state), ("extend", [items]), ("setitem", (key, value)), ("add", item)"""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        if not isinstance(cls, Global):
            raise TypeError("an Inert is made by calling a Global")
        return recorded(cast(Global, cls), "newobj", args, kwargs or None)

    @property
    def maker(self) -> Global:
        """The class or function that the pickle calls."""
        return cast(Global, type(self))

    @property
    def cls(self) -> Global:
        """The object's class, or the function that returns the object."""
        maker = self.maker
        if self.constructor == "reduce" and maker.name in CLASS_ARGUMENT and maker.module in COPYREG:
            named = self.args[0] if self.args else None
            return named if isinstance(named, Global) else maker
        return maker

    @property
    def state(self) -> Any:
        """What the last BUILD gave; (dict or None, slots dict) as one dict. None without BUILD."""
        return _merged(self._given_state())

    def attr(self, name: str, default: object = None) -> Any:
        """The attribute, if the state is a dict that holds it; otherwise `default`."""
        return _attribute(self._given_state(), name, default)

    def _given_state(self) -> object:
        return next((state for kind, state in reversed(self.changes) if kind == "build"), None)

    def __repr__(self) -> str:
        return f"<Inert {shown(self.maker)}>"

    # The unpickler calls what follows.

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return recorded(self.maker, "call", (self, *args), kwargs or None)

    def __setstate__(self, state: object) -> None:
        self.changes.append(("build", state))

    def extend(self, items: list[object]) -> None:
        self.changes.append(("extend", items))

    def append(self, item: object) -> None:
        self.changes.append(("extend", [item]))

    def __setitem__(self, key: object, value: object) -> None:
        self.changes.append(("setitem", (key, value)))

    def add(self, item: object) -> None:
        self.changes.append(("add", item))


class Rebuilt(Inert):
    """A tensor subclass, or a tensor with attributes of its own (`torch._tensor._rebuild_from_type_v2`)."""

    __slots__ = ("inner",)

    inner: object
    """What gets the type and the state: a TensorRef, or an Inert for a wrapper subclass such as DTensor."""

    @property
    def cls(self) -> Global:
        """The type: DTensor, ShardedTensor, Parameter, ..."""
        if self.maker.name == "_rebuild_from_type_v2":
            named = self.args[1]
            return named if isinstance(named, Global) else self.maker
        return Global("torch.nn.parameter", "Parameter")

    def _given_state(self) -> object:
        """What a BUILD gave; without one, what the constructor was given."""
        built = super()._given_state()
        return self.args[3] if built is None and len(self.args) > 3 else built


class Record:
    """An instance of a DCP metadata class, as light as it can be. Equality and hash are of the identity."""

    __slots__ = ("_state",)

    _state: Any

    def __setstate__(self, state: object) -> None:
        self._state = state

    @property
    def cls(self) -> Global:
        """Its class."""
        return cast(Global, type(self))

    @property
    def state(self) -> Any:
        """What the last BUILD gave: a dict of the attributes, for TensorProperties a tuple; None without BUILD."""
        try:
            return self._state
        except AttributeError:
            return None

    def attr(self, name: str, default: object = None) -> Any:
        """The attribute, if the state holds it; otherwise `default`."""
        return _attribute(self.state, name, default)

    def __repr__(self) -> str:
        return f"<Record {shown(type(self))}>"


class Global(type):
    """A class or a function by its name, which was not imported. Two of the same name are equal.

    Calling it records the call, and the result is an `Inert`. What a load gives for a name in `calls` gives the value
    itself.
    """

    _name: tuple[str, str]
    _call: Call | None

    def __new__(metacls, module: str, name: str) -> Global:
        return global_named(module, name)

    def __init__(cls, *args: object) -> None:
        pass

    @property
    def gives_value(cls) -> bool:
        """Whether a call may give something else than an Inert."""
        return cls._call is not None

    @property
    def module(cls) -> str:
        return cls._name[0]

    @property
    def name(cls) -> str:
        """The qualified name, `Outer.Inner`."""
        return cls._name[1]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls._call is not None and not kwargs:
            value = cls._call(cls, args)
            if value is not None:
                return value
        return recorded(cls, "reduce", args, kwargs or None)

    def __eq__(cls, other: object) -> bool:
        return cls is other or (isinstance(other, Global) and cls._name == other._name)

    def __hash__(cls) -> int:
        return hash(cls._name)

    def __repr__(cls) -> str:
        return f"Global({cls._name[0]!r}, {cls._name[1]!r})"

    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError(f"{cls!r} does not change")

    __delattr__ = None  # type: ignore[assignment]


def _state_dicts(state: object) -> tuple[dict[Any, Any], ...]:
    """The dicts that hold the attributes; slots, which come second in (dict or None, slots), first."""
    if type(state) is tuple and len(state) == 2 and isinstance(state[1], dict):
        first, slots = state
        if first is None or isinstance(first, dict):
            return (slots, first or {})
    return (state,) if isinstance(state, dict) else ()


def _merged(state: object) -> object:
    """(dict or None, slots dict) as one dict; any other state as it is."""
    dicts = _state_dicts(state)
    return {**dicts[1], **dicts[0]} if len(dicts) == 2 else state


def _attribute(state: object, name: str, default: object) -> Any:
    for attributes in _state_dicts(state):
        if name in attributes:
            return attributes[name]
    return default


def recorded(cls: Global, constructor: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Inert:
    """The Inert of a call."""
    if len(args) > 8 or kwargs:
        spend(len(args) + len(kwargs or ()))
    made = cast(Inert, object.__new__(cast(Any, cls)))
    made.constructor, made.args, made.kwargs, made.changes = constructor, args, kwargs, []
    return made


@lru_cache(maxsize=1024)
def global_named(module: str, name: str, base: type[Inert] | type[Record] = Inert, call: Call | None = None) -> Global:
    """The type for a name: what its instances are, and what calling it gives.

    Shared between loads, which is safe because a Global refuses every change.
    """
    return type.__new__(Global, base.__name__, (base,), {"__slots__": (), "_name": (module, name), "_call": call})


def shown(value: object) -> str:
    """A short text for a message. Values of a hostile pickle are not printed: their repr may be endless."""
    if isinstance(value, Global):
        return f"{value.module}.{value.name}"[:200]
    return ascii(value[:100]) if type(value) is str else f"a {type(value).__name__}"
