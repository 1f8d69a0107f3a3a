"""Denoisers and an autoencoder, from `diffusers`."""

from __future__ import annotations

import diffusers as df
import torch

from benchmarks.zoo.registry import BATCH, Case, model

CHANNELS = (32, 64)


@model
def unet2d() -> Case:
    net = df.UNet2DModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=16,
    )  # fmt: skip
    kwargs = {"sample": torch.randn(3, 4, 16, 16), "timestep": torch.tensor([3, 500, 7])}
    return Case(net, kwargs, {"sample": {0: BATCH}, "timestep": {0: BATCH}})


@model
def unet2d_condition() -> Case:
    net = df.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8, attention_head_dim=8, cross_attention_dim=32,
    )  # fmt: skip
    kwargs = {
        "sample": torch.randn(3, 4, 16, 16),
        "timestep": torch.tensor([3, 500, 7]),
        "encoder_hidden_states": torch.randn(3, 7, 32),
    }
    return Case(net, kwargs, {name: {0: BATCH} for name in kwargs})


@model
def dit() -> Case:
    net = df.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    kwargs = {
        "hidden_states": torch.randn(3, 4, 8, 8),
        "timestep": torch.tensor([3, 500, 7]),
        "class_labels": torch.tensor([1, 5, 9]),
    }
    # Per block 2, and 1 or 2 of the block's own modulation by time and class, which the hand plan keeps whole.
    return Case(net, kwargs, {name: {0: BATCH} for name in kwargs})


@model
def autoencoder_kl() -> Case:
    net = df.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=CHANNELS, layers_per_block=1, latent_channels=4,
        norm_num_groups=8, sample_size=32,
    )  # fmt: skip
    return Case(net, {"sample": torch.randn(3, 3, 16, 16)}, {"sample": {0: BATCH}})
