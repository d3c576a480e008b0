"""OPT: learned positions (embed_positions), project_in and project_out are linear layers, a tied head."""

from __future__ import annotations

from roundel.families.family import Family, SpaceRule

__all__ = ["FAMILY"]

SPACES = (
    SpaceRule(writers=(r"self_attn_layer_norm",), readers=r"self_attn\.(q_proj|k_proj|v_proj)", kind="norm"),
    SpaceRule(writers=(r"(?P<scope>self_attn)\.v_proj",), readers=r"{scope}\.out_proj", kind="values"),
    SpaceRule(writers=(r"final_layer_norm",), readers=r"fc1", kind="norm"),
    SpaceRule(writers=(r"fc1",), readers=r"fc2", kind="inner", activation="relu"),  # relu(x / s) = relu(x) / s
)

FAMILY = Family(
    name="OPT",
    blocks=("model.decoder.layers", "decoder.layers"),
    embedding="model.decoder.embed_tokens.weight",
    spaces=SPACES,
)
