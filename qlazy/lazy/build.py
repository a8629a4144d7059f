"""The context in which modules are built without memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.nn.modules import module as hooks

from qlazy.errors import UsageError
from qlazy.lazy import generators
from qlazy.lazy.edits import count_writes_to_data
from qlazy.lazy.facade import Facade
from qlazy.lazy.journal import Journal
from qlazy.lazy.log import record_of, writes_to
from qlazy.lazy.record import Recorder
from qlazy.lazy.report import LazyReport, make_report
from qlazy.lazy.scan import places
from qlazy.lazy.tally import Tally

_Built = TypeVar("_Built")
_local = threading.local()


class Build:
    """A build in progress or done: a context manager that can be entered again.

    Args:
        default_device: Where tensors lie that are made without saying where. Values are those that a CPU generator draws.
        dtype: As `torch.set_default_dtype(...)`.
    """

    def __init__(self, default_device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        self.tally = Tally()
        self._device = None if default_device is None else torch.device(default_device)
        self._dtype = dtype
        self._exits: list[contextlib.ExitStack] = []
        if self._device is not None and self._device.type == "meta":
            raise UsageError(
                "default_device is the device on which values will lie, which cannot be meta.", hint="Leave it out."
            )

    def report(self, module: nn.Module | None = None) -> LazyReport:
        """What was recorded in this context, and what of a module is lazy.

        Args:
            module: What to list tensors of.
        Returns:
            The report: `str()` for people, `to_json()` for programs.

        Memory: a line for each tensor.
        """
        return make_report(self.tally, module)

    def __enter__(self) -> Build:
        """Record in this thread."""
        with contextlib.ExitStack() as stack:
            session: _Session | None = getattr(_local, "session", None)
            if session is None:
                session = stack.enter_context(_recording())
            session.journal.tallies.append(self.tally)
            stack.callback(_remove, session.journal.tallies, self.tally)
            if self._device is not None:
                stack.callback(setattr, session.journal, "default_device", session.journal.default_device)
                session.journal.default_device = self._device
            if self._dtype is not None:
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(self._dtype)
            self._exits.append(stack.pop_all())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop recording in this thread, unless another build is open around this one."""
        self._exits.pop().__exit__(kind, error, trace)


class _Session:
    """What one thread records with.

    Args:
        journal: Where it writes.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.modules: dict[int, nn.Module] = {}

    def note(self, module: nn.Module, name: str, value: Any) -> None:
        """A hook of `nn.Module`: a module of this thread got a parameter, a buffer or a child."""
        if getattr(_local, "session", None) is self:
            self.modules[id(module)] = module

    def seal(self) -> None:
        """Remember how often each tensor was written to, so that a write that comes later shows, and what it is called."""
        inner = {id(child) for module in self.modules.values() for child in module._modules.values()}
        outermost_first = sorted(self.modules.values(), key=lambda module: id(module) in inner)
        found = [(record_of(place.tensor), place) for place in places(outermost_first)]
        new = [(record, place) for record, place in found if record is not None and not record.counters]
        for record, place in new:
            record.name = record.name or place.name
            record.counters.add(writes_to(place.tensor))
        self.journal.seal()
        count_writes_to_data()


@contextlib.contextmanager
def _recording() -> Any:
    journal = Journal([])
    session = _Session(journal)
    generators.opened()
    registrations = [
        register(session.note)
        for register in (
            hooks.register_module_parameter_registration_hook,
            hooks.register_module_buffer_registration_hook,
            hooks.register_module_module_registration_hook,
        )
    ]
    _local.session = session
    try:
        with Recorder(journal) as recorder, Facade(recorder, journal):
            yield session
    finally:
        _local.session = None
        for registration in registrations:
            registration.remove()
        try:
            journal.take_over()
            session.seal()
        finally:
            try:
                journal.settle()
            finally:
                generators.closed()


def _remove(tallies: list[Tally], tally: Tally) -> None:
    del tallies[max(place for place, found in enumerate(tallies) if found is tally)]


@overload
def lazy_build(*, default_device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Build: ...
@overload
def lazy_build(make: Callable[..., _Built], /, *args: Any, **kwargs: Any) -> _Built: ...
def lazy_build(make: Callable[..., Any] | None = None, /, *args: Any, **kwargs: Any) -> Any:
    """Build modules without memory, as a context or by a call.

    `with lazy_build(): ...`, or `lazy_build(AnyModule, ...)`. Inside, in this thread, every tensor is made on the meta
    device, and every operation is written down. Parameters are plain `nn.Parameter`s. Values that Python asks for are worked
    out and recording goes on. Afterwards random generators stand where eager construction would have left them, and
    `materialize` gives the values. Nests, and can be entered again to change a module that was built before.

    Args:
        make: A class or function. Without one a context manager is returned, which takes two options: `default_device`, which
            tensors show as theirs and go to when they are materialized, and `dtype`, the default dtype.
        *args: What it is called with.
        **kwargs: The same.
    Returns:
        What `make` returns, or a context manager that gives a `Build`.
    Raises:
        UsageError: a module was passed in place of a class; something without values was read; or a generator of another
            device was drawn from.

    Memory: about 1 KiB for each operation, and the Python objects themselves; where a value is asked for, the storage that it
    is in, for that moment.
    """
    if make is None:
        return Build(**kwargs)
    if isinstance(make, nn.Module):
        raise UsageError(
            f"lazy_build() got a {type(make).__name__} that is built already.",
            hint=f"Pass the class and its arguments: lazy_build({type(make).__name__}, ...).",
        )
    with Build():
        return make(*args, **kwargs)
