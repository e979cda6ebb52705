"""Functions that travel: from the test process to a host, and what came of them back.

A function goes by name where a name finds it, else by its code: lambdas and functions inside of tests take along what
they close over. Its module is imported where it runs, from its file if no name finds it, so a test module needs to be
importable without side effects, as for any process pool. Both ends are the same interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import marshal
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any

from .errors import LabError, RemoteError


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, FunctionType) and ("<" in value.__qualname__ or _lookup(value) is not value):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            details = (value.__name__, value.__qualname__, value.__defaults__, value.__kwdefaults__, cells)
            return _rebuild, (value.__module__, marshal.dumps(value.__code__), *details)
        if isinstance(value, BaseException) and isinstance(type(value).__init__, FunctionType):
            return _raise_again, (type(value), value.args, value.__dict__)
        return NotImplemented


def _lookup(function: FunctionType) -> Any:
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found


def _rebuild(
    module: str, code: bytes, name: str, qualname: str, defaults: Any, keywords: dict[str, Any] | None, cells: list[Any]
) -> FunctionType:
    home = sys.modules.get(module) or importlib.import_module(module)
    function = FunctionType(marshal.loads(code), home.__dict__, name, defaults, tuple(map(CellType, cells)))
    function.__qualname__, function.__kwdefaults__ = qualname, keywords
    return function


def _raise_again(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    """An exception as it was; pickle would give its text to an ``__init__`` that wants what the text was made of."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


def _dump(value: Any) -> bytes:
    body = io.BytesIO()
    _Pickler(body).dump(value)
    return body.getvalue()


def pack(
    function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any], environment: dict[str, str]
) -> bytes:
    """A call, ready to travel, with what it finds in ``os.environ`` on top of what we have there.

    Raises:
        LabError: something in it can't.
    """
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    spec = getattr(module, "__spec__", None)
    home = (getattr(module, "__name__", None), getattr(spec, "name", None), getattr(module, "__file__", None))
    try:
        body = _dump((function, args, keywords))
    except Exception as error:
        name = getattr(function, "__qualname__", function)
        raise LabError(f"{name} or what it is given can't be sent to a host: {error}") from error
    runner = "trio" if "trio" in sys.modules else "asyncio"
    return pickle.dumps(({**os.environ, **environment}, list(sys.path), home, runner, body))


def call(data: bytes) -> bytes:
    """Run a call that came; returns its outcome, ready to travel."""
    try:
        environment, path, (name, spec, file), runner, body = pickle.loads(data)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        if name:
            _import(name, spec, file)
        function, args, keywords = pickle.loads(body)
        value = function(*args, **keywords)
        if hasattr(value, "__await__"):
            value = _finish(value, runner)
        return _dump((True, value))
    except BaseException as error:  # noqa: BLE001 - it is raised again where the call came from
        text = "".join(traceback.format_exception(error))
        try:
            data = _dump((False, error, text))
            pickle.loads(data)  # some can be pickled but not made again
            return data
        except Exception:  # noqa: BLE001 - as above
            return _dump((False, RemoteError(text), text))


def _finish(awaitable: Any, runner: str) -> Any:
    """An async function is run by trio if the test process has it loaded, else by asyncio."""

    async def main() -> Any:
        return await awaitable

    module: Any = importlib.import_module(runner)
    return module.run(main) if runner == "trio" else module.run(main())


def _import(name: str, spec: str | None, file: str | None) -> None:
    """Have the module of a function, under its name."""
    if name in sys.modules and (name != "__main__" or file is None):
        return
    if name != "__main__" or spec:
        try:
            module = importlib.import_module(spec or name)
            if name != "__main__" and getattr(module, "__file__", file) != file and file:
                module = _load(name, file)
        except ModuleNotFoundError:
            if not file:
                raise
            module = _load(name, file)
    elif file:
        module = _load("__natlab_main__", file)
    else:
        return
    sys.modules[name] = module


def _load(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _Traceback(Exception):
    """Carries the traceback of the other process, as the cause of what it raised."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def unpack(data: bytes) -> Any:
    """What a call returned.

    Raises:
        BaseException: what it raised, with the other process' traceback as the cause.
    """
    good, value, *text = pickle.loads(data)
    if good:
        return value
    raise value from _Traceback(text[0])
