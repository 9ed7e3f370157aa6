"""JSON from a file that nobody vouches for: wrong types, unknown and repeated keys are errors, not surprises."""

import json
from typing import Any, NoReturn


class JsonShapeError(ValueError):
    """The text is not the JSON that was expected; the message says where and what."""


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonShapeError(f"the key {repeated!r} appears twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise JsonShapeError(f"{name} is not a JSON number")


def parse(text: str | bytes) -> Any:
    """The value of a JSON text; raises `JsonShapeError` for anything else, however deep or long."""
    try:
        return json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except JsonShapeError:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonShapeError(f"not JSON: {error}") from error


class Fields:
    """The keys of one JSON object, taken one by one; `done` complains of those that nobody took."""

    def __init__(self, value: Any, where: str) -> None:
        """``where`` names the object in messages."""
        if not isinstance(value, dict):
            raise JsonShapeError(f"{where} is not an object")
        self._values = dict(value)
        self._where = where

    def _take(self, key: str) -> Any:
        if key not in self._values:
            raise JsonShapeError(f"{self._where} lacks {key!r}")
        return self._values.pop(key)

    def _wrong(self, key: str, expected: str, value: Any) -> NoReturn:
        raise JsonShapeError(f"{key!r} of {self._where} is not {expected}: {value!r:.60}")

    def has(self, key: str) -> bool:
        """Whether the key is there, with something other than null."""
        if self._values.get(key) is None:
            self._values.pop(key, None)
            return False
        return True

    def text(self, key: str) -> str:
        """A string."""
        value = self._take(key)
        return value if isinstance(value, str) else self._wrong(key, "a string", value)

    def optional_text(self, key: str) -> str | None:
        """A string or null; the key must be there."""
        value = self._take(key)
        return value if value is None or isinstance(value, str) else self._wrong(key, "a string or null", value)

    def integer(self, key: str) -> int:
        """A whole number from 0 to 2^63 - 1."""
        value = self._take(key)
        if not _is_count(value):
            self._wrong(key, "a whole number from 0 to 2^63-1", value)
        return int(value)

    def items(self, key: str) -> list[Any]:
        """A list, its elements unchecked."""
        value = self._take(key)
        return value if isinstance(value, list) else self._wrong(key, "a list", value)

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self.items(key)
        return value if all(isinstance(item, str) for item in value) else self._wrong(key, "a list of strings", value)

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        value = self.items(key)
        return value if all(map(_is_count, value)) else self._wrong(key, "a list of whole numbers", value)

    def text_map(self, key: str) -> dict[str, str]:
        """An object whose values are strings."""
        value = self._take(key)
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            self._wrong(key, "an object of strings", value)
        return value

    def done(self) -> None:
        """Raise for keys that were not taken."""
        if self._values:
            raise JsonShapeError(f"{self._where} has unknown keys: {', '.join(map(repr, sorted(self._values)))}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
