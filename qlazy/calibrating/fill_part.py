"""Fill a part of a placeholder: one block, or what lies beside the blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable

from torch import nn
from transformers import PreTrainedModel

from qlazy.errors import IncompleteCheckpoint
from qlazy.matching.fill import Fill
from qlazy.place import Placer
from qlazy.planning.plan import Plan
from qlazy.reading.chunks import CACHED_BYTES, worker_count
from qlazy.stream import Stream


def fill_part(
    model: PreTrainedModel,
    plan: Plan,
    fills: Iterable[Fill],
    names: Collection[str],
    drop_page_cache: bool,
    reading: Callable[[int], None] | None = None,
) -> None:
    """Read some tensors of a model, and what is stored together with them.

    Args:
        model: A placeholder.
        plan: Its plan.
        fills: What fills all of it.
        names: Which tensors.
        drop_page_cache: Give the file pages that reading brings in back to the kernel.
        reading: Called with the bytes that are read.
    Raises:
        IncompleteCheckpoint: one is in no file.

    Memory: these tensors, and the ring of a load.
    """
    wanted = tuple(fill for fill in fills if not set(names).isdisjoint(fill.targets))
    filled = {target for fill in wanted for target in fill.targets}
    placer = Placer(model, dataclasses.replace(plan, tensors=tuple(t for t in plan.tensors if t.name in filled)))
    with Stream(wanted, placer.place, worker_count(wanted), drop_page_cache, None, CACHED_BYTES) as stream:
        for done in stream:
            if reading is not None:
                reading(done)
    for name in names:
        if (
            name not in filled
            and model.get_submodule(name.rpartition(".")[0])._parameters.get(name.rpartition(".")[2]) is not None
        ):
            raise IncompleteCheckpoint(f"{plan.model_id}: {name!r} is in no file.", hint="Leave --calibrate out.")
    for name in filled:
        if left := placer.rows_left(name):
            raise IncompleteCheckpoint(f"{plan.model_id}: {left} rows of {name!r} were never filled.")


def tie(model: nn.Module) -> list[str]:
    """Give what is tied to a filled parameter that parameter.

    Args:
        model: A placeholder of which a part is filled.
    Returns:
        Names of what was tied.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    done = []
    for pair in tied.items():
        for name, other in (pair, pair[::-1]):
            if name in parameters and other in parameters and parameters[name].is_meta and not parameters[other].is_meta:
                path, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(path), leaf, parameters[other])
                done.append(name)
    return done
