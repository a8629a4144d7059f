"""The public functions `plan` and `load_quantized`: they turn options into a source, a recipe and a budget.

Importing this module imports neither torch nor transformers, and `plan` never does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qlazy.planning.budget import make_budget
from qlazy.planning.kept import keep
from qlazy.planning.plan import Plan, make_plan
from qlazy.planning.recipe import make_recipe
from qlazy.report import Progress, downloading
from qlazy.sources.source import open_source
from qlazy.trace import Trace, span

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan(
    model_id: str | os.PathLike[str],
    *,
    bits: int = 4,
    format: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    double_quant: bool = True,
    head_bits: int = 8,
    embedding_bits: int = 16,
    module_bits: Mapping[str, int | str] | None = None,
    modules_to_not_convert: list[str] | tuple[str, ...] | None = None,
    target_size: str | int | None = None,
    target_bpw: float | None = None,
    device_map: str | Mapping[str, str] = "auto",
    max_memory: Mapping[str | int, str | int] | None = None,
    reserve: str | int | None = None,
    max_model_len: int = 4096,
    dtype: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Plan:
    """Say what a load would take, from the headers alone.

    Args:
        model_id: A folder, a `.gguf` file, an alias, or a hub id.
        bits: 4 or 8.
        format: `int4`, `int8`, `nf4` or `fp4`; by default what `bits` says.
        group_size: Columns that share a scale.
        symmetric: Int4 without zero points.
        double_quant: NF4 and FP4 with absmax in 8 bits.
        head_bits: Bits of an output head that is not tied to the embedding: 8, 4, or 16 to keep it.
        embedding_bits: Bits of token embeddings, and of output heads tied to them: 16 keeps them, or 8, or 4.
        module_bits: Bits by name or glob of modules, e.g. `{"down_proj": 8}`: 4, 8, 16, or a format such as `int4-g64`.
        modules_to_not_convert: Modules kept in the model's dtype beside the defaults.
        target_size: Size of all weights, e.g. `5GiB`: formats of int4 and int8 are chosen layer by layer, by what they cost
            layers of their kind; a load measures it. In place of `bits`, `format` and `group_size`.
        target_bpw: The same by bits per quantized weight, e.g. 4.3.
        device_map: `auto`, `cpu`, `cuda`, `cuda:N`, or a map from module prefix to device.
        max_memory: Bytes or sizes by device.
        reserve: Bytes or size to keep free on each device.
        max_model_len: Tokens that the KV cache and activations are planned for.
        dtype: `auto` or a torch dtype name, for what is not quantized.
        revision: Branch, tag or commit on the hub.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Do not ask the hub.
    Returns:
        The plan, which fits.
    Raises:
        DoesNotFit: a device is short.
        QlazyError: the model is not found, not supported, or damaged.

    Memory: the headers. Neither torch nor transformers is imported.
    """
    recipe = make_recipe(
        bits=bits,
        format=format,
        group_size=group_size,
        symmetric=symmetric,
        double_quant=double_quant,
        head_bits=head_bits,
        embedding_bits=embedding_bits,
        module_bits=module_bits,
        modules_to_not_convert=modules_to_not_convert,
        target_size=target_size,
        target_bpw=target_bpw,
    )
    source = open_source(
        model_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, headers_only=True
    )
    budget = make_budget(device_map, max_memory, reserve=reserve, max_model_len=max_model_len)
    return make_plan(source, keep(source, recipe) or recipe, budget, dtype=dtype)


def load_quantized(
    model_id: str | os.PathLike[str],
    *,
    bits: int = 4,
    format: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    double_quant: bool = True,
    head_bits: int = 8,
    embedding_bits: int = 16,
    module_bits: Mapping[str, int | str] | None = None,
    modules_to_not_convert: list[str] | tuple[str, ...] | None = None,
    target_size: str | int | None = None,
    target_bpw: float | None = None,
    device_map: str | Mapping[str, str] = "auto",
    max_memory: Mapping[str | int, str | int] | None = None,
    reserve: str | int | None = None,
    max_model_len: int = 4096,
    dtype: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    attn_implementation: str | None = None,
    strict: bool = True,
    drop_page_cache: bool = True,
    trust_remote_code: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    trace: str | os.PathLike[str] | None = None,
    random_init: bool = False,
    verify: bool = False,
    cache: bool = False,
) -> PreTrainedModel:
    """Load a model with linear layers, experts and output head in 4 or 8 bits, never holding more than that and a small ring.

        model = qlazy.load_quantized("org/name", bits=4)
        model.generate(...)                  # an ordinary transformers model
        print(model.qlazy_report)

    Args:
        model_id: A folder, a `.gguf` file, an alias, or a hub id.
        bits: 4 or 8.
        format: `int4`, `int8`, `nf4` or `fp4`; by default what `bits` says.
        group_size: Columns that share a scale.
        symmetric: Int4 without zero points.
        double_quant: NF4 and FP4 with absmax in 8 bits.
        head_bits: Bits of an output head that is not tied to the embedding: 8, 4, or 16 to keep it.
        embedding_bits: Bits of token embeddings, and of output heads tied to them: 16 keeps them, or 8, or 4.
        module_bits: Bits by name or glob of modules, e.g. `{"down_proj": 8}`: 4, 8, 16, or a format such as `int4-g64`.
        modules_to_not_convert: Modules kept in the model's dtype beside the defaults.
        target_size: Size of all weights, e.g. `5GiB`: formats of int4 and int8 are chosen layer by layer, by what they cost the
            layer's weights and how much the layer matters (`docs/quality.md`); in place of `bits`, `format` and `group_size`.
        target_bpw: The same by bits per quantized weight, e.g. 4.3.
        device_map: `auto`, `cpu`, `cuda`, `cuda:N`, or a map from module prefix to device.
        max_memory: Bytes or sizes by device.
        reserve: Bytes or size to keep free on each device.
        max_model_len: Tokens that the KV cache and activations are planned for.
        dtype: `auto` or a torch dtype name, for what is not quantized.
        revision: Branch, tag or commit on the hub.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Do not ask the hub.
        attn_implementation: As in transformers.
        strict: Whether missing and unexpected tensors are errors; False initializes the former and leaves out the latter.
        drop_page_cache: Give the file pages that the load brings in back to the kernel.
        trust_remote_code: Run Python code that lies in a local folder; none is downloaded.
        on_progress: Called a few times a second with a `Progress`.
        trace: File to write a trace of the load to, for ui.perfetto.dev or chrome://tracing.
        random_init: Read no weights, and fetch none: of the model only `config.json` is used. The values are those that
            building it under the same seed gives, drawn piece by piece straight into packed storage.
        verify: Read a folder that `save_quantized` made whole, and compare it with the hashes in its manifest, first.
        cache: Save what is quantized in `~/.cache/qlazy/saved` (or `QLAZY_CACHE`), and map it from there the next time.
    Returns:
        The model in evaluation mode, a `transformers.PreTrainedModel`, with its `LoadReport` as `qlazy_report`.
    Raises:
        DoesNotFit: a device is short, or nothing is as small as the target: before anything is read, and before a download as
            far as headers tell.
        CorruptCheckpoint: a damaged file, by name of file and tensor.
        QlazyError: the model is not found or not supported.

    Memory: on the host, the packed bytes that live there, the ring (64 MiB, for loads to GPUs 128 MiB), and 64 MiB of work
    buffers (more only for weights that transformers must convert as a whole); on a GPU, the packed bytes and the chunks in
    flight.
    """
    recipe = make_recipe(
        bits=bits,
        format=format,
        group_size=group_size,
        symmetric=symmetric,
        double_quant=double_quant,
        head_bits=head_bits,
        embedding_bits=embedding_bits,
        module_bits=module_bits,
        modules_to_not_convert=modules_to_not_convert,
        target_size=target_size,
        target_bpw=target_bpw,
    )
    budget = make_budget(device_map, max_memory, reserve=reserve, max_model_len=max_model_len)
    where: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    taken = None if trace is None else Trace(trace)
    with span(taken, "resolve"):
        source = open_source(model_id, headers_only=True, config_only=random_init, **where)
        if source.folder is None:
            make_plan(source, keep(source, recipe) or recipe, budget, dtype=dtype)  # refused before it is downloaded
            source = open_source(model_id, on_progress=downloading(on_progress), **where)

    from qlazy.load import load

    model = load(
        source,
        recipe,
        budget,
        dtype=dtype,
        attn_implementation=attn_implementation,
        strict=strict,
        drop_page_cache=drop_page_cache,
        trust_remote_code=trust_remote_code,
        on_progress=on_progress,
        trace=taken,
        random_init=random_init,
        verify=verify,
        cache=cache,
    )
    if taken is not None:
        taken.write()
    return model
