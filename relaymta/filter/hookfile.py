"""A file of hooks: what it defines, and calling that. Used in the process of hooks, or with `isolation = "loop"` in a worker."""

import ast
import asyncio
import importlib.util
import inspect
import os
import stat
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import msgspec

from relaymta import hooks
from relaymta.filter.hookframes import AFTERWARDS, ANSWER_MOST, CLIENT, ENVELOPE, HOOKS, Garbage, Reply, pack, unpack_reply
from relaymta.proto.printable import encodable
from relaymta.watch import stamp

__all__ = ["BrokenFile", "HookFile", "declared"]

MODULE: Final = "relaymta_hooks_of_operator"
TRACE_MOST: Final = 8000  # characters of a traceback, of which the end is kept
FRAMES_MOST: Final = 30
REASON_MOST: Final = 2000
NO_STAMP: Final = (0, 0, 0)
SOURCE_MOST: Final = 4 << 20  # octets
_DYNAMIC: Final = frozenset({"__import__", "compile", "eval", "exec", "globals", "locals", "setattr", "vars"})


class BrokenFile(Exception):
    """It cannot be imported, or what has the name of a hook is none; str(): `file:line: why`."""


def declared(path: str) -> frozenset[str]:
    """The names of hooks that a file seems to define, without running it. All that judge, where it cannot be read, or where it
    may define others: then there is something to be said about each message."""
    all_that_judge = frozenset(HOOKS) - frozenset(AFTERWARDS)
    try:
        tree = ast.parse(_source(path), path)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return all_that_judge
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=module, names=[ast.alias(name="*")]) if module != hooks.__name__:
                return all_that_judge
            case ast.Name(id=name, ctx=ast.Load()) if name in _DYNAMIC:
                return all_that_judge
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found.add(other or name)
    return frozenset(found & set(HOOKS))


def _source(path: str) -> bytes:
    """What a file has. OSError; ValueError: it is no plain file, which might never end, or is too large for code."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > SOURCE_MOST:
            raise ValueError
        return file.read()


class HookFile:
    """The hooks of a file, imported now. `hooks`: by their names; `bodies`: of these the ones that want bodies; `files`: it, and
    what it has imported from its own folder, each with its watch.stamp; `spent`: a hook has raised MemoryError."""

    def __init__(self, path: str, name: str = MODULE) -> None:
        """BrokenFile. `name`: of the module."""
        self.spent = False
        self._path = os.path.abspath(path)
        own = stamp(self._path)  # before it is read: what is written meanwhile is another version
        if os.path.exists(self._path) and not os.path.isfile(self._path):
            raise BrokenFile(f"{self._path}: it is not a plain file")
        self._folder = os.path.join(os.path.dirname(self._path), "")
        # Folders below it from which others are imported: a virtual environment may lie beside the file.
        installed = [os.path.join(os.path.abspath(one), "") for one in (*sys.path, sys.prefix)]
        relay = os.path.join(os.path.dirname(os.path.abspath(hooks.__file__)), "")
        self._foreign = (relay, *(one for one in installed if one.startswith(self._folder) and one != self._folder))
        before = {known for known in sys.modules if self._is_own(sys.modules[known])}
        kept = {known: sys.modules.pop(known) for known in before}  # of an earlier version, in this process
        searched = [*sys.path]
        folder = os.path.dirname(self._path)
        if folder not in sys.path:
            sys.path.append(folder)  # behind all others: a `json.py` of the operator's is not what we import
        try:
            self._module = self._imported(name)
            self.hooks = self._found()
        except BaseException:
            for known in [known for known in sys.modules if self._is_own(sys.modules[known])]:
                del sys.modules[known]
            sys.modules.update(kept)
            sys.path[:] = searched
            raise
        self.bodies = [hook for hook, function in self.hooks.items() if getattr(function, "wants_body", False) is True]
        own_ones = [str(one.__file__) for one in list(sys.modules.values()) if self._is_own(one)]
        others = {os.path.abspath(name) for name in own_ones} - {self._path}
        self.files = [(self._path, *(own or NO_STAMP)), *((one, *(stamp(one) or NO_STAMP)) for one in sorted(others))]

    def _is_own(self, module: Any) -> bool:
        """Whether a module is from the file's folder, or below it."""
        file = getattr(module, "__file__", None)
        return isinstance(file, str) and self._is_there(file)

    def _is_there(self, file: str) -> bool:
        """Whether a file of code is in the folder, or below it, and not one that is installed there."""
        path = os.path.abspath(file)
        return path.startswith(self._folder) and not path.startswith(self._foreign)

    def _imported(self, name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, self._path)
        if spec is None or spec.loader is None:
            raise BrokenFile(f"{self._path}: its name does not end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            raise BrokenFile(f"{error.filename}:{error.lineno}: {error.msg}") from None
        except OSError as error:
            if error.filename is not None and os.path.abspath(os.fsdecode(error.filename)) == self._path:
                raise BrokenFile(f"{self._path}: {error.strerror}") from None
            raise self._broken(error) from None
        except BaseException as error:  # sys.exit() too
            raise self._broken(error) from None
        return module

    def _broken(self, error: BaseException) -> BrokenFile:
        return BrokenFile(f"{self._place(error) or self._path}: {_told(error)}")

    def _found(self) -> dict[str, Callable[..., Any]]:
        found: dict[str, Callable[..., Any]] = {}
        for hook in HOOKS:
            function = getattr(self._module, hook, None)
            if function is None:
                continue
            if not inspect.iscoroutinefunction(function):
                line = getattr(getattr(function, "__code__", None), "co_firstlineno", 0)
                where = f"{self._path}:{line}" if line else self._path
                raise BrokenFile(f"{where}: {hook} has to be an `async def`")
            found[hook] = function
        return found

    async def call(self, number: int, hook: str, arguments: Any, body: hooks.Body | None) -> Reply:
        """Call a hook. Whatever it does, there is a reply, except where this is cancelled."""
        try:
            result = await self.hooks[hook](*_records(hook, arguments, body if hook in self.bodies else None))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return self._raised(number, error)  # its own doing
        except BaseException as error:  # SystemExit and KeyboardInterrupt would end the event loop
            return self._raised(number, error)
        try:
            return _reply(number, hook, result)
        except Exception as error:  # what it returns has methods and properties of the operator's own
            return _invalid(number, f"{hook} returns what cannot be read: {type(error).__name__}")

    def _raised(self, number: int, error: BaseException) -> Reply:
        self.spent = self.spent or _is_of_memory(error)
        trace = error.__traceback__.tb_next if error.__traceback__ is not None else None  # without our own frame
        try:
            told = "".join(traceback.format_exception(type(error), error, trace, FRAMES_MOST))
        except Exception as why:  # such as of a SyntaxError whose text is none
            told = f"{type(error).__name__}, which cannot be shown: {type(why).__name__}"
        cause = error.__cause__  # a RuntimeError, of a StopIteration, has no frames of its own
        place = self._place(error) or (self._place(cause) if cause is not None else "") or self._path
        return Reply(number, "raised", encodable(told[-TRACE_MOST:]), place=encodable(place))

    def place(self, frame: Any) -> str:
        """Where code of the file is, which has called this frame: `file:line in function`."""
        first = ""
        while frame is not None:
            name = frame.f_code.co_filename
            here = f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
            if self._is_there(name):
                return encodable(here)
            first = first or here
            frame = frame.f_back
        return encodable(first)

    def _place(self, error: BaseException) -> str:
        """`file:line` of the innermost frame that is the operator's."""
        found, trace = "", error.__traceback__
        while isinstance(trace, TracebackType):
            name = trace.tb_frame.f_code.co_filename
            if self._is_there(name):
                found = f"{name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return found


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether it is a MemoryError, or follows from one: by its type, since its text may be a client's."""
    for _ in range(FRAMES_MOST):
        if error is None or isinstance(error, MemoryError):
            break
        error = error.__cause__ or error.__context__
    return isinstance(error, MemoryError)


def _told(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _records(hook: str, arguments: Any, body: hooks.Body | None) -> list[Any]:
    """What a hook is called with."""
    if hook in AFTERWARDS:
        attempt = dict(arguments[0])
        return [hooks.Attempt(**attempt | {"recipients": tuple(attempt["recipients"])})]
    client = hooks.Client(*arguments[0])
    if hook in CLIENT:
        return [client]
    sender, recipients, parameters, size = arguments[1]
    envelope = hooks.Envelope(sender, tuple(recipients), tuple(parameters), size)
    if hook in ENVELOPE:
        return [client, envelope, *arguments[2:]]
    ident, dmarc, head, octets = arguments[2]
    return [hooks.Mail(ident, client, envelope, hooks.Results(dmarc), hooks.Header(head), octets, body)]


_DO: Final = {
    hooks.Add: "add", hooks.Replace: "replace", hooks.Remove: "remove", hooks.AddRecipient: "add_recipient",
    hooks.RemoveRecipient: "remove_recipient", hooks.SetSender: "set_sender",
}  # fmt: skip
_WORDS: Final = frozenset({"accept", "tag", "hold", "discard", "tempfail", "reject"})


def _reply(number: int, hook: str, result: Any) -> Reply:
    """What a hook returns, as it is sent: checked as it is there."""
    if result is None or hook in AFTERWARDS:
        return Reply(number, "none")
    if hook == "choose_route":
        if isinstance(result, str):
            return Reply(number, "route", encodable(result)[:REASON_MOST])
        return _invalid(number, f"{hook} returns {type(result).__name__}, and not the name of a route or None")
    if not isinstance(result, hooks.Verdict):
        return _invalid(number, f"{hook} returns {type(result).__name__}, and not a Verdict or None")
    if result.word not in _WORDS:
        return _invalid(number, f"{hook} says {result.word!r}, which is no verdict")
    try:
        changes: Any = [{"do": _DO[type(one)]} | {key: getattr(one, key) for key in one.__slots__} for one in result.changes]
        made = Reply(number, result.word, result.reason, result.reply, result.score, changes)
        packed = pack(made)
        if len(packed) > ANSWER_MOST:
            return _invalid(number, f"{hook} says {len(packed)} octets")
        unpack_reply(packed[4:])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, Garbage, msgspec.MsgspecError) as error:
        return _invalid(number, f"{hook} returns a Verdict that cannot be understood: {error}")
    return made


def _invalid(number: int, why: str) -> Reply:
    return Reply(number, "invalid", encodable(why)[:REASON_MOST])
