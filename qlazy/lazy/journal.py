"""Write operations down, and work out the values of what is written down so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlazy.lazy import generators
from qlazy.lazy.draw import draw_of
from qlazy.lazy.draw_model import after
from qlazy.lazy.edits import edited
from qlazy.lazy.log import Op, Record, Ref, Slot, Version, geometry_of, map_leaves, record_of, set_record, tensor_on, writes_to
from qlazy.lazy.numpy_views import NumpyView
from qlazy.lazy.replay import execute, plain, replay
from qlazy.lazy.rng import Position
from qlazy.lazy.schema import REPOINTS, Facts, tensors
from qlazy.lazy.tally import Tally

CPU = torch.device("cpu")
META = torch.device("meta")
SMALL_BYTES = 64 << 10
"""Storages up to this size keep the values that were asked for, so that a loop over them does not start again each time."""


class Journal:
    """What one thread has written down.

    Args:
        tallies: Everybody who counts; more may be put in later.
    """

    def __init__(self, tallies: list[Tally]) -> None:
        self.tallies = tallies
        self._generators = {id(torch.default_generator): torch.default_generator}
        self._views: list[NumpyView] = []
        self.default_device = CPU
        """Where results lie that nothing else tells about."""
        self._device: torch.device | None = None
        """Where Python code asked for results to lie."""
        self._edited: dict[Record, list[Tensor]] = {}
        """Tensors of an earlier build that were written to in this one, by the storage that they lie on."""

    def generator(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator:
        """The generator that a random operation draws from."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
        found = given[0] if given else torch.default_generator
        self._generators[id(found)] = found
        return found

    def on_device(self, device: torch.device, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function whose results would lie on a device.

        Args:
            device: Where new storages would lie.
            func: What to call.
            *args: What with.
            **kwargs: The same.
        Returns:
            What it returns.
        """
        before, self._device = self._device, device
        try:
            return func(*args, **kwargs)
        finally:
            self._device = before

    def known(self, tensor: Tensor) -> Record | None:
        """The record of a tensor that an operation reads or writes.

        Args:
            tensor: Any tensor.
        Returns:
            None for one that has none.
        Raises:
            UsageError: it was written to when no recorder was open.
        """
        record = record_of(tensor)
        if record is not None and record.counters and record not in self._edited and record.is_edited(tensor):
            raise edited(record.describe(tensor))
        return record

    def write(
        self,
        func: Any,
        facts: Facts,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        *,
        drawn: tuple[Position, Position] | None = None,
    ) -> None:
        """Write an operation down, unless all that it did was to look at storages in another way.

        Args:
            func: The operation.
            facts: Of it.
            args: What it was called with.
            kwargs: The same.
            result: Its results on meta; storages that are new get a record.
            drawn: Where its generator stood before and after, if that is known.
        """
        results = result if isinstance(result, (list, tuple)) else (result,)
        fresh = [(i, t) for i, t in enumerate(results) if isinstance(t, Tensor) and t.is_meta and record_of(t) is None]
        written = [tensor for tensor in facts.written(args, kwargs) if tensor.is_meta]
        if func in REPOINTS and (moved := record_of(args[0])) is not None:
            moved.writes = None
        if not fresh and not written:
            return
        overwritten = facts.overwrites and _is_whole(args[0]) and not _shares(args[0], (args[1:], kwargs))
        first = args[0] if overwritten else None
        generator = self.generator(args, kwargs) if facts.random else None
        named = {key: value for key, value in kwargs.items() if not isinstance(value, torch.Generator)}
        op = Op(func, *map_leaves(lambda leaf: self._reference(leaf, leaf is first), (args, named)))
        for index, tensor in fresh:
            storage = tensor.untyped_storage()
            if record_of(tensor) is None:
                slot = Slot(storage.nbytes())
                set_record(
                    storage, Record(slot, Version(slot, op), self._device or _device_of((kwargs, args)) or self.default_device)
                )
                op.outputs.append((index, slot, geometry_of(tensor)))
                for tally in self.tallies:
                    tally.lazy_bytes += slot.nbytes
        if generator is not None:
            op.position, op.following = drawn or self._draw(op, generator, results[0])
            generators.move(generator, op.following)
        for tally in self.tallies:
            tally.ops += 1
        for tensor in written:
            record = record_of(tensor)
            assert record is not None
            if record.counters:
                self._edited.setdefault(record, []).append(tensor)
            elif record.writes is not None:
                # Torch counts this write once it is done.
                record.writes = max(record.writes, writes_to(tensor) + 1)
            if record.version.op is not op:
                record.slot.nbytes = tensor.untyped_storage().nbytes()
                record.version = Version(record.slot, op, None if overwritten else record.version)
                for view in self._views:
                    if view.record is record:
                        view.show()

    def constant(self, value: Tensor) -> Tensor:
        """A recorded tensor with the values of a real one.

        Args:
            value: A real tensor that nobody else uses.
        Returns:
            A meta tensor.
        """
        twin = meta_twin(value)
        version = self._constant_version(value)
        set_record(twin.untyped_storage(), Record(version.slot, version, self._device or self.default_device))
        return twin

    def concrete(self, wanted: Sequence[Tensor], reason: str) -> list[Tensor]:
        """Work out the values of recorded tensors.

        Args:
            wanted: Recorded tensors.
            reason: What asks for them.
        Returns:
            Real tensors of the same geometry, whose memory nobody else holds; those on one storage stay on one.

        Memory: their storages, and what their operations need meanwhile.
        """
        self.take_over(wanted)
        records = [record for tensor in wanted if (record := self.known(tensor)) is not None]
        memory = replay({id(record.version): record.version for record in records}.values())
        found = []
        with plain():
            for tensor, record in zip(wanted, records, strict=True):
                storage = memory[record.slot]
                found.append(tensor_on(storage, geometry_of(tensor)))
                if record.slot.nbytes <= SMALL_BYTES and record.version.op.payload is None:
                    record.version = Version(record.slot, Op.constant(storage.clone(), record.slot, geometry_of(tensor)))
        self._tell(reason, sum(storage.nbytes() for storage in memory.values()))
        return found

    def numpy_view(self, tensor: Tensor) -> Any:
        """A numpy array with the values of a recorded tensor, whose changes are noticed."""
        (real,) = self.concrete([tensor], "Tensor.numpy")
        record = record_of(tensor)
        assert record is not None
        view, array = NumpyView.of(real, record)
        self._views.append(view)
        return array

    def take_over(self, touched: Sequence[Tensor] | None = None) -> None:
        """Write down what was written to numpy arrays that share memory with recorded tensors.

        Args:
            touched: Tensors to look at; None for all.
        """
        self._views = [view for view in self._views if view.is_alive()]
        if self._views:
            records = None if touched is None else [record_of(tensor) for tensor in touched]
            for view in self._views:
                if records is None or any(view.record is record for record in records):
                    view.take_over()

    def seal(self) -> None:
        """Remember how often tensors of earlier builds were written to by now."""
        for record, written in self._edited.items():
            record.counters.update(map(writes_to, written))

    def settle(self) -> None:
        """Give every generator that was drawn from the state that eager construction would have left."""
        with plain():
            for generator in self._generators.values():
                generators.settle(generator)

    def tell_real(self, func: Any) -> None:
        """Count something that was made real at once."""
        for tally in self.tallies:
            tally.real[str(func)] += 1

    def _tell(self, reason: str, nbytes: int) -> None:
        for tally in self.tallies:
            tally.concretised[reason] += 1
            tally.concretised_bytes[reason] += nbytes

    def _draw(self, op: Op, generator: torch.Generator, result: Any) -> tuple[Position, Position]:
        """Where a random operation draws from, and where it leaves the generator."""
        op.position = position = generators.position_of(generator)
        args, kwargs = map_leaves(lambda leaf: None if isinstance(leaf, Ref) else leaf, (op.args, op.kwargs))
        with plain():
            draw = draw_of(op.func, args, kwargs, result) if isinstance(result, Tensor) else None
            following = None if draw is None else after(position, draw)
            if following is None:
                scratch = position.generator()
                memory = replay([ref.version for ref in op.refs() if ref.version is not None])
                execute(op, memory, scratch)
                following = Position.of(scratch)
                self._tell(str(op.func), sum(storage.nbytes() for storage in memory.values()))
        return position, following

    def _reference(self, leaf: Any, overwritten: bool) -> Any:
        if isinstance(leaf, torch.device):
            return CPU
        if not isinstance(leaf, Tensor):
            return leaf
        record = record_of(leaf)
        if record is not None:
            return Ref(record.slot, None if overwritten else record.version, geometry_of(leaf))
        if leaf.is_meta:
            return leaf
        # A real tensor may change later: keep what it holds now.
        kept = leaf.detach().clone()
        version = self._constant_version(kept)
        return Ref(version.slot, version, geometry_of(kept))

    def _constant_version(self, value: Tensor) -> Version:
        storage = value.untyped_storage()
        slot = Slot(storage.nbytes())
        for tally in self.tallies:
            tally.constant_bytes += slot.nbytes
        return Version(slot, Op.constant(storage, slot, geometry_of(value)))


def meta_twin(real: Tensor) -> Tensor:
    """A meta tensor that lies in its storage as a real one does.

    Args:
        real: A real tensor.
    Returns:
        A meta tensor without a record.
    """
    with plain():
        return tensor_on(torch.UntypedStorage(real.untyped_storage().nbytes(), device=META), geometry_of(real))


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor covers every byte of its storage."""
    nbytes = tensor.numel() * tensor.element_size()
    return tensor.storage_offset() == 0 and tensor.is_contiguous() and nbytes == tensor.untyped_storage().nbytes()


def _shares(tensor: Tensor, others: Any) -> bool:
    """Whether other arguments lie on the same storage."""
    storage = tensor.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == storage for other in tensors(others))


def _device_of(arguments: Any) -> torch.device | None:
    """Where a result would lie: on the GPU that was asked for, or where the first recorded argument would."""
    kwargs, args = arguments
    for value in (*kwargs.values(), *args):
        if isinstance(value, torch.device) and value.type not in ("cpu", "meta"):
            return value
    records = (record_of(tensor) for tensor in tensors((args, kwargs)))
    return next((record.device for record in records if record is not None), None)
