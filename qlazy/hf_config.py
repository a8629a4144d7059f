"""`qlazy.QlazyConfig`: what transformers keeps of a recipe, in a config and in `config.json`."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlazy.formats import Codebook4, Format, Int4
from qlazy.planning.recipe import Recipe, make_recipe


@register_quantization_config("qlazy")
class QlazyConfig(QuantizationConfigMixin):
    """What to quantize and how, for `from_pretrained`.

    Args:
        bits: 4 or 8.
        format: `int4`, `int8`, `nf4` or `fp4`; by default what `bits` says.
        group_size: Columns that share a scale.
        symmetric: Int4 without zero points.
        double_quant: NF4 and FP4 with absmax in 8 bits.
        head_bits: Bits of an output head that is not tied to the embedding: 8, 4, or 16 to keep it.
        embedding_bits: Bits of token embeddings; `from_pretrained` takes 16 alone.
        module_bits: Bits by name or glob of modules.
        modules_to_not_convert: Modules kept in the model's dtype beside the defaults.
        **kwargs: What transformers adds when it reads a saved config; `quant_method` is all that is expected.
    Raises:
        UsageError: as `make_recipe`.
    """

    def __init__(
        self,
        bits: int = 4,
        format: str | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        double_quant: bool = True,
        head_bits: int = 8,
        embedding_bits: int = 16,
        module_bits: dict[str, int | str] | None = None,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = set(kwargs) - {"quant_method"}
        if unknown:
            raise TypeError(f"QlazyConfig has no option {sorted(unknown)[0]!r}")
        self.quant_method: Any = "qlazy"
        self.bits = bits
        self.format = format
        self.group_size = group_size
        self.symmetric = symmetric
        self.double_quant = double_quant
        self.head_bits = head_bits
        self.embedding_bits = embedding_bits
        self.module_bits = module_bits
        self.modules_to_not_convert = modules_to_not_convert
        self._saved: dict[str, Any] | None = None
        self.recipe()

    def describe(self, layout: dict[str, Any]) -> None:
        """Say from now on what a folder holds that the model is saved to, and not by which options it was made.

        Args:
            layout: A `quantization_config` that other libraries read.
        """
        self._saved = layout

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` says.

        Returns:
            The options, or what `describe` was told.
        """
        told = super().to_dict()
        saved = told.pop("_saved", None)
        return told if saved is None else saved

    def recipe(self) -> Recipe:
        """The recipe that these options make.

        Returns:
            A recipe.
        """
        return make_recipe(
            bits=self.bits,
            format=self.format,
            group_size=self.group_size,
            symmetric=self.symmetric,
            double_quant=self.double_quant,
            head_bits=self.head_bits,
            embedding_bits=self.embedding_bits,
            module_bits=self.module_bits,
            modules_to_not_convert=self.modules_to_not_convert,
        )

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> QlazyConfig:
        """The options that make a recipe.

        Args:
            recipe: Any recipe.
        Returns:
            A config.
        """
        chosen, listed = recipe.format, (*recipe.chosen, *recipe.modules)
        name = {"Int4": "int4", "Int8": "int8"}.get(type(chosen).__name__) or getattr(chosen, "kind", None)
        return cls(
            bits=chosen.bits,
            format=name,
            group_size=chosen.group_size,
            symmetric=chosen.symmetric if isinstance(chosen, Int4) else None,
            double_quant=getattr(chosen, "double_quant", True),
            head_bits=recipe.head.bits if recipe.head else 16,
            embedding_bits=recipe.embedding.bits if recipe.embedding else 16,
            module_bits={name.removesuffix(".weight"): _asked(fmt, chosen) for name, fmt in listed} or None,
            modules_to_not_convert=list(recipe.modules_to_not_convert) or None,
        )


def _asked(fmt: Format | None, chosen: Format) -> int | str:
    """What `module_bits` says for a format."""
    if fmt is None or fmt == chosen:
        return fmt.bits if fmt else 16
    return fmt.kind if isinstance(fmt, Codebook4) else fmt.name
