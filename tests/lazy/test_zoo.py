"""Models of every kind, built eagerly and lazily under one seed: the same to the bit.

`docs/generate_lazy_census.py` compares all there are; here are those that others cannot build lazily, and a sample.
"""

import importlib
import importlib.util

import pytest
import torch
from torch import nn

from tests.lazy import zoo
from tests.lazy.compare import compare

pytestmark = pytest.mark.filterwarnings("ignore")

NAMED = {
    "vit": ("ViTModel", "ViTForMaskedImageModeling", "ViTForImageClassification"),
    "blip-2": ("Blip2Model", "Blip2ForConditionalGeneration"),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2ForCTC"),
    "hubert": ("HubertModel", "HubertForCTC"),
}
SAMPLE = (
    "bert", "gpt2", "t5", "llama", "mixtral", "deepseek_v3", "gemma3", "qwen2_vl", "clip", "whisper", "mamba", "swin", "beit",
    "encodec", "sam", "roberta", "falcon", "bart", "rwkv",
)  # fmt: skip
"""Ties, experts, fused experts, rotary buffers, weight norm, truncated normals, state spaces, nested models."""


@pytest.mark.parametrize(("model_type", "name"), [(model_type, name) for model_type, names in NAMED.items() for name in names])
def test_by_name(model_type, name):
    result = zoo.compare_first(dict(zoo.builders("transformers", model_type))[name])
    assert result.status == "equal" and not result.undetermined and not result.real, result


@pytest.mark.parametrize("model_type", SAMPLE)
def test_transformers(model_type):
    classes = dict(zoo.builders("transformers", model_type))
    # The base class, and the last of the heads.
    for name in (next(iter(classes)), list(classes)[-1]):
        result = zoo.compare_first(classes[name])
        assert result.status == "equal" and not result.real, (name, result)


class Positional(nn.Module):
    """The position embedding of wav2vec2 and hubert, as torchaudio and transformers both make it."""

    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv1d(32, 32, kernel_size=16, padding=8, groups=4)
        nn.init.normal_(self.conv.weight, mean=0, std=(4 / (16 * 32)) ** 0.5)
        nn.init.constant_(self.conv.bias, 0)
        self.conv = norm(self.conv, name="weight", dim=2)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64) for _ in range(2))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weight_norm(norm):
    result = compare(lambda: Positional(norm))
    assert result.status == "equal" and not result.undetermined, result


@pytest.mark.parametrize("model", ["wav2vec2_base", "hubert_base"])
def test_torchaudio(model):
    """Where it imports: the wheel for CUDA has an extension that a CPU build of torch cannot load; without it, it does."""
    torchaudio = imported("torchaudio")
    result = compare(getattr(torchaudio.models, model))
    assert result.status == "equal" and not result.real and result.tensors > 200, result


@pytest.mark.parametrize("kind", ["EmbeddingBag", "Embedding"])
def test_torchrec(kind):
    torchrec = imported("torchrec")
    config = getattr(torchrec, f"{kind}Config")
    tables = [config(name=f"t{i}", embedding_dim=8, num_embeddings=100 + i, feature_names=[f"f{i}"]) for i in range(3)]
    result = compare(lambda: getattr(torchrec, f"{kind}Collection")(tables=tables))
    assert result.status == "equal" and not result.real, result


def imported(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    try:
        return importlib.import_module(library)
    except (ImportError, OSError) as error:
        pytest.skip(f"{library} does not import beside torch {torch.__version__}: {error}")


@pytest.mark.parametrize(
    ("library", "sample"),
    [
        ("timm", ("vision_transformer", "resnet", "swin_transformer", "convnext", "beit", "mlp_mixer", "efficientnet", "tnt")),
        ("diffusers", ("UNet2DConditionModel", "UNet2DModel", "UNet1DModel", "AutoencoderKL", "DiTTransformer2DModel",
                       "SD3Transformer2DModel", "FluxTransformer2DModel")),
        ("torchvision", ("resnet", "vision_transformer", "swin_transformer", "segmentation.lraspp", "detection.ssdlite")),
    ],
)  # fmt: skip
def test_other_libraries(library, sample):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    known = zoo.families(library)
    for family in sample:
        assert family in known
        for name, ways in zoo.builders(library, family):
            result = zoo.compare_first(ways)
            assert result.status == "equal" and not result.real, (name, result)


def test_families_are_all_of_them():
    from transformers import CONFIG_MAPPING

    assert set(zoo.families("transformers")) == set(CONFIG_MAPPING)
    assert zoo.head_classes("bert")[0] == "BertModel" and "BertForMaskedLM" in zoo.head_classes("bert")


@pytest.mark.parametrize("factor", [16, 1])
def test_tiny_configs_are_tiny(factor):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.lazy.shrink import tiny_config

    config = tiny_config("llama", factor, LlamaConfig)
    assert (config.num_hidden_layers, config.vocab_size, config.hidden_size) == (2, 128, 4096 // factor)
    assert config.hidden_size == config.num_attention_heads * config.head_dim
    if factor == 16:
        with torch.device("meta"):
            assert sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters()) < 2_000_000
