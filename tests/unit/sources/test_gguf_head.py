"""The head of a GGUF file that transformers makes a config of, held against the config that it makes of the whole file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import PretrainedConfig

from qlazy.sources.gguf import read_gguf_header
from qlazy.sources.gguf_head import write_head
from qlazy.sources.gguf_parts import read_gguf

WORDS = 5000
"""More than a header keeps."""


def write(path: Path, architecture: str, *, vocab_size: bool) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Mistral of flan")  # both are asked for
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(16)
    writer.add_sliding_window(512)
    if vocab_size:
        writer.add_vocab_size(WORDS + 8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"word {number}" for number in range(WORDS)])
    writer.add_token_types([1] * WORDS)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_key_value("general.some", -3, gguf.GGUFValueType.INT32)
    writer.add_key_value("general.tags", ["one", "two"], gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.STRING)
    for name in ("token_embd.weight", "blk.0.attn_q.bias", "blk.0.ffn_norm.weight", "output.weight"):
        writer.add_tensor(name, np.ones((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("vocab_size", [False, True], ids=["words counted", "words told"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3", "stablelm", "falcon", "t5"])
def test_transformers_makes_the_same_config_of_it(tmp_path, architecture, vocab_size):
    whole = write(tmp_path / "whole.gguf", architecture, vocab_size=vocab_size)
    told, tensors = read_gguf(whole)
    head = tmp_path / "head.gguf"
    write_head(head, read_gguf_header(whole).metadata, tensors, vocab_size=told.get("vocab_size"))
    wanted, _ = PretrainedConfig.get_config_dict(tmp_path, gguf_file=whole.name)
    made, _ = PretrainedConfig.get_config_dict(tmp_path, gguf_file=head.name)
    assert made == wanted
    assert head.stat().st_size < 4000 < whole.stat().st_size / 10


@pytest.mark.parametrize(
    ("architecture", "names", "tied"),
    [
        ("llama", ["token_embd.weight", "output.weight"], False),
        ("llama", ["token_embd.weight"], True),
        ("bloom", ["token_embd.weight", "output.weight"], True),  # of these llama.cpp writes the head, though it is tied
    ],
)
def test_whether_the_head_is_tied_is_told_by_the_tensors_of_all_parts(tmp_path, architecture, names, tied):
    write_head(tmp_path / "head.gguf", {"general.architecture": architecture}, names, vocab_size=8)
    made, _ = PretrainedConfig.get_config_dict(tmp_path, gguf_file="head.gguf")
    assert made["tie_word_embeddings"] is tied
