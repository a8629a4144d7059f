"""Every model type of transformers, tiny and random, through a real load: what is quantized, and what it costs.

    python -m benchmarks.models --moe --json moe.json           # families with experts, in both forms of checkpoint
    python -m benchmarks.models --json all.json                 # all of them, some minutes a hundred
    python -m benchmarks.models --report moe.json all.json --out docs/models.md

For each type and class a tiny random model is saved as a sharded checkpoint and loaded with its experts, heads and embeddings
in low bits. Three models are compared on the same inputs: ours, the original, and the original with our dequantized weights.
Each type runs in a process of its own, so that none can spoil another.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import math
import multiprocessing
import re
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = {
    "causal LM": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "image-text": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    "encoder": (
        "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_CTC_MAPPING_NAMES",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    ),
}
"""What is looked at, and the tables of transformers' auto classes that list it."""

WIDE, EXPERTS = 512, 8
"""Width and number of experts, where they shall hold nearly all bytes."""


def subjects() -> Iterator[tuple[str, str, str]]:
    """Kind, model type and class of every model.

    Yields:
        Each class once.
    """
    from transformers.models.auto import modeling_auto

    seen = set()
    for kind, mappings in KINDS.items():
        for mapping in mappings:
            for model_type, names in getattr(modeling_auto, mapping, {}).items():
                name = names if isinstance(names, str) else names[0]
                if (model_type, name) not in seen:
                    seen.add((model_type, name))
                    yield kind, model_type, name


def build(model_type: str, name: str, *, factor: int = 32, wide_experts: int = 0, fitted: bool = True) -> Any:
    """A tiny random model in float32.

    Args:
        model_type: Key of `CONFIG_MAPPING`.
        name: Class.
        factor: What widths are divided by.
        wide_experts: 2 makes experts hold nearly all bytes, 1 does less, so that fewer configs refuse it.
        fitted: Make numbers that depend on others agree with them, see `benchmarks.shapes`.
    Returns:
        The model in evaluation mode.
    Raises:
        ValueError: a model of more than 40 million parameters.
    """
    import torch
    import transformers

    from benchmarks.shapes import fit, parts_of
    from tests.lazy.shrink import tiny_config
    from tests.lazy.zoo import _modeling

    cls = getattr(transformers, name, None) or getattr(_modeling(model_type), name)
    config = tiny_config(model_type, factor, cls.config_class)
    parts = list(parts_of(config))
    if wide_experts:
        widen(parts, MOE if wide_experts == 2 else {key: value for key, value in MOE.items() if not _SHAPES.search(key)})
    for part in parts:
        for key, value in list(vars(part).items()):
            if _CHOSEN.search(key) and (value is None or type(value) is int):
                set_one(part, key, min(value or 2, 2))
        if getattr(part, "is_heterogeneous", False) and part._heterogeneity_spec.per_layer_overrides:
            # What layers have of their own: of one that is still there.
            own, first = part._heterogeneity_spec.per_layer_attributes, min(part._heterogeneity_spec.per_layer_overrides)
            if getattr(part, "layer_types", None):
                part.layer_types = [part.layer_types[0], type(part)().layer_types[first]]
            values = {key: max(1, int(vars(part)[key]) // 2) for key in own}
            if "qk_nope_head_dim" in own and "head_dim" in vars(part):  # a quarter is rotated, as it is where layers are wide
                part.head_dim, values["qk_nope_head_dim"] = 4 * part.qk_rope_head_dim, 3 * part.qk_rope_head_dim
            part.per_layer_config = {1: values}
    if fitted:
        fit(config, model_type, name)
    if model_type == "dbrx":
        config.attn_config.clip_qkv = 8.0
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if count > 40e6:
        raise ValueError(f"{count:,} parameters where widths are divided by {factor}")
    torch.manual_seed(0)
    model = cls(config).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the fused product wants strides that tiny widths do not have
    spread(model)
    return model


_CHOSEN = re.compile(r"experts_per_tok(en)?$|top_?k$|topk$|experts_k$|top_k_experts$")
"""Words for the number of experts that a token goes to."""

MOE: dict[str, Any] = {
    "moe_intermediate_size": WIDE,
    "expert_ffn_hidden_size": WIDE,
    "ffn_hidden_size": WIDE,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "global_head_dim": 32,
    "swa_head_dim": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "qk_head_dim": 64,
    "v_head_dim": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "top_k": 2,
    "moe_top_k": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "num_experts_per_token": 2,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "decoder_sparse_step": 1,
    "interleave_moe_layer_step": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "moe_layer_start_index": 0,
    "moe_layer_interval": 1,
    "mlp_only_layers": [],
    "index_head_dim": 64,
    "hidden_size": 128,
    "d_model": 128,
}
"""What makes experts hold nearly all bytes, in whichever words a config has for it."""


_SHAPES = re.compile(r"head|hidden_size$|d_model|rank|num_experts_per_tok")
"""Words for shapes outside of experts."""


def widen(parts: list[Any], words: dict[str, Any]) -> None:
    """Give experts widths and numbers that make them nearly all of the model.

    Args:
        parts: A config and those in it, changed in place.
        words: What to set where one has it.
    """
    for part in parts:
        values = vars(part)
        if not any("expert" in key or "moe" in key for key in values):
            continue
        for key, value in words.items():
            if key in values:
                old = values[key]
                set_one(part, key, [value] * len(old) if isinstance(old, list | tuple) and key != "mlp_only_layers" else value)
        for key in list(values):
            if key == "mlp_layer_types" and values[key]:
                set_one(part, key, ["sparse" if layer == "dense" else layer for layer in values[key]])
            if key == "num_local_experts" or key in ("num_experts", "moe_num_experts", "n_routed_experts"):
                set_one(part, key, EXPERTS)
        if "moe_intermediate_size" not in values and "intermediate_size" in values:
            set_one(part, "intermediate_size", WIDE)


def set_one(part: Any, key: str, value: Any) -> None:
    """Set what the config lets itself be set."""
    try:
        setattr(part, key, value)
    except Exception:
        return


def spread(model: Any) -> None:
    """Weights of ordinary size whatever the class initializes with, so that each of them counts."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.dim() > 1:
                deviation = float(parameter.std()) if parameter.numel() > 1 else 1.0
                if not 1e-3 < deviation < 1e3 or "expert" in name:
                    parameter.normal_(0, 1 / math.sqrt(max(1, parameter.shape[-1])))


def output_of(model: Any, inputs: dict[str, Any]) -> Any:
    """The model's main floating result."""
    import torch

    if type(model).forward is torch.nn.Module.forward:
        model = model.thinker  # models that only generate, in several voices: the one that reads
    with torch.no_grad():
        torch.manual_seed(2)
        out = model(**inputs)
    for key in ("logits", "prediction_logits", "logits_per_text", "last_hidden_state"):
        if isinstance(getattr(out, key, None), torch.Tensor):
            return getattr(out, key)
    floats = [value for value in out.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return floats[0]


def run(model_type: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Save, load and compare one model.

    Args:
        model_type: Key of `CONFIG_MAPPING`.
        name: Class.
        options: `moe`: experts hold nearly all bytes, and both forms of checkpoint are loaded; others go to `load_quantized`.
    Returns:
        What the table says of it.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    moe = options.pop("moe", False)
    from tests.lazy.shrink import FACTORS

    rows: list[dict[str, Any]] = []
    for fitted, level, factor in itertools.product((True, False), (2, 1, 0) if moe else (0,), FACTORS):
        rows.append(_run(model_type, name, dict(options), level, factor, fitted))
        if rows[-1]["status"] == "loaded" and (rows[-1].get("experts") or not moe):
            return rows[-1]
    return max(rows, key=lambda row: (STATES.index(row["status"]), row.get("experts", 0) > 0, row.get("share", 0.0)))


_UNFIT = re.compile(r"missing \d+ required|unexpected keyword|[Yy]ou (have to|must) specify|has no attribute|^KeyError")
"""Words for inputs of another kind than the class takes."""

STATES = ("not built", "not saved", "failed", "not called", "loaded")
"""How far a model came."""


def _run(model_type: str, name: str, options: dict[str, Any], level: int, factor: int, fitted: bool) -> dict[str, Any]:
    from benchmarks.shapes import inputs_of

    row: dict[str, Any] = {"model_type": model_type, "class": name}
    try:
        model = build(model_type, name, factor=factor, wide_experts=level, fitted=fitted)
    except Exception as error:
        return row | {"status": "not built", "reason": short(error)}
    wanted, reasons = None, []
    for way in inputs_of(model):
        try:
            inputs = way()
            wanted = output_of(model, inputs)
            break
        except Exception as error:
            reasons.append(short(error))
    else:  # what came of the inputs that the class takes says more than that others are missing
        row["reason"] = next((reason for reason in reasons if not _UNFIT.search(reason)), reasons[0])
    forms = [True, False] if level else [True]
    for original in forms:
        form = "hub" if original else "transformers"
        try:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    model.save_pretrained(folder, max_shard_size="300KB", save_original_format=original)
                except Exception as error:
                    row |= {"status": "not saved", "reason": short(error)}
                    continue
                row |= compare(model, folder, inputs if wanted is not None else None, wanted, options, form)
        except Exception as error:
            row |= {"status": "failed", "reason": f"{form}: {short(error)}", "trace": traceback.format_exc()[-3000:]}
            break
    return row


def compare(model: Any, folder: str, inputs: Any, wanted: Any, options: dict[str, Any], form: str) -> dict[str, Any]:
    """Load a folder and compare."""
    import torch

    import qlazy

    planned = qlazy.plan(folder, device_map="cpu", max_memory={"cpu": "64GiB"}, **options)
    config = json.loads((Path(folder) / "config.json").read_text())
    if config.get("architectures") != [type(model).__name__]:
        config["architectures"] = [type(model).__name__]
        (Path(folder) / "config.json").write_text(json.dumps(config))
    ours = qlazy.load_quantized(folder, device_map="cpu", max_memory={"cpu": "64GiB"}, dtype="float32", **options)
    exact = ours.qlazy_report.plan
    source = sum(t.source_nbytes for t in exact.tensors)
    low = sum(t.source_nbytes for t in exact.tensors if t.format is not None)
    kept: dict[str, int] = {}
    for tensor in exact.tensors:
        if tensor.format is None:
            kept[tensor.reason] = kept.get(tensor.reason, 0) + tensor.nbytes
    experts = [t for t in exact.tensors if t.kind == "experts"]
    found: dict[str, Any] = {
        "status": "loaded",
        "share": low / max(1, source),
        "experts": len(experts),
        "bytes": source,
        "packed": exact.weight_bytes,
        f"planned_{form}": planned.weight_bytes,
        f"exact_{form}": exact.weight_bytes,
        "host_peak": ours.qlazy_report.host_peak_bytes,
        "kept": kept,
    }
    assert sum(ours.qlazy_report.device_bytes.values()) == exact.weight_bytes, "the plan is not what the model holds"
    if inputs is None:
        return found | {"status": "not called"}
    result = output_of(ours, inputs).double()
    twin = copy.deepcopy(model)
    held = dict(twin.named_parameters(remove_duplicate=False))
    for path, module in ours.named_modules(remove_duplicate=False):
        if hasattr(module, "storage") and hasattr(module, "format"):
            name = path if path in held else f"{path}.weight"
            values = module.dequantize()
            held[name].data.copy_(values.t() if getattr(module, "transposed", False) else values)
    same = output_of(twin, inputs).double()
    wanted = wanted.double()
    norm = max(float(wanted.norm()), 1e-30)
    found[f"error_{form}"] = float((result - same).norm()) / max(float(same.norm()), 1e-30)
    found["quantization"] = float((result - wanted).norm()) / norm
    found["finite"] = bool(torch.isfinite(result).all()) or not bool(torch.isfinite(wanted).all())
    return found


def short(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--kind", default="", help="one of " + ", ".join(KINDS))
    parser.add_argument("--moe", action="store_true", help="families with fused experts, which hold nearly all bytes")
    parser.add_argument("--skip", type=Path, nargs="*", default=[], help="rows of earlier runs; what loaded there is left out")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", default="", help="file for all rows")
    parser.add_argument("--options", default='{"embedding_bits": 8}', help="of load_quantized, as JSON")
    parser.add_argument("--report", nargs="+", type=Path, help="make a page of rows that were written before")
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"), help="the page")
    given = parser.parse_args()
    if given.report:
        given.out.write_text(page([json.loads(file.read_text()) for file in given.report]))
        return
    only = set(filter(None, given.only.split(",")))
    if given.moe:
        wanted = [("experts", model_type, name) for model_type, name in moe_subjects()]
    else:
        wanted = [s for s in subjects() if not given.kind or s[0] == given.kind]
    before = [row for file in given.skip for row in json.loads(file.read_text()) if row["status"] == "loaded"]
    done = {(row["kind"], row["model_type"], row["class"]) for row in before}
    wanted = [s for s in wanted if (not only or s[1] in only) and s not in done]
    options = json.loads(given.options) | ({"moe": True} if given.moe else {})
    rows = []
    pool, pending = start(wanted, options, given.jobs)
    for index, (kind, model_type, name) in enumerate(wanted):
        try:
            row = pending[index].get(timeout=SECONDS)
        except multiprocessing.TimeoutError:
            row = {"model_type": model_type, "class": name, "status": "crashed", "reason": f"no end in {SECONDS} s"}
            pool.terminate()  # it would go on, and the next ones wait for it
            pool, again = start(wanted[index + 1 :], options, given.jobs)
            pending = pending[: index + 1] + again
        rows.append({"kind": kind} | row)
        says = [f"{row['share']:.1%}"] if "share" in row else []
        says += [f"{k[6:]} {v:.1e}" for k, v in row.items() if k.startswith("error_")]
        says += ["PLAN" for k in row if k.startswith("planned_") and row[k] != row["exact_" + k[8:]]]
        reason = "" if row["status"] == "loaded" else row.get("reason", "")
        print(kind, model_type, name, row["status"], *says, reason, flush=True)
        if given.json:
            Path(given.json).write_text(json.dumps(rows, indent=1))
    pool.terminate()


SECONDS = 150
"""Time for one type."""


def start(wanted: list[tuple[str, str, str]], options: dict[str, Any], jobs: int) -> tuple[Any, list[Any]]:
    """Begin with some models.

    Args:
        wanted: Kind, type and class of each.
        options: See `run`.
        jobs: How many at a time.
    Returns:
        The processes, and what will be known of each model.
    """
    pool = multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=12)
    return pool, [pool.apply_async(run, (model_type, name, dict(options))) for _, model_type, name in wanted]


def page(groups: list[list[dict[str, Any]]]) -> str:
    """Rows as a page of documentation.

    Args:
        groups: Rows, of several runs; of a model that is in several of one kind the best counts.
    Returns:
        Markdown.
    """
    import torch
    import transformers

    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in (row for group in groups for row in group):
        key = (row["kind"], row["model_type"], row["class"])
        if key not in best or _rank(row) >= _rank(best[key]):
            best[key] = row
    kinds = list(dict.fromkeys(kind for kind, _, _ in best))
    lines = [
        "# Models",
        "",
        "Generated by `python -m benchmarks.models`: tiny random models of every type, saved as sharded checkpoints and loaded",
        f"with `embedding_bits=8` by transformers {transformers.__version__} and torch {torch.__version__}.",
        "",
        "- *low bits*: share of the stored bytes that become low-bit weights. Tiny models hold more in norms and convolutions",
        "  than real ones; under *experts* shapes are such that experts are nearly all of the model.",
        "- *error*: of our logits against those of the original model with our dequantized weights in float32 (norm of the",
        "  difference over norm). Under *experts* the larger of two: from tensors of each expert, as the hub has them, and",
        "  from fused ones.",
        "- *quantization*: the same against the original model. Of random weights, so it says nothing about quality.",
        "- *plan*: whether the bytes that `qlazy plan` tells from headers are those that the model holds. Where they are only",
        "  near, they differ by computed buffers and by small tensors that a class keeps in 16 bits, makes or merges.",
        "",
    ]
    for kind in kinds:
        rows = sorted((row for key, row in best.items() if key[0] == kind), key=lambda row: (row["model_type"], row["class"]))
        loaded = [row for row in rows if row["status"] == "loaded"]
        there = len(moe_subjects()) if kind == "experts" else sum(subject[0] == kind for subject in subjects())
        run_yet = "" if len(rows) >= there else f" {there - len(rows)} more have not been run."
        lines += [f"## {kind[0].upper()}{kind[1:]}", "", f"{len(loaded)} of {len(rows)} loaded and compared.{run_yet}", ""]
        lines += ["| type | class | low bits | error | quantization | plan |", "|---|---|---|---|---|---|"]
        for row in loaded:
            errors = [value for key, value in row.items() if key.startswith("error_")]
            exact = all(row[key] == row["exact_" + key[8:]] for key in row if key.startswith("planned_"))
            cells = [row["model_type"], f"`{row['class']}`", f"{row['share']:.1%}", f"{max(errors):.0e}"]
            cells += [f"{row['quantization']:.2f}", "exact" if exact else "near"]
            lines.append(f"| {' | '.join(cells)} |")
        others = [row for row in rows if row["status"] != "loaded"]
        if others:
            lines += ["", "Not compared:", ""]
            lines += [
                f"- {row['model_type']}, `{row['class']}`: {row['status']}; {row.get('reason', '')[:160]}" for row in others
            ]
        lines.append("")
    return "\n".join(lines)


def _rank(row: dict[str, Any]) -> tuple[Any, ...]:
    return STATES.index(row["status"]) if row["status"] in STATES else -1, row.get("experts", 0) > 0, row.get("share", 0.0)


def moe_subjects() -> list[tuple[str, str]]:
    """Model type and class of every model whose code has fused experts."""
    import transformers
    from transformers.models.auto import modeling_auto

    models = Path(transformers.__file__).parent / "models"
    has = re.compile(r"@use_experts_implementation|class \w*Experts?\w*\(nn\.Module\)")
    families = {f.parent.name for f in models.glob("*/modeling_*.py") if has.search(f.read_text(encoding="utf-8"))}
    found: dict[str, str] = {}
    for mapping in [m for group in KINDS.values() for m in group]:
        for model_type, names in getattr(modeling_auto, mapping, {}).items():
            from transformers.models.auto.configuration_auto import model_type_to_module_name

            if model_type_to_module_name(model_type) in families:
                found.setdefault(model_type, names if isinstance(names, str) else names[0])
    return sorted(found.items())


if __name__ == "__main__":
    main()
