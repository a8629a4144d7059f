"""The story of a calibration: a text goes through a model, and each block is quantized before the text goes on.

1. embed     what goes into the first block, of all sequences, in a temporary file
2. fill      one block in 16 bits, through the ring of a load
3. round     its layers in the order in which they run: each by what it takes in now that those before it are rounded
4. run       what goes into the next block; the block is emptied

Only one block is ever there in 16 bits, and what is quantized goes to the disk with its shard.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlazy.calibrating.blocks import Call, embed, find_decoder, run_block
from qlazy.calibrating.calibration import Calibrated
from qlazy.calibrating.experts import reason_not, round_experts
from qlazy.calibrating.fill_part import fill_part, tie
from qlazy.calibrating.rounding import Seen, curvature_of, round_layer, round_stack, weight_of, why_less
from qlazy.calibrating.spilled import spilled
from qlazy.calibrating.stages import find_stages, input_of
from qlazy.errors import CorruptCheckpoint, UnsupportedModel, UsageError
from qlazy.formats import Codebook4
from qlazy.layers.packed_stack import PackedStack
from qlazy.layers.quant_linear import NonFiniteError, QuantLinear
from qlazy.match import Match, match_tensors
from qlazy.memory import trim_heap
from qlazy.place import empty
from qlazy.placeholder import build_placeholder
from qlazy.planning.plan import Plan, make_plan
from qlazy.planning.recipe import make_recipe
from qlazy.quantizing.curvature import Curvature
from qlazy.sources.source import Source
from qlazy.swap import swap_layers

TOKENS = 4096
"""Tokens that go through a block at a time."""


def require_walk(model: PreTrainedModel, plan: Plan, length: int, make: Callable[[Tensor], Walk]) -> None:
    """Refuse what cannot be calibrated, before it costs anything: a text of a few tokens goes up to the first block.

    Args:
        model: A placeholder.
        plan: What will be written.
        length: Tokens of a sequence.
        make: Makes a walk with tokens.
    Raises:
        UsageError: a weight has the format of a codebook, or the model takes no sequences of that length.
        UnsupportedModel: the model cannot be run block by block.

    Memory: what the decoder holds beside its blocks.
    """
    found = next((t.format for t in plan.tensors if isinstance(t.format, Codebook4)), None)
    if found is not None:
        raise UsageError(
            f"{found.name} is bitsandbytes' own rounding, which is not calibrated.",
            hint="Use --format int4 or int8, or leave --calibrate out.",
        )
    find_decoder(model)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < length:
        raise UsageError(
            f"Sequences of {length} tokens are longer than the {most} positions that {type(model).__name__} knows.",
            hint=f"Use --sequence-length {most}.",
        )
    trial = make(torch.arange(4).view(2, 2))
    trial.batch = 1  # so that what it tells its blocks is compared from sequence to sequence
    trial.begin()


class Walk:
    """A text on its way through a model.

    Args:
        model: A placeholder, its layers swapped: what is quantized goes there.
        plan: The exact plan.
        match: What fills it.
        source: Where it comes from.
        tokens: int64 (S, L), the text.
        trust_remote_code: Run Python code from the model's folder.
        drop_page_cache: Give the file pages that reading brings in back to the kernel.

    Memory: names and shapes; what each method says.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        match: Match,
        source: Source,
        tokens: Tensor,
        *,
        trust_remote_code: bool = False,
        drop_page_cache: bool = True,
    ) -> None:
        self.decoder = find_decoder(model)
        self.model, self.plan, self.match, self.tokens = model, plan, match, tokens
        self.batch = max(size for size in range(1, max(1, TOKENS // tokens.shape[1]) + 1) if len(tokens) % size == 0)
        self._packed = {tensor.name for tensor in plan.tensors if tensor.format is not None}
        self.done = Calibrated(sequences=tokens.shape[0], tokens=tokens.shape[1], plain=self._outside())
        self._drop_page_cache = drop_page_cache
        # The same model once more, whose layers stay what they are.
        self._plain = build_placeholder(source, getattr(torch, plan.dtype), trust_remote_code=trust_remote_code)
        self._plain_match = match_tensors(self._plain, source)
        whole = make_plan(source, make_recipe(modules_to_not_convert=["*"]), plan.budget, dtype=plan.dtype)
        self._plain_plan = swap_layers(self._plain, whole, self._plain_match, source)
        joined = [fill for fill in self._plain_match.fills if 0 < len(self._packed & {*fill.targets}) < len({*fill.targets})]
        if joined:
            raise UnsupportedModel(
                f"{joined[0].sources[0].name!r} holds {joined[0].targets[0]!r} and others, of which some stay in {plan.dtype}.",
                hint="Leave --calibrate out, or quantize all of them.",
            )
        self._calls: list[Call] = []
        self.hidden = self.clean = torch.empty(0)
        """(S, L, K), what goes into the next block: out of rounded blocks, and out of those in 16 bits."""
        self.next = 0
        """The next block."""

    def packed_in(self, number: int) -> set[str]:
        """Names of the weights of a block that are quantized.

        Args:
            number: Which block.
        Returns:
            Names in the model.
        """
        return {name for name in self._packed if self.decoder.number_of(name) == number}

    def begin(self, hidden: Tensor | None = None, clean: Tensor | None = None, at: int = 0) -> None:
        """Embed the text; or go on with what goes into a later block.

        Args:
            hidden: (S, L, K), what goes into block `at` out of rounded blocks, where that is known.
            clean: The same out of blocks in 16 bits.
            at: Which.

        Memory: what the decoder holds beside its blocks, and activations of one batch.
        """
        names = self._beside()
        fill_part(self.model, self.plan, self.match.fills, names, self._drop_page_cache)
        tied = tie(self.model)
        blocks = [self.decoder.block(self.model, number) for number in range(self.decoder.count)]
        tokens = self.tokens if hidden is None else self.tokens[: 2 * self.batch]
        made, self._calls = embed(self.decoder.module(self.model), blocks, tokens, self.batch)
        empty(self.model, [*names, *tied])
        trim_heap()
        if hidden is None or clean is None:
            hidden, clean = made, spilled(tuple(made.shape), made.dtype).copy_(made)
        self.hidden, self.clean, self.next = hidden, clean, at

    def step(self, reading: Callable[[int], None] | None = None) -> None:
        """Quantize the next block into the model's storage, and run it.

        Args:
            reading: Called with the bytes of the block that are read.
        Raises:
            CorruptCheckpoint: a weight is NaN or infinite.

        Memory: the block in 16 bits twice and in low bits, the curvature of one layer (`curvature_of`), activations of one
        batch and the ring of a load.
        """
        number, call = self.next, self._calls[self.next]
        names = [t.name for t in self._plain_plan.tensors if self.decoder.number_of(t.name) == number]
        fill_part(self._plain, self._plain_plan, self._plain_match.fills, names, self._drop_page_cache, reading)
        block = self.decoder.block(self._plain, number)
        # Two streams: what the rounded model makes of the text, and what the model would; each layer is to make up for what
        # those before it have changed.
        reference = copy.deepcopy(block)
        self._round_block(number, block, reference, call)
        for stream, runs in ((self.hidden, block), (self.clean, reference)):
            for part in stream.split(self.batch):
                part.copy_(run_block(runs, call, part))
        empty(self._plain, names)
        trim_heap()
        self.done.blocks += 1
        self.next = number + 1

    def _round_block(self, number: int, block: nn.Module, reference: nn.Module, call: Call) -> None:
        prefix = f"{self.decoder.list_path}.{number}."
        layers: dict[str, QuantLinear] = {}
        stacks: dict[str, dict[str, PackedStack]] = {}
        for name in sorted(self.packed_in(number)):
            path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(path)
            held = owner if isinstance(owner, QuantLinear) else owner._modules[leaf]
            assert isinstance(held, QuantLinear | PackedStack)
            held.allocate("cpu")
            path = path.removeprefix(prefix)
            if isinstance(held, QuantLinear):
                layers[path] = held
            else:
                stacks.setdefault(path, {})[leaf] = held
        left = {path: reason for path in stacks if (reason := reason_not(block.get_submodule(path)))}
        experts = [path for path in stacks if path not in left]
        stages, unseen = find_stages(block, [*layers, *experts], experts, call, self.hidden[: self.batch])
        weights = torch.cat([_weights(run_block(reference, call, part)) for part in self.clean.split(self.batch)])
        for stage in stages:
            path = stage.names[0]
            if path in experts:
                calls = (input_of(block, path, call, part) for part in self.hidden.split(self.batch))
                with _naming(f"{prefix}{path}"):
                    module, tokens = block.get_submodule(path), self.tokens.numel()
                    made, less = round_experts(module, stacks[path], (seen for seen in calls if seen is not None), tokens)
                if less:
                    told = "; ".join(f"{count} of the experts: {reason}" for reason, count in less.items())
                    self.done.plain[f"{prefix}{path}"] = told
                self.done.weights += made
                continue
            # What is added to the stream of the residuals counts by how large that is, as the next norm divides by it.
            adds = len(stage.names) == 1 and layers[path].out_features == self.hidden.shape[-1]
            inputs = self._inputs(block, reference, path, call, weights if adds else None)
            with _naming(f"{prefix}{path}"):
                curvature = curvature_of(layers[path].in_features, inputs)
            for path in stage.names:
                self._round_layer(f"{prefix}{path}", block.get_submodule(path), layers[path], curvature)
        for path, reason in (left | unseen).items():
            self.done.plain[f"{prefix}{path}"] = reason
            if path in layers:
                self._round_layer(f"{prefix}{path}", block.get_submodule(path), layers[path], None)
            for leaf, stack in stacks.get(path, {}).items():
                with _naming(f"{prefix}{path}.{leaf}"):
                    round_stack(stack, block.get_submodule(path).get_parameter(leaf))

    def _inputs(self, block: nn.Module, reference: nn.Module, path: str, call: Call, weights: Tensor | None) -> Iterator[Seen]:
        """What a layer takes in, batch by batch."""
        for start in range(0, len(self.hidden), self.batch):
            batch = slice(start, start + self.batch)
            seen = input_of(block, path, call, self.hidden[batch])
            clean = input_of(reference, path, call, self.clean[batch])
            if seen is not None:
                of_batch = None if weights is None else weights[batch]
                yield Seen(x=seen[0], clean=None if clean is None else clean[0], weights=of_batch)

    def _round_layer(self, name: str, linear: nn.Module, layer: QuantLinear, curvature: Curvature | None) -> None:
        weight = weight_of(linear)
        with _naming(name):
            weight.copy_(round_layer(layer, weight, curvature))
        if reason := why_less(layer.in_features, curvature):
            self.done.plain.setdefault(name, reason)
        else:
            self.done.weights += weight.numel()

    def _beside(self) -> list[str]:
        """What the decoder holds beside its blocks; a table under the name under which it is filled."""
        tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        groups = [{target, origin} for target, origin in tied.items()]
        wanted = {name for group in groups if any(map(self.decoder.is_beside, group)) for name in group}
        names = [tensor.name for tensor in self.plan.tensors]
        return [name for name in names if self.decoder.is_beside(name) or name in wanted]

    def _outside(self) -> dict[str, str]:
        """Quantized weights that are in no block."""
        return {name: "in no block" for name in sorted(self._packed) if self.decoder.number_of(name) is None}


def _weights(hidden: Tensor) -> Tensor:
    """One over the root mean square of each token."""
    return hidden.to(torch.float32).square().mean(-1).clamp_(min=1e-12).rsqrt_()


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the weight that is not finite, or what goes into it."""
    try:
        yield
    except UsageError as error:
        raise CorruptCheckpoint(f"{name!r}: {error.message}", hint=error.hint) from None
    except NonFiniteError:
        raise CorruptCheckpoint(
            f"{name!r} holds a NaN or an infinity, or what goes into it does.",
            hint="Download the model again, or try --dtype float32.",
        ) from None
