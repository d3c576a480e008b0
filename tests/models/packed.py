"""Weights as other tools pack them, by the plainest arithmetic; each function returns the parts of one linear weight.

FP8 after DeepSeek-V3 and compressed-tensors, MXFP4 after the OCP MX specification and GPT-OSS, NVFP4 after
compressed-tensors and ModelOpt. Nothing here is roundel's own code, so that its readers can be wrong about it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8_block(weight: Tensor, size: int) -> dict[str, Tensor]:
    """[out, in] -> e4m3 codes and one float32 scale for each block of size x size; weight = code * scale."""
    rows, columns = weight.shape
    scale = torch.empty(math.ceil(rows / size), math.ceil(columns / size))
    codes = torch.empty_like(weight, dtype=FP8)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scale[i, j] = weight[part].abs().max() / FP8_MAX
            codes[part] = (weight[part] / scale[i, j]).to(FP8)
    return {"weight": codes, "weight_scale_inv": scale}


def fp8_channel(weight: Tensor) -> dict[str, Tensor]:
    """One scale for each row, [out, 1], in bf16."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / FP8_MAX).to(torch.bfloat16)
    return {"weight": _fp8(weight, scale.float()), "weight_scale": scale}


def fp8_tensor(weight: Tensor) -> dict[str, Tensor]:
    """One scale, [1], in bf16."""
    scale = (weight.abs().max() / FP8_MAX).to(torch.bfloat16).reshape(1)
    return {"weight": _fp8(weight, scale.float()), "weight_scale": scale}


def mxfp4(weight: Tensor) -> dict[str, Tensor]:
    """One power of two for each 32 weights of a row, stored as exponent + 127; codes two to a byte, the first low."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(dim=-1))) - 2
    codes = _e2m1(groups / torch.exp2(exponent)[..., None])
    return {"weight_packed": _two_to_a_byte(codes), "weight_scale": (exponent + 127).to(torch.uint8)}


def nvfp4(weight: Tensor, largest: float) -> dict[str, Tensor]:
    """e4m3 scales for each 16 weights over one float32: weight = code * scale / global (compressed-tensors).

    `largest` is the largest magnitude among the layers that a loader fuses (q, k, v; gate, up), which share `global`.
    """
    total = torch.tensor([6.0 * FP8_MAX / largest])
    groups = weight.reshape(weight.shape[0], -1, 16)
    scale = (total * groups.abs().amax(dim=-1) / 6.0).to(FP8)
    codes = _e2m1(groups * total / scale.float()[..., None])
    return {"weight_packed": _two_to_a_byte(codes), "weight_scale": scale, "weight_global_scale": total}


def nvfp4_modelopt(weight: Tensor, largest: float) -> dict[str, Tensor]:
    """The same under ModelOpt's names; its second scale is a factor without axes: weight = code * scale * scale_2."""
    parts = nvfp4(weight, largest)
    return {
        "weight": parts["weight_packed"],
        "weight_scale": parts["weight_scale"],
        "weight_scale_2": (1.0 / parts["weight_global_scale"]).squeeze(0),
    }


def gpt_oss_mxfp4(weight: Tensor) -> dict[str, Tensor]:
    """Fused experts [experts, in, out] -> blocks [experts, out, in / 32, 16] and scales [experts, out, in / 32]."""
    parts = mxfp4(weight.transpose(1, 2).contiguous())
    scales = parts["weight_scale"]
    return {"blocks": parts["weight_packed"].reshape(*scales.shape, 16), "scales": scales}


def _fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _e2m1(scaled: Tensor) -> Tensor:
    """Codes 0..15, sign in bit 3; ties go to the smaller magnitude, which no reader can tell."""
    index = torch.bucketize(scaled.abs(), (E2M1[1:] + E2M1[:-1]) / 2)
    return (index + 8 * torch.signbit(scaled)).to(torch.uint8).flatten(-2)


def _two_to_a_byte(codes: Tensor) -> Tensor:
    return (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous()
