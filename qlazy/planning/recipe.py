"""The recipe: which weight gets which low-bit format, and the reason where one stays in 16 bits.

The same rules serve the plan, which knows only names and shapes, and the swap, which knows the modules; see `Entry.kind`.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qlazy.errors import UsageError
from qlazy.formats import Codebook4, Format, Int4, Int8
from qlazy.planning.target import Target, make_target
from qlazy.sources.gguf_config import hub_names

Kind = Literal[
    "linear", "experts", "head", "embedding", "tied", "positions", "shared", "read", "task", "router", "listed", "other"
]
"""What a tensor is to the recipe: `linear`, `experts` and `head` are quantized, `embedding` and `tied` where it asks."""

REASONS: dict[Kind, str] = {
    "head": "output head",
    "embedding": "embedding",
    "tied": "output head tied to the embedding",
    "shared": "weight with two names",
    "read": "output head whose weight the model's own code reads",
    "task": "head of a task, such as a classifier",
    "router": "router of a mixture of experts",
    "experts": "experts",
    "positions": "embedding of positions, types or other things than tokens",
    "listed": "listed in modules_to_not_convert, or kept in float32 by the model",
    "other": "norm, bias, convolution or other small parameter",
}
"""Why a tensor of a kind is left in the model's dtype, or has a format of its own, as the report says it."""

_EMBEDDING = re.compile(
    r"^(wte|wpe|word_emb|shared|embed.*|.*_embed|.*embed(ding)?s?|.*_emb|emb|token_embd|position_embd|.*relative_attention_bias)$"
)
_TOKENS = re.compile(
    r"^(wte|embed_tokens.*|tokens_embed|word_emb(eddings?)?|tok_embeddings?|token_embd|(token_)?embeddings?|embed_in|shared)$"
)
"""Those whose rows are tokens: large, and looked up, never added to as a whole."""
_HEAD = re.compile(
    r"(^|\.)([a-z]+_)?(lm_head(\.decoder|\.out_proj)?|lm_loss|embed_out|output_layer|output_projection|vocab_projector"
    r"|predictions\.decoder|mlm_score\.decoder|pred_layer\.proj)$|^output$"
)
_HEADS = re.compile(r"(^|\.)lm_heads\.\d+$")
_TASK = re.compile(r"^(score|classifier|qa_outputs|proj_out|output|head|logits|decoder)$")
_READ = ("mamba", "mamba2", "falcon_mamba", "xlstm", "hy_v4", "gemma4_assistant", "gemma4_unified_assistant")
"""Model types whose code looks at `lm_head.weight` at every step: a packed head would be unpacked for it each time."""
_KEPT = dict.fromkeys(("t5", "mt5", "umt5", "udop", "pop2piano"), re.compile(r"\.wo$"))
"""Linear layers that a family's class keeps in float32 (`_keep_in_fp32_modules`), by model type."""
_ROUTER = re.compile(r"^(gate|router|shared_expert_gate|ffn_gate_inp.*)$")
_BLOCK = re.compile(r"(^|\.)\d+\.")
_NAMED = re.compile(r"(int4|int8)-(?:channel|g(32|64|128))(-sym|-asym)?")
"""Formats as they name themselves."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to quantize and how."""

    format: Format = Int4()
    """Format of every layer that is quantized; under a target only whether its int4 is symmetric counts."""
    head: Format | None = Int8()
    """Format of an output head that is a linear layer of its own, not tied to the embedding; None keeps the model's dtype."""
    embedding: Format | None = None
    """Format of token embeddings, and of output heads tied to them, which share the table; None keeps the model's dtype."""
    modules: tuple[tuple[str, Format | None], ...] = ()
    """Names or globs of modules that have a format of their own, or None for the model's dtype; of several that match, the last
    counts. They match as those of `modules_to_not_convert` do, which win.
    """
    modules_to_not_convert: tuple[str, ...] = ()
    """Names or globs of modules kept in the model's dtype, beside the defaults (embeddings, tied heads, routers); they win over
    all else. A name matches where it stands as whole dotted components: `mlp.down_proj` matches
    `model.layers.3.mlp.down_proj`. `lm_head` matches the output head, whatever the model or file calls it."""
    target: Target | None = None
    """How large the model may become; None = as large as the other fields make it."""
    chosen: tuple[tuple[str, Format | None], ...] = ()
    """Formats by name of a weight, as `qlazy.planning.aim` chose them for the target; `modules` wins over them."""

    def format_for(self, kind: Kind, name: str, rows: int, columns: int) -> tuple[Format | None, str]:
        """Format of a weight, or None, and the reason where it is not the recipe's own.

        Args:
            kind: What the tensor is.
            name: Its path, with or without the final `.weight`.
            rows: out_features.
            columns: in_features.
        Returns:
            The format, made per-channel where its group does not divide `columns`, and the reason, empty for a layer like any
            other; or None and the reason.
        """
        own: dict[Kind, Format | None] = {
            "linear": self.format,
            "experts": self.format,
            "head": self.head,
            "embedding": self.embedding,
            "tied": self.embedding,
        }
        if kind not in own or not rows:
            return None, REASONS[kind]
        names = (*hub_names(name), "lm_head") if kind in ("head", "tied") else hub_names(name)
        if any(matches(pattern, name) for pattern in self.modules_to_not_convert for name in names):
            return None, REASONS["listed"]
        chosen, reason = self._by_name.get(name, own[kind]), "" if kind in ("linear", "experts") else REASONS[kind]
        if chosen is None and name in self._by_name:
            reason = "the target has room for all of it"
        for pattern, fmt in self.modules:
            if any(matches(pattern, name) for name in names):
                chosen, reason = fmt, f"listed in module_bits as {pattern!r}"
        return (chosen.for_columns(columns) if chosen else None), reason

    @property
    def name(self) -> str:
        """What layers become, in a few words: their format, or the target that formats are chosen for."""
        return self.format.name if self.target is None else f"target of {self.target}"

    @functools.cached_property
    def _by_name(self) -> dict[str, Format | None]:
        return dict(self.chosen)


def make_recipe(
    *,
    bits: int = 4,
    format: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    double_quant: bool = True,
    head_bits: int = 8,
    embedding_bits: int = 16,
    module_bits: Mapping[str, int | str] | None = None,
    modules_to_not_convert: tuple[str, ...] | list[str] | None = None,
    target_size: str | int | None = None,
    target_bpw: float | None = None,
) -> Recipe:
    """Make a recipe from the options of the command line and of `load_quantized`.

    Args:
        bits: 4 or 8; ignored where `format` says it.
        format: `int4`, `int8`, `nf4` or `fp4`; by default `int4` for 4 bits and `int8` for 8.
        group_size: 32, 64, 128, or -1 for the whole row. Default 32 for int4 and -1 for int8. NF4 and FP4 have blocks of 64.
        symmetric: Int4 only: True stores no zero points. Default False.
        double_quant: NF4 and FP4 only: store absmax in 8 bits.
        head_bits: Of an output head that is not tied to the embedding: 8 is int8 with one scale a row, 4 the default int4, and
            16 keeps the model's dtype.
        embedding_bits: Of token embeddings, and of an output head tied to one: 16 keeps the model's dtype, 8 is int8 with one
            scale a row, 4 the default int4.
        module_bits: Bits by name or glob of modules, `{"down_proj": 8, "layers.0.*": 16}`: 4, 8, 16, or the name of a format
            such as `int4` or `int4-g64`; later ones win. 4 and 8 are `bits`' own format where it has as many, else the default
            of so many bits.
        modules_to_not_convert: Modules kept in the model's dtype beside the defaults.
        target_size: Bytes that the model may have in all, e.g. `5GiB`: formats of int4 and int8 are chosen layer by layer.
        target_bpw: The same by bits per quantized weight.
    Returns:
        The recipe.
    Raises:
        UsageError: bits, format or group size that does not exist, or an option that the format does not have, or that has no
            meaning beside a target.
    """
    if head_bits not in (4, 8, 16):
        raise UsageError(
            f"head_bits is {head_bits!r}; an output head can have 4, 8 or 16.", hint="Leave --head-bits out for 8."
        )
    if embedding_bits not in (4, 8, 16):
        raise UsageError(
            f"embedding_bits is {embedding_bits!r}; embeddings can have 4, 8 or 16.", hint="Leave --embedding-bits out for 16."
        )
    if bits not in (4, 8):
        raise UsageError(f"bits is {bits!r}; qlazy quantizes to 4 or 8.", hint="Use --bits 4 or --bits 8.")
    name = format or ("int4" if bits == 4 else "int8")
    if name not in ("int4", "int8", "nf4", "fp4"):
        raise UsageError(f"There is no format {name!r}.", hint="Use --format int4, int8, nf4 or fp4.")
    if bits == 8 and name != "int8":
        raise UsageError(f"bits is 8, but {name} has 4.", hint=f"Leave --bits out, or --format {name}.")
    if group_size not in (None, -1, 32, 64, 128) or (name in ("nf4", "fp4") and group_size not in (None, 64)):
        allowed = "64" if name in ("nf4", "fp4") else "32, 64, 128, or -1 for the whole row"
        raise UsageError(
            f"group_size is {group_size}, but {name} takes {allowed}.", hint="Leave --group-size out for the default."
        )
    if symmetric is not None and name != "int4":
        raise UsageError(f"symmetric belongs to int4; {name} is always symmetric.", hint="Leave it out.")
    target = make_target(target_size, target_bpw)
    if target is not None and (name != "int4" or group_size is not None):
        raise UsageError(
            "A target chooses among int4 and int8 and their groups by itself.",
            hint="Leave --bits, --format and --group-size out (of a recipe file too: --recipe int4 has a group size), or "
            "--target-size and --target-bpw.",
        )
    chosen: Format
    if name == "int4":
        chosen = Int4(group_size=group_size or 32, symmetric=bool(symmetric))
    elif name == "int8":
        chosen = Int8(group_size=group_size or -1)
    else:
        chosen = Codebook4(kind=name, double_quant=double_quant)
    plain: dict[int, Format | None] = {4: Int4(), 8: Int8(), 16: None}
    return Recipe(
        format=chosen,
        head=plain[head_bits],
        embedding=plain[embedding_bits],
        modules=tuple((str(pattern), _format_of(pattern, asked, chosen)) for pattern, asked in (module_bits or {}).items()),
        modules_to_not_convert=tuple(modules_to_not_convert or ()),
        target=target,
    )


def _format_of(pattern: str, asked: int | str, chosen: Format) -> Format | None:
    """The format that `module_bits` asks for."""
    plain: dict[str, Format | None] = {
        "4": chosen if chosen.bits == 4 else Int4(),
        "8": chosen if chosen.bits == 8 else Int8(),
        "16": None,
        "int4": Int4(),
        "int8": Int8(),
        "nf4": Codebook4(kind="nf4"),
        "fp4": Codebook4(kind="fp4"),
    }
    if str(asked) in plain:
        return plain[str(asked)]
    named = _NAMED.fullmatch(str(asked))
    if named is None or (named[1] == "int8" and named[3]):
        raise UsageError(
            f"module_bits has {asked!r} for {pattern!r}; it can be 4, 8, 16, int4, int8, nf4, fp4, or a format with its group, "
            "such as int4-g64, int4-g128-sym or int8-channel.",
            hint="Write --module-bits 'down_proj=8'.",
        )
    group_size = int(named[2] or -1)
    if named[1] == "int8":
        return Int8(group_size=group_size)
    symmetric = named[3] == "-sym" if named[3] else isinstance(chosen, Int4) and chosen.symmetric
    return Int4(group_size=group_size, symmetric=symmetric)


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` stands in the module path `name` as whole dotted components; `*` and `?` are globs.

    Args:
        pattern: A path, part of a path, or glob.
        name: A module or parameter path.
    Returns:
        True where it matches.
    """
    return fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*")


def guess_kind(name: str, shape: tuple[int, ...], model_type: str = "") -> Kind:
    """What a checkpoint tensor is, told from its name and shape alone, as a plan without a model must.

    Where in doubt the answer is the one that needs more memory, so that a plan is never too small.

    Args:
        name: Key in the checkpoint, in Hugging Face's or GGUF's naming.
        shape: Its shape.
        model_type: The config's, where it is known: some families keep layers in float32.
    Returns:
        The kind; `linear` only for two-dimensional `.weight` tensors with no other claim. A `head` may still be tied.
    """
    path, _, last = name.rpartition(".")
    leaf = path.rpartition(".")[2]
    if ".router." in name and len(shape) == 2 and last == "weight":
        return "router"
    if _is_stack(path, leaf, last, shape):
        return "experts"
    if last != "weight" or len(shape) != 2:
        return "other"
    if _EMBEDDING.match(leaf) and leaf != "embed_out":
        return "embedding" if _TOKENS.match(leaf) else "positions"
    if _HEADS.search(path) or (_HEAD.search(path) and not _BLOCK.search(name)):
        return "read" if model_type in _READ else "head"
    if _TASK.match(leaf) and not _BLOCK.search(name):
        return "task"
    if _ROUTER.match(leaf) or ".router." in name:
        return "router"
    if model_type in _KEPT and _KEPT[model_type].search(path):
        return "listed"
    return "linear"


def _is_stack(path: str, leaf: str, last: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds the matrices of one expert or of all."""
    if last.endswith(("bias", "scale", "norm")) or len(shape) not in (2, 3):
        return False
    named = (
        "experts" in path or leaf in ("input_linear", "output_linear") if len(shape) == 3 else re.search(r"\bexperts\b", path)
    )
    return bool(named) or "_exps" in leaf
