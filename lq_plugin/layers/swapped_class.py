"""Classes that a module can take on while it lives: the additions come first, its own class stays a base."""

from __future__ import annotations

from typing import Any


def swapped_class(mixins: tuple[type, ...], kind: type, content: dict[str, Any]) -> type[Any]:
    """A subclass of `kind` with `mixins` before it in the order of lookup, which objects of `kind` may be turned into.

    Python turns them where both classes have their `__dict__` from the same base, and a class has its own from its
    first base. That is `nn.Module` nearly always, but not in `class Encoder(ABC, nn.LSTM)`: there `kind` itself becomes
    the first base.

    Args:
        mixins: classes that come first.
        kind: class of the objects.
        content: attributes of the new class.
    """
    name, bases = f"Quantized{kind.__name__}", (*mixins, kind)
    if _dict_from(mixins[0]) is _dict_from(kind):
        return type(name, bases, content)
    found: type[Any] = _MixinsFirst.of(type(kind))(name, (kind, *mixins), content)
    return found


def _dict_from(cls: type) -> type:
    """The class that brought the `__dict__` of a class's objects."""
    while cls.__base__ is not None and cls.__base__.__dictoffset__:
        cls = cls.__base__
    return cls


class _MixinsFirst(type):
    """Metaclass: looks in bases after the first one before it looks in the first."""

    @classmethod
    def of(cls, metaclass: type) -> type:
        return cls if metaclass is type else type("MixinsFirst", (cls, metaclass), {})

    def mro(cls) -> list[type]:
        order = super().mro()
        kind = cls.__bases__[0]
        mixins = [base for base in order[1:] if not issubclass(kind, base)]
        return [cls, *mixins, *(base for base in order[1:] if base not in mixins)]
