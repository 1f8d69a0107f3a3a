"""Models of pictures and of sound, from `transformers`."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.export import Dim

from benchmarks.zoo.registry import BATCH, LENGTH, Case, model, padding, tokens

LAYERS = 2
SIDE = 16

# Wider than the others, and with small patches: the first convolution has its real, small part of the parameters.
PATCHES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": SIDE,
    "patch_size": 4,
    "num_labels": 8,
}


def images(net: nn.Module, collectives: int | None = None, side: int = SIDE, **changed: Any) -> Case:
    """pixel_values [batch, 3, side, side]."""
    return Case(
        net, {"pixel_values": torch.randn(3, 3, side, side)}, {"pixel_values": {0: BATCH}}, collectives, **changed
    )


@model
def vit() -> Case:
    return images(hf.ViTForImageClassification(hf.ViTConfig(**PATCHES)), 2 * LAYERS + 1, bounded=True)


@model
def deit() -> Case:
    net = hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**PATCHES))
    return images(net, 2 * LAYERS + 1, bounded=True)


@model
def swin() -> Case:
    config = hf.SwinConfig(
        image_size=SIDE, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[4, 8], window_size=4, num_labels=8
    )
    # What joins the patches between the stages is 6 % of the bytes: on 4 ranks it is cut, too.
    return images(hf.SwinForImageClassification(config), 2 * 4, bounded=True, further={4: 1})


@model
def convnext() -> Case:
    config = hf.ConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1], num_labels=8)
    return images(hf.ConvNextForImageClassification(config), side=32)


@model
def resnet() -> Case:
    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64, 128, 128], depths=[1, 1, 1, 1], layer_type="bottleneck", num_labels=8
    )
    return images(hf.ResNetForImageClassification(config))


@model
def clip() -> Case:
    text = {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "intermediate_size": 256, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    vision = {name: value for name, value in PATCHES.items() if name != "num_labels"}
    net = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    kwargs = {
        "input_ids": tokens(509, 4, 7) + 3,
        "pixel_values": torch.randn(3, 3, SIDE, SIDE),
        "attention_mask": padding(4, 7),
    }
    texts = Dim("texts", min=1, max=6)
    shapes = {"input_ids": {0: texts, 1: LENGTH}, "pixel_values": {0: BATCH}, "attention_mask": {0: texts, 1: LENGTH}}
    return Case(net, kwargs, shapes, 2 * 2 * LAYERS + 1, bounded=True)


@model
def detr() -> Case:
    backbone = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 32, 64, 64], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=64,
        encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=256, decoder_ffn_dim=256, num_queries=8, num_labels=8,
    )  # fmt: skip
    kwargs = {"pixel_values": torch.randn(3, 3, 64, 64)}
    # 2 and 3 a block, and one for each block of the backbone that is cut.
    return Case(hf.DetrForObjectDetection(config), kwargs, {"pixel_values": {0: BATCH}})


@model
def whisper() -> Case:
    config = hf.WhisperConfig(
        vocab_size=512, num_mel_bins=16, d_model=64, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256,
        max_source_positions=16, max_target_positions=32, use_cache=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    kwargs = {"input_features": torch.randn(3, 16, 32), "decoder_input_ids": tokens(512, 3, 5)}
    shapes = {"input_features": {0: BATCH}, "decoder_input_ids": {0: BATCH, 1: LENGTH}}
    net = hf.WhisperForConditionalGeneration(config)
    # Its two convolutions are 5 % of the bytes, 10 % of the FLOPs; whole on 4 ranks, 3 times that above a rank's share.
    return Case(net, kwargs, shapes, (2 + 3) * LAYERS + 2, bounded=True, further={4: 1})


@model
def wav2vec2() -> Case:
    config = hf.Wav2Vec2Config(
        vocab_size=32, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=256,
        conv_dim=[32, 32], conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=16, layerdrop=0.0,
    )  # fmt: skip
    kwargs = {"input_values": torch.randn(3, 800)}
    samples = Dim("samples", min=200, max=1600)
    shapes = {"input_values": {0: BATCH, 1: samples}}
    # The convolution of positions has a norm over all of its channels, so 3.5 % of the bytes stay whole; on 4 ranks
    # that leaves room for neither the projection nor the head.
    return Case(hf.Wav2Vec2ForCTC(config), kwargs, shapes, 2 * LAYERS + 1, bounded=True, further={4: 2})
