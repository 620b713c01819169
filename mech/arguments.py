"""What public functions take: declared once, in their signatures, and checked before any work is done.

    @checked
    def ablation(model: HookedMLLM, samples: SampleList, *, n_random: Count = 20, seed: Seed = 0): ...

``checked`` compares every argument with its annotation. A plain ``int`` means a whole number and not a bool, a plain
``float`` a finite number; the ``Annotated`` types of this file say more. An argument that does not fit is refused with
a ``MechError``: what was given, what was expected, one thing to do. This is for public functions, not for inner loops,
and it checks one argument at a time: conditions on several of them are up to the function.
"""

import collections.abc
import functools
import inspect
import math
import numbers
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

import numpy as np

from mech.errors import ExperimentError, MechError, suggestion

Progress = Callable[[int, int], None]  # called with (done, total)
NamedProgress = Callable[[str, int, int], None]  # called with (what, done, total)
F, C = TypeVar("F", bound=Callable[..., Any]), TypeVar("C", bound=type)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its type: in words, and as a test."""

    expected: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:  # signatures in the documentation show it
        return self.expected


@dataclass(frozen=True)
class Reading:
    """How to read a value, instead of testing its type: ``read(name, value)`` returns what the function gets."""

    read: Callable[[str, Any], Any]
    expected: str

    def __repr__(self) -> str:
        return self.expected


def one_of(words: Iterable[str]) -> Any:
    """One of a list of words."""
    return Literal[tuple(words)]


def some_of(words: Iterable[str]) -> Any:
    """A non-empty list of words, all from a given list."""
    return Annotated[collections.abc.Sequence[one_of(words)], NOT_EMPTY]


def at_least(least: int) -> Rule:
    """A whole number that is not too small: ``Annotated[int, at_least(2)]``."""
    return Rule(f"a whole number of at least {least}", lambda value: value >= least)


NOT_EMPTY = Rule("at least one", lambda value: len(value) > 0)
Count = Annotated[int, at_least(1)]
Whole = Annotated[int, at_least(0)]
Seed = Annotated[int, Rule("one whole number of at least 0", lambda value: value >= 0)]
Positive = Annotated[float, Rule("a finite number above 0", lambda value: value > 0)]
Share = Annotated[float, Rule("a number strictly between 0 and 1", lambda value: 0 < value < 1)]
Text = Annotated[str, Rule("a non-empty string", lambda value: bool(value.strip()))]
# An int counts heads (or positions), a float is a share of all: see `Ranking.count`.
Amount = Annotated[
    int | float,
    Rule(
        "an int from 1, or a share between 0.0 and 1.0",
        lambda value: value >= 1 if is_whole(value) else 0 < value < 1,
    ),
]


def given_by(function: str, *variables: str) -> Any:
    """A dataset returned by a function, recognised by its variables."""
    return Annotated[
        Any,
        Rule(
            f"a result of mech.{function}",
            lambda value: hasattr(value, "data_vars") and all(name in value.variables for name in variables),
        ),
    ]


def checked(function: F, error: type[MechError] = ExperimentError) -> F:
    """Make a function refuse arguments that do not fit its annotations; for a class, its constructor.

    Args:
        function: a function, a method or a class.
        error: the ``MechError`` to raise; ``checking(InputError)`` is the decorator with another one.
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__, error)  # type: ignore[misc]
        return function  # type: ignore[return-value]
    name = function.__qualname__.removesuffix(".__init__")

    @functools.cache  # at the first call: by then every name in an annotation is known
    def expected() -> tuple[inspect.Signature, dict[str, Any]]:
        signature = inspect.signature(function, eval_str=True)
        return signature, {key: parameter.annotation for key, parameter in signature.parameters.items()}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        signature, hints = expected()
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as problem:
            raise _unbound(name, signature, kwargs, str(problem), error) from None
        free = [parameter for key, parameter in signature.parameters.items() if key not in bound.arguments]
        for place, (key, value) in enumerate(bound.arguments.items()):
            parameter = signature.parameters[key]
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[key] = tuple(_taken(name, parameter, item, error) for item in value)
            elif parameter.kind is not inspect.Parameter.VAR_KEYWORD and hints[key] is not inspect.Parameter.empty:
                bound.arguments[key] = _taken(name, parameter, value, error, free if place < len(args) else ())
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def checking(error: type[MechError]) -> Callable[[F], F]:
    """``checked``, with another error."""
    return functools.partial(checked, error=error)  # type: ignore[return-value]


def short(value: Any) -> str:
    """A value in a few words, whatever it is."""
    try:
        return _SHORT.repr(value)
    except Exception:  # the repr of something broken
        return f"a {type(value).__name__}"


def _taken(
    function: str,
    parameter: inspect.Parameter,
    value: Any,
    error: type[MechError],
    free: Iterable[inspect.Parameter] = (),
) -> Any:
    """The value as the function gets it, or an error; ``free`` are parameters that may have been meant."""
    name, hint, default = parameter.name, parameter.annotation, parameter.default
    if value is default:  # the default, given explicitly
        return value
    if isinstance(value, Iterator) and not fits(value, hint):
        value = list(value)  # an iterator has to be kept to be checked
    if (reading := _reading(hint)) is not None:
        if value is None and fits(None, hint):
            return value
        return reading.read(name, value)
    if fits(value, hint):
        return value
    do = _advice(parameter, value, free) or f"see help({function})"
    raise error(f"{name}={short(value)} in {function}", wanted(hint), do)


def _advice(parameter: inspect.Parameter, value: Any, free: Iterable[inspect.Parameter]) -> str:
    """One thing to do about a value that does not fit: spell it right, name what was meant, or leave it out."""
    name, hint, default = parameter.name, parameter.annotation, parameter.default
    several = isinstance(value, list | tuple)
    if words := _words_of(hint):
        unknown = (item for item in (value if several else [value]) if isinstance(item, str) and item not in words)
        if (word := next(unknown, None)) is not None:
            return suggestion(word, words)
    if fits([value], hint):
        return f"pass {name}=[...]"
    if value and several and all(fits(item, hint) for item in value):
        return "call it once for each"
    # Numbers and texts fit too many parameters to be a clue.
    if not isinstance(value, str | numbers.Number):
        for other in free:
            if other.annotation not in (Any, inspect.Parameter.empty) and fits(value, other.annotation):
                return f"pass it by name: {other.name}=..."
    return f"leave {name} out ({short(default)})" if default not in (inspect.Parameter.empty, MISSING) else ""


def _unbound(
    function: str, signature: inspect.Signature, given: Mapping[str, Any], problem: str, error: type[MechError]
) -> MechError:
    names = [name for name in signature.parameters if name != "self"]
    unknown = [name for name in given if name not in names]
    if unknown:
        problem = f"got an unexpected keyword argument {unknown[0]!r}"
    missing = re.match("missing a required argument: '(.+)'", problem)
    do = (
        suggestion(unknown[0], names)
        if unknown and names
        else f"pass {missing[1]}="
        if missing
        else "pass the arguments by name"
    )
    return error(f"{function}: {problem}", f"{function}({', '.join(names)})", do)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation."""
    if hint in (Any, inspect.Parameter.empty) or isinstance(hint, TypeVar):
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if hint in _NUMBERS:
        return _NUMBERS[hint](value)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if (reading := _reading(hint)) is not None:
            return _can_be_read(value, reading)
        rules = [rule for rule in hint.__metadata__ if isinstance(rule, Rule)]
        return fits(value, inner[0]) and all(rule.holds(value) for rule in rules)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is not None and issubclass(origin, collections.abc.Iterable):
        return _listed(value, origin, inner)
    if (array := getattr(hint, "array_type", None)) is not None:  # jaxtyping: shapes are for the reader
        return isinstance(value, array)
    try:
        return isinstance(value, origin or hint)
    except TypeError:  # a protocol that cannot be checked at run time
        return True


def _listed(value: Any, origin: type, inner: tuple[Any, ...]) -> bool:
    """Whether a value is a mapping, a list or a tuple with the right contents."""
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items()
        )
    array = callable(getattr(value, "tolist", None))  # numpy, torch
    # A list will do for a tuple, an array for a list of numbers; a text is not a list of its letters.
    allowed = collections.abc.Sequence if issubclass(origin, tuple | list) else origin
    if isinstance(value, str | bytes | Mapping) or not (array or isinstance(value, allowed)):
        return False
    if isinstance(value, Iterator):
        return False  # cannot be iterated twice
    items = value.tolist() if array else value
    if not isinstance(items, collections.abc.Iterable):
        return False
    if issubclass(origin, tuple) and inner[-1] is not Ellipsis:
        items = list(items)
        return len(items) == len(inner) and all(map(fits, items, inner))
    return all(fits(item, inner[0]) for item in items)


def wanted(hint: Any) -> str:
    """An annotation in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rule = hint.__metadata__[-1]
        return f"{wanted(inner[0])}, {rule.expected}" if rule is NOT_EMPTY else rule.expected
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(wanted(option) for option in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is collections.abc.Callable:
        return "a function"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping of {wanted(inner[0])} to {wanted(inner[1])}"
    if origin is not None and issubclass(origin, tuple) and inner[-1] is not Ellipsis:
        return f"({', '.join(map(wanted, inner))})"
    if origin is not None and issubclass(origin, collections.abc.Iterable):
        return f"a list, each {wanted(inner[0])}"
    return _WORDS.get(hint) or getattr(hint, "__name__", str(hint))


def _reading(hint: Any) -> Reading | None:
    """The ``Reading`` of an annotation, if it has one; ``None`` may be allowed as well."""
    for option in typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else [hint]:
        for extra in getattr(option, "__metadata__", ()):
            if isinstance(extra, Reading):
                return extra
    return None


def _can_be_read(value: Any, reading: Reading) -> bool:
    try:
        reading.read("", value)
    except MechError:
        return False
    return True


def _words_of(hint: Any) -> list[str]:
    """The words to choose from."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return [word for option in typing.get_args(hint) for word in _words_of(option)]


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


_NUMBERS: dict[Any, Callable[[Any], bool]] = {
    int: is_whole,
    float: is_number,
    bool: lambda value: isinstance(value, bool | np.bool_),
}
_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
    types.NoneType: "None",
    Any: "anything",
    Set: "a set",
}
