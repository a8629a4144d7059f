"""A Llama checkpoint as the GGUF files that llama.cpp reads: bfloat16 as it is, and llama.cpp's own quantizations of that.

    python benchmarks/gguf_files.py FOLDER q4_0 model.q4_0.gguf

The values are the checkpoint's, bit for bit, but for two things that the format asks for: query and key rows stand in the
order of llama.cpp's rotary embedding, and norms are float32. The quantized files are made by `llama_model_quantize` with its
defaults, as the `llama-quantize` program does, so that the types of the head and the embeddings are those that users get.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from qlazy.sources.source import Source, TensorInfo, open_source

KINDS = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M", "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}
"""What `quantize` can make, and llama.cpp's name of it."""


def write_bf16(folder: Path, path: Path) -> Path:
    """Write a folder with a Llama checkpoint in bfloat16 as one GGUF file; one that is there is kept.

    The file has no tokenizer: token ids go in and come out.

    Memory: the largest tensor, twice.
    """
    if path.exists():
        return path
    source = open_source(str(folder), local_files_only=True)
    layers = source.config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    _write_config(writer, source)
    for info in source.tensors.values():
        name = names.get_name(info.name, try_suffixes=(".weight",))
        if len(info.shape) == 1:
            dtype, kind, nbytes = np.dtype(np.float32), gguf.GGMLQuantizationType.F32, 2 * info.nbytes
        else:
            dtype, kind, nbytes = np.dtype(np.uint16), gguf.GGMLQuantizationType.BF16, info.nbytes
        writer.add_tensor_info(name, info.shape, dtype, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for info in source.tensors.values():
        writer.write_tensor_data(_values(info, source))
    writer.close()
    return unfinished.rename(path)


def quantize(source: Path, target: Path, kind: str, *, threads: int = 2) -> Path:
    """Quantize a GGUF file with llama.cpp; one that is there is kept.

    Raises:
        RuntimeError: llama.cpp refused.
    """
    import llama_cpp

    if target.exists():
        return target
    silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, KINDS[kind]), threads
    unfinished = target.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(options)) != 0:
        raise RuntimeError(f"llama.cpp could not make {kind} of {source.name}")
    return unfinished.rename(target)


def tensor_types(path: Path) -> dict[str, str]:
    """The type of each tensor of a GGUF file, by its name."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def bytes_for_a_token(path: Path) -> int:
    """Bytes of weights that one token needs: all of them, but for a table of embeddings that is no head as well."""
    tensors = gguf.GGUFReader(path).tensors
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    return int(sum(tensor.n_bytes for tensor in tensors if not (untied and tensor.name == "token_embd.weight")))


def _write_config(writer: gguf.GGUFWriter, source: Source) -> None:
    config = source.config
    heads = config["num_attention_heads"]
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def _values(info: TensorInfo, source: Source) -> np.ndarray:
    """A tensor's values as the file holds them."""
    stored = np.memmap(info.path, np.uint16, "r", info.offset, info.shape)
    if len(info.shape) == 1:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    heads = source.config["num_attention_heads"]
    if info.name.endswith("k_proj.weight"):
        heads = source.config.get("num_key_value_heads", heads)
    elif not info.name.endswith("q_proj.weight"):
        return np.array(stored)
    rows, columns = info.shape
    # Of each head, the two halves that rotate together become neighbours.
    return np.ascontiguousarray(stored.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(info.shape)


def main() -> None:
    """Make one file, and print as JSON what it took and holds."""
    folder, kind, target = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    found: dict[str, Any] = {}
    if not target.exists():
        start = time.perf_counter()
        plain = write_bf16(folder, target.with_name(target.name.replace(f".{kind}.gguf", ".bf16.gguf")))
        found["write_s"] = time.perf_counter() - start
        start = time.perf_counter()
        quantize(plain, target, kind)
        found["quantize_s"] = time.perf_counter() - start
    types = tensor_types(target)
    head = types.get("output.weight", types["token_embd.weight"])
    found |= {"bytes": target.stat().st_size, "embedding": types["token_embd.weight"], "head": head}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
