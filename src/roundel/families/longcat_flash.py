"""LongCat-Flash: two attentions and two MLPs in a block; the router is mlp.router.classifier; `model.mtp.` stays."""

from __future__ import annotations

from roundel.families.family import Family, SpaceRule
from roundel.families.generic import FUSED_EXPERTS, INNER

__all__ = ["FAMILY"]

# post_attention_layernorm.0 has no space: some of the experts hand their input on as it is.
SPACES = (
    *(
        SpaceRule(
            writers=(rf"input_layernorm\.{half}",),
            readers=rf"self_attn\.{half}\.(q_proj|q_a_proj|kv_a_proj_with_mqa)",
            kind="norm",
        )
        for half in (0, 1)
    ),
    SpaceRule(writers=(r"(?P<scope>self_attn\.\d)\.q_a_layernorm",), readers=r"{scope}\.q_b_proj", kind="norm"),
    SpaceRule(writers=(r"(?P<scope>self_attn\.\d)\.kv_a_layernorm",), readers=r"{scope}\.kv_b_proj", kind="norm"),
    SpaceRule(writers=(r"(?P<scope>self_attn\.\d)\.kv_b_proj",), readers=r"{scope}\.o_proj", kind="latent"),
    SpaceRule(writers=(r"post_attention_layernorm\.1",), readers=r"mlps\.1\.(gate_proj|up_proj)", kind="norm"),
    *INNER,
)

FAMILY = Family(name="LongCat-Flash", fused_experts=FUSED_EXPERTS, spaces=SPACES)
