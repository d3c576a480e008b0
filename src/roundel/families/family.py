"""What a model family's checkpoint looks like: which matrices are linear layers, which stay, how experts are stored.

A family is data. It is found by `model_type` of config.json: the file of that name in this folder holds `FAMILY`. A
type without a file gets `generic.FAMILY`, which says that it is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Family", "FusedExperts", "Keep", "SpaceRule"]


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Layers that stay in full precision, and why.

    pattern   regular expression, searched in the module name ("model.layers.0.mlp.gate"); it names no block or expert
              by number, for every number is read as 0
    reason    what the plan's table says
    """

    pattern: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class FusedExperts:
    """A 3-D tensor that holds one matrix, or several, for each expert.

    tensor        regular expression for the whole tensor name, with a group `block` ("model.layers.0.mlp")
    projections   the matrices along the out axis, in order: ("gate_proj", "up_proj")
    into          the module name of one matrix, with {block}, {expert} and {projection}
    transposed    stored [experts, in, out] (True) or [experts, out, in] (False)
    interleaved   rows of the projections alternate (gate, up, gate, up ...) instead of standing one after the other
    part          which part of a stored layer this tensor is: "weight"; "blocks" and "scales" for packed MXFP4;
                  "bias" for a fused [experts, out] bias
    """

    tensor: str
    projections: tuple[str, ...]
    into: str = "{block}.experts.{expert}.{projection}"
    transposed: bool = False
    interleaved: bool = False
    part: Literal["weight", "blocks", "scales", "bias"] = "weight"


@dataclass(frozen=True, kw_only=True)
class SpaceRule:
    r"""Which module of a decoder block writes a space's channels, and which matrices read them.

    writers    regular expressions for module names below the block, alternatives: the first that matches any is taken
    readers    regular expression for module names below the block; {scope} stands for the writer's group `scope`
    kind       how the writer's rows and the readers' columns belong together:
               "norm"    row c is channel c; readers have them once, or once for each head
               "inner"   of a gated MLP: the writer's last rows (up_proj; the second half of gate_up_proj)
               "values"  of attention: the writer's last rows (v_proj; the end of qkv_proj), heads repeated for readers
               "latent"  values of latent attention: the end of each head's rows
    beside     a module that must stand beside the writer, with {scope}; without it there is no such space
    offset     what the writer adds to its weight; None: a norm adds the family's `norm_offset`, a layer nothing
    activation what config.json must say of the MLP's activation ("relu"); None: anything
    """

    writers: tuple[str, ...]
    readers: str
    kind: Literal["norm", "inner", "values", "latent"]
    beside: str | None = None
    offset: float | None = None
    activation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    name            as the plan shows it
    kept            rules for layers that stay, before the general ones in `generic.KEPT`
    fused_experts   how 3-D expert tensors are split into matrices
    experts         regular expression for the module name of a routed expert's matrix
    blocks          module paths that hold the list of decoder blocks ("model.layers")
    head            module name of the output head
    embedding       tensor name of the token embedding, from which a tied head is read
    transposed      module names whose 2-D weight is stored [in, out] (GPT-2's Conv1D); such layers stay
    spaces          where channels may be rescaled; None: the general rules, `generic.SPACES`
    norm_offset     what norms add to their weights before they use them: 1.0 for those that scale by 1 + weight
    guess           True for the generic family only
    """

    name: str
    kept: tuple[Keep, ...] = ()
    fused_experts: tuple[FusedExperts, ...] = ()
    experts: str = r"\.experts\.\d+\."
    blocks: tuple[str, ...] = ("model.layers",)
    head: str = "lm_head"
    embedding: str = "model.embed_tokens.weight"
    transposed: str | None = None
    spaces: tuple[SpaceRule, ...] | None = None
    norm_offset: float = 0.0
    guess: bool = False
