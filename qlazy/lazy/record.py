"""Run constructors on the meta device and write down what they do.

A `Recorder` sees every aten operation of its thread, whichever Python or C++ function asked for it. What has no tensors among
its arguments is made on meta; what has recorded ones runs on meta and is written down; what has only real ones runs as it is.
Where Python wants to know a value (`item`, `nonzero`, boolean masks) the operations behind it are run, the question is
answered, and recording goes on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlazy.errors import UsageError
from qlazy.lazy import generators
from qlazy.lazy.journal import CPU, META, Journal, meta_twin
from qlazy.lazy.log import Op, geometry_of, is_meant_for_meta, leaves, map_leaves, meant_for_meta, record_of, tensor_on
from qlazy.lazy.replay import execute, plain
from qlazy.lazy.rng import Position
from qlazy.lazy.schema import FILLS, Facts, aten, facts_of, tensors

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Recorder(TorchDispatchMode):
    """The dispatch mode of one thread.

    Args:
        journal: Where things are written down.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._journal = journal
        self.on_meta = False
        """Whether Python code asked for the meta device; torch's own C++ asks for it too, where its arguments lie there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch calls this in place of the operation."""
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Args, kwargs: Kwargs) -> Any:
        facts = facts_of(func)
        given = list(tensors((args, kwargs)))
        if not given:
            return self._run_factory(func, facts, args, kwargs)
        records = [self._journal.known(tensor) for tensor in given]
        if any(record is not None and record.real is not None for record in records):
            return self._run_on_memory(func, args, kwargs)
        if not any(records):
            return self._run_real(func, facts, args, kwargs, given)
        for tensor, record in zip(given, records, strict=True):
            if record is None and tensor.is_meta and tensor.numel():
                raise UsageError(
                    f"{func} reads a tensor {list(tensor.shape)} on the meta device that has no values: it was not made while "
                    "building lazily, or on meta on purpose.",
                    hint="Make it inside lazy_build(), or materialize the module before it is changed.",
                )
        if self.on_meta and META in leaves((args, kwargs)):
            return meant_for_meta(func(*args, **kwargs))
        self._journal.take_over(given)
        if (
            facts.asks_values
            or kwargs.get("layout") not in (None, torch.strided)
            or any(not tensor.is_meta for tensor in facts.written(args, kwargs))
            or any(tensor.layout is not torch.strided for tensor in given)
        ):
            return self._run_for_values(func, facts, args, kwargs)
        if func in FILLS:
            self._journal.write(func, facts, args, kwargs, args[0])
            return args[0]
        meta_args, meta_kwargs = map_leaves(_on_meta, (args, kwargs))
        try:
            result = func(*meta_args, **meta_kwargs)
        except Exception:
            # Meta kernels know less than real ones; if values do not help either, the error is the one of eager execution.
            return self._run_for_values(func, facts, args, kwargs)
        if any(tensor.layout is not torch.strided for tensor in tensors((result,))):
            return self._run_for_values(func, facts, args, kwargs)
        self._journal.write(func, facts, args, kwargs, result)
        return result

    def _run_factory(self, func: Any, facts: Facts, args: Args, kwargs: Kwargs) -> Any:
        """No argument is a tensor."""
        device = next((leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.device)), CPU)
        if device.type == "meta" and self.on_meta:
            return meant_for_meta(func(*args, **kwargs))
        if not facts.has_device or kwargs.get("layout") not in (None, torch.strided):
            return func(*args, **kwargs)
        if func is aten.empty.memory_format and list(args[0]) == [0] and device == CPU:
            # It takes no memory. Torch begins so what it then puts on a storage, that of a file or a copy of another's.
            return func(*args, **kwargs)
        meta_args, meta_kwargs = map_leaves(_on_meta, (args, kwargs))
        try:
            result = func(*meta_args, **meta_kwargs | {"device": META})
        except NotImplementedError:
            self._journal.tell_real(func)
            return func(*args, **kwargs)
        self._journal.write(func, facts, args, kwargs | {"device": CPU}, result)
        return result

    def _run_real(self, func: Any, facts: Facts, args: Args, kwargs: Kwargs, given: list[Tensor]) -> Any:
        """No argument is recorded: run it, but take over what torch has just made from Python values."""
        if func is aten.lift_fresh.default and _is_fresh(given[0]):
            return self._journal.constant(given[0])
        if func is aten.lift_fresh.default and given[0].is_meta and not self.on_meta:
            raise UsageError(
                f"Values {list(given[0].shape)} were lost: torch copied them to the device of a tensor without memory.",
                hint="Name the device, as in torch.tensor(values, device=tensor.device).",
            )
        if all(tensor.is_meta for tensor in given):
            result = func(*args, **kwargs)
            return meant_for_meta(result) if all(is_meant_for_meta(tensor) for tensor in given) else result
        if facts.random:
            with plain():
                generators.settle(self._journal.generator(args, kwargs))
        return func(*args, **kwargs)

    def _run_on_memory(self, func: Any, args: Args, kwargs: Kwargs) -> Any:
        """An alias of something that was materialized meanwhile: the memory takes its place."""
        aliases: dict[int, Tensor] = {}

        def real(leaf: Any) -> Any:
            record = record_of(leaf) if isinstance(leaf, Tensor) else None
            if record is None or record.real is None:
                return leaf
            found = tensor_on(record.real, geometry_of(leaf))
            aliases[id(found)] = leaf
            return found

        real_args, real_kwargs = map_leaves(real, (args, kwargs))
        result = self._run(func, real_args, real_kwargs)
        return map_leaves(lambda leaf: aliases.get(id(leaf), leaf), result)

    def _run_for_values(self, func: Any, facts: Facts, args: Args, kwargs: Kwargs) -> Any:
        """Answer with real values; tensors that come out of it are recorded all the same."""
        recorded = [tensor for tensor in tensors((args, kwargs)) if record_of(tensor) is not None]
        reals = self._journal.concrete(recorded, str(func))
        twins = {id(tensor): real for tensor, real in zip(recorded, reals, strict=True)}
        originals = {id(real): tensor for tensor, real in zip(recorded, reals, strict=True)}
        real_args, real_kwargs = map_leaves(
            lambda leaf: CPU if isinstance(leaf, torch.device) else twins.get(id(leaf), leaf), (args, kwargs)
        )
        drawn = None
        if facts.random:
            position = generators.position_of(self._journal.generator(args, kwargs))
            scratch = position.generator()
            named = {key: value for key, value in real_kwargs.items() if not isinstance(value, torch.Generator)}
            with plain():
                result = execute(Op(func, real_args, named, position), {}, scratch)
            drawn = (position, Position.of(scratch))
        else:
            with plain():
                result = func(*real_args, **real_kwargs)
        fresh = {id(t): meta_twin(t) for t in tensors((result,)) if id(t) not in originals and t.layout is torch.strided}
        answer = map_leaves(lambda leaf: originals.get(id(leaf), fresh.get(id(leaf), leaf)), result)
        self._journal.write(func, facts, args, kwargs, answer, drawn=drawn)
        return answer


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return META
    if isinstance(leaf, torch.Generator):
        return None
    if isinstance(leaf, Tensor) and not leaf.is_meta:
        return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=META)
    return leaf


def _is_fresh(value: Tensor) -> bool:
    """Whether a tensor that torch made from Python values owns its memory; `from_numpy` shares the array's."""
    return value.device.type == "cpu" and value.layout is torch.strided and bool(value.untyped_storage().resizable())
