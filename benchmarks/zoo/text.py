"""Encoders, decoders and encoder-decoders of text, from `transformers`: 2 layers, width 64, 4 heads, vocabulary 512."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from benchmarks.zoo.registry import BATCH, LENGTH, SOURCE, Case, model, padding, tokens

VOCABULARY = 512
LAYERS = 2
WIDTH = 64
HEADS = 4
INNER = 256
POSITIONS = 32

ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
}
DECODER: dict[str, Any] = {**ENCODER, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def encoder(net: nn.Module, collectives: int, **changed: Any) -> Case:
    """ids and a padding mask, both [batch, length]."""
    kwargs = {"input_ids": tokens(VOCABULARY - 3, 3, 7) + 3, "attention_mask": padding(3, 7)}
    shapes = {name: {0: BATCH, 1: LENGTH} for name in kwargs}
    return Case(net, kwargs, shapes, collectives, bounded=True, **changed)


def decoder(net: nn.Module, collectives: int = 2 * LAYERS + 2, **changed: Any) -> Case:
    """The prompt's ids and padding mask; logits of all positions."""
    return encoder(net, collectives, **changed)


@model
def bert() -> Case:
    return encoder(hf.BertModel(hf.BertConfig(**ENCODER)), 2 * LAYERS + 2)


@model
def roberta() -> Case:
    config = hf.RobertaConfig(**{**ENCODER, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1})
    return encoder(hf.RobertaForMaskedLM(config), 2 * LAYERS + 3)


@model
def distilbert() -> Case:
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=INNER,
        max_position_embeddings=POSITIONS, num_labels=3,
    )  # fmt: skip
    return encoder(hf.DistilBertForSequenceClassification(config), 2 * LAYERS + 2)


@model
def albert() -> Case:
    # One block, run twice; the pooler is much of the rest.
    config = hf.AlbertConfig(**ENCODER, embedding_size=32, num_hidden_groups=1)
    return encoder(hf.AlbertModel(config), 2 * LAYERS + 2)


@model
def electra() -> Case:
    return encoder(hf.ElectraForPreTraining(hf.ElectraConfig(**ENCODER, embedding_size=32)), 2 * LAYERS + 2)


@model
def gpt2() -> Case:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS, use_cache=False
    )
    return decoder(hf.GPT2LMHeadModel(config))


@model
def gpt_neox() -> Case:
    # Attention and layers of a block are added: one reduction of both.
    return decoder(hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**DECODER)), LAYERS + 2)


@model
def llama() -> Case:
    return decoder(hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, num_key_value_heads=2)))


@model
def qwen2() -> Case:
    config = hf.Qwen2Config(**DECODER, num_key_value_heads=2)
    return decoder(hf.Qwen2ForCausalLM(config))


@model
def mistral() -> Case:
    config = hf.MistralConfig(**DECODER, num_key_value_heads=4, sliding_window=8)
    return decoder(hf.MistralForCausalLM(config))


@model
def gemma() -> Case:
    config = hf.GemmaConfig(**DECODER, num_key_value_heads=4, head_dim=16)
    return decoder(hf.GemmaForCausalLM(config))


@model
def gemma3() -> Case:
    """Norms of queries and keys by head, norms after each layer, windows of one layer."""
    config = hf.Gemma3TextConfig(
        **DECODER, num_key_value_heads=4, head_dim=16, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return decoder(hf.Gemma3ForCausalLM(config))


@model
def phi3() -> Case:
    # Queries, keys and values of one projection, of unequal parts.
    return decoder(hf.Phi3ForCausalLM(hf.Phi3Config(**{**DECODER, "num_attention_heads": 8}, num_key_value_heads=4)))


@model
def mixtral() -> Case:
    config = hf.MixtralConfig(**DECODER, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2)
    net = hf.MixtralForCausalLM(config)
    net.set_experts_implementation("batched_mm")  # the default loops over the experts that were hit: not traceable
    return decoder(net)


def _sequence_to_sequence(net: nn.Module, collectives: int) -> Case:
    kwargs = {
        "input_ids": tokens(VOCABULARY - 3, 3, 7) + 3,
        "attention_mask": padding(3, 7),
        "decoder_input_ids": tokens(VOCABULARY - 3, 3, 5) + 3,
    }
    shapes = {name: {0: BATCH, 1: SOURCE} for name in kwargs}
    shapes["decoder_input_ids"] = {0: BATCH, 1: LENGTH}
    return Case(net, kwargs, shapes, collectives, bounded=True)


@model
def t5() -> Case:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS, use_cache=False
    )
    return _sequence_to_sequence(hf.T5ForConditionalGeneration(config), (2 + 3) * LAYERS + 3)


@model
def bart() -> Case:
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
        max_position_embeddings=POSITIONS, use_cache=False,
    )  # fmt: skip
    return _sequence_to_sequence(hf.BartForConditionalGeneration(config), (2 + 3) * LAYERS + 3)


@model
def mamba() -> Case:
    config = hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=8, use_cache=False
    )
    # Its loop over the positions is unrolled: the length is part of the graph.
    net = hf.MambaForCausalLM(config)
    return Case(net, {"input_ids": tokens(VOCABULARY, 3, 7)}, {"input_ids": {0: BATCH}})


@model
def mamba2() -> Case:
    config = hf.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=16, num_heads=8, head_dim=16,
        n_groups=2, chunk_size=8, use_cache=False,
    )  # fmt: skip
    return Case(hf.Mamba2ForCausalLM(config), {"input_ids": tokens(VOCABULARY, 3, 7)}, {"input_ids": {0: BATCH}})
