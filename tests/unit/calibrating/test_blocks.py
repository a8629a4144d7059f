"""Blocks run one by one give what the model gives, and models that cannot be run so are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qlazy.calibrating.blocks import embed, find_decoder, run_block
from qlazy.calibrating.stages import add_products, find_stages, input_of
from qlazy.errors import UnsupportedModel

SHARED = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHARED)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SHARED, num_key_value_heads=1, head_dim=16, layer_types=["sliding_attention", "full_attention"], sliding_window=4
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SHARED, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    ),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@torch.no_grad()
def test_blocks_one_by_one_give_what_the_model_gives(model):
    tokens = torch.randint(0, 64, (6, 12))
    decoder = find_decoder(model)
    blocks = [decoder.block(model, number) for number in range(decoder.count)]
    hidden, calls = embed(decoder.module(model), blocks, tokens, 2)
    states = model(tokens, output_hidden_states=True).hidden_states
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        torch.testing.assert_close(hidden, states[number])
        hidden = torch.cat([run_block(block, call, part) for part in hidden.split(2)])
    last = states[-1]  # behind the final norm
    norm = getattr(decoder.module(model), "norm", None) or decoder.module(model).ln_f
    torch.testing.assert_close(norm(hidden), last)


def test_finds_the_blocks_and_what_is_beside_them(model):
    decoder = find_decoder(model)
    names = [name for name, _ in model.named_parameters()]
    assert {decoder.number_of(name) for name in names} == {None, 0, 1}
    beside = [name for name in names if decoder.is_beside(name)]
    assert any("emb" in name or "wte" in name for name in beside) and not any("head" in name for name in beside)


@torch.no_grad()
def test_layers_that_take_in_the_same_are_one_stage():
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    block = model.model.layers[0]
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    hidden, (call, _) = embed(model.model, list(model.model.layers), torch.randint(0, 64, (2, 8)), 1)
    block.spare = nn.Linear(32, 32)
    stages, left = find_stages(block, [*names, "spare"], [], call, hidden[:1])
    leaves = [[name.rpartition(".")[2] for name in stage.names] for stage in stages]
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert left == {"spare": "does not run in a text"}


@torch.no_grad()
def test_inputs_and_their_products():
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    block, tokens = model.model.layers[0], torch.randint(0, 64, (4, 8))
    hidden, calls = embed(model.model, list(model.model.layers), tokens, 2)
    seen: list[Tensor] = []
    block.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run_block(block, calls[0], hidden[:2])
    whole, halves = torch.zeros(1, 64, 64), torch.zeros(2, 32, 32)
    found = [input_of(block, "mlp.down_proj", calls[0], part) for part in hidden.split(2)]
    gathered = [args[0].reshape(-1, 64) for args in found if args is not None]
    assert torch.equal(gathered[0], seen[0].reshape(-1, 64)) and len(gathered) == 2
    for x in gathered:
        add_products(whole, x, x)
        add_products(halves, x, x + 0)
    x = torch.cat(gathered).double()
    torch.testing.assert_close(whole[0].double(), x.T @ x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(halves, torch.stack([whole[0, :32, :32], whole[0, 32:, 32:]]))


class Decoder(nn.Module):
    """Calls two blocks in a way that can be chosen."""

    def __init__(self, between: Any = None, more: Any = None, called: int = 2) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(64, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.between, self.more, self.called = between or (lambda x: x), more or (lambda x: 0), called

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.embed(input_ids)
        first = x
        for layer in self.layers[: self.called]:
            x = self.between(layer(x, self.more(first)))
        return x


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (Decoder(between=lambda x: x * 2), "does more than hand on"),
        (Decoder(more=lambda first: first), "gives its blocks more"),
        (Decoder(called=1), "runs 1 of its 2 blocks"),
        (Decoder(more=lambda first: first.no_such), "cannot be run block by block"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_do_more_than_hand_on_are_refused(decoder, words):
    with pytest.raises(UnsupportedModel, match=words):
        embed(decoder, list(decoder.layers), torch.arange(8).view(4, 2), 2)
    assert all("forward" not in vars(layer) for layer in decoder.layers)


@torch.no_grad()
def test_what_is_the_same_for_all_sequences_is_no_reason_to_refuse():
    decoder = Decoder(more=lambda first: {"mask": torch.ones(2), "flags": [True, None]})
    hidden, calls = embed(decoder, list(decoder.layers), torch.arange(8).view(4, 2), 2)
    assert torch.equal(hidden, decoder.embed(torch.arange(8).view(4, 2))) and len(calls) == 2


def test_models_without_one_list_of_blocks_are_refused():
    model = MODELS["llama"]()
    model.model.others = nn.ModuleList([nn.Linear(8, 8)])
    with pytest.raises(UnsupportedModel, match="should be one list in 'model'; it has layers, others"):
        find_decoder(model)
    bert = transformers.BertModel(transformers.BertConfig(**SHARED))
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        find_decoder(bert)
