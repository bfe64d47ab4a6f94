"""Diffusion models. They return the noise that they see; the loss is computed outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.zoo.entry import BATCH, RATE, SPREAD, Entry, training


def denoising(result: Any) -> Tensor:
    """Distance of the noise that the model sees to what it is said to be."""
    sample: Tensor = result.sample
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(2))
    return F.mse_loss(sample, noise.to(sample.dtype))


def noisy(size: int, channels: int = 3) -> dict[str, Any]:
    """Pictures under so much noise."""
    torch.manual_seed(1)
    return {
        "sample": torch.randn(BATCH, channels, size, size),
        "timestep": torch.randint(0, 100, (BATCH,)),
    }


def unet(dropout: bool) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        dropout=RATE if dropout else 0.0,
    )
    return training(model), noisy(16)


def conditioned(dropout: bool) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=12,
        dropout=RATE if dropout else 0.0,
    )
    batch = noisy(16, 4)
    return training(model), batch | {"encoder_hidden_states": torch.randn(BATCH, 5, 12)}


def dit(dropout: bool) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=100,
        dropout=RATE if dropout else 0.0,
    )
    if not dropout:  # diffusers drops one class label of ten and has no option for it
        model.transformer_blocks.apply(lambda m: setattr(m, "dropout_prob", 0.0))
    batch = noisy(8, 4)
    batch["hidden_states"] = batch.pop("sample")
    return training(model), batch | {"class_labels": torch.randint(0, 100, (BATCH,))}


def spread(model: nn.Module) -> nn.Module:
    """diffusers' narrow layers start with small weights; see `SPREAD`."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=SPREAD)
    return training(model)


def sd3(_: bool) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    )
    batch = noisy(8, 4)
    batch["hidden_states"] = batch.pop("sample")
    return spread(model), batch | captions()


def flux(_: bool) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )
    torch.manual_seed(1)
    batch = {"hidden_states": torch.randn(BATCH, 16, 4), "timestep": torch.rand(BATCH)}
    positions = {"img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(5, 3)}
    return spread(model), batch | captions() | positions


def captions() -> dict[str, Any]:
    """What two text encoders say of a caption."""
    return {
        "encoder_hidden_states": torch.randn(BATCH, 5, 12),
        "pooled_projections": torch.randn(BATCH, 10),
    }


def autoencoder(_: bool) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
    )
    return training(model), {"sample": noisy(16)["sample"]}


DIFFUSION = {
    "UNet2D": Entry("Diffusion", "UNet2DModel", unet, denoising),
    "UNet2DCondition": Entry("Diffusion", "UNet2DConditionModel", conditioned, denoising),
    "DiT": Entry("Diffusion", "DiTTransformer2DModel", dit, denoising),
    "Stable Diffusion 3": Entry("Diffusion", "SD3Transformer2DModel", sd3, denoising, random=False),
    "FLUX": Entry(
        "Diffusion",
        "FluxTransformer2DModel",
        flux,
        denoising,
        random=False,
        in_dims={"img_ids": None, "txt_ids": None},
    ),
    "VAE": Entry("Diffusion", "AutoencoderKL", autoencoder, denoising, random=False),
}
