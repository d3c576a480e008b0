"""config.json of a model of which only a GGUF file is there: the inverse of `hyperparameters`.

What the file does not say is a constant in llama.cpp's code for the architecture (src/models/*.cpp there), and the
default of transformers' config class where that is the same. Of a multimodal model it is the language model's config.
Where rotary frequencies are divided by a list of numbers that is not Llama 3's, the config says "longrope" with that
list, which computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from roundel.errors import SourceError
from roundel.formats.gguf.changes import extra_tensors
from roundel.formats.gguf.reading import architecture_in
from roundel.io.gguf import GgufHeader

__all__ = ["configuration"]

_NAMES = {  # key -> name in config.json, of whole numbers
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_FLOATS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_NEEDED = ("block_count", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon")
_MODEL_TYPES = {"gemma3": "gemma3_text", "gpt-oss": "gpt_oss", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
_EXPERT_COUNTS = {
    "mixtral": "num_local_experts", "gpt_oss": "num_local_experts", "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
}  # fmt: skip
_DEEPSEEK = {  # key -> name in config.json, where the file may leave it out
    "attention.q_lora_rank": "q_lora_rank", "expert_group_count": "n_group", "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace", "expert_shared_count": "n_shared_experts",
}  # fmt: skip
_SCORING = {1: "softmax", 2: "sigmoid"}  # by `expert_gating_func`: of DeepSeek-V2, of V3
_OF_CODE: dict[str, dict[str, Any]] = {  # what llama.cpp's code does, and transformers' classes not by default
    "qwen3_moe": {"norm_topk_prob": True},
}
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_LARGEST = 1 << 31
_BASE = 10000.0  # of rotary frequencies, where nothing is said
_AVERAGE_HEADS = {"gemma2": 46, "gemma3_text": 62}  # blocks of the sizes whose queries are scaled by hidden / heads
_GEMMA3_PATTERN = 6  # every sixth block attends to everything


def configuration(header: GgufHeader, lists: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """config.json.

    lists   values of the file's `rope_freqs.weight`, `rope_factors_long.weight` and `rope_factors_short.weight`

    Raises SourceError for an architecture that is not read, and where a value is missing or senseless.
    """
    return _Rebuilt(header, lists).config()


class _Rebuilt:
    def __init__(self, header: GgufHeader, lists: Mapping[str, np.ndarray]) -> None:
        self.header, self.lists = header, lists
        self.architecture = architecture_in(header)
        self.model_type = _MODEL_TYPES.get(self.architecture, self.architecture)
        if self.architecture == "llama" and self._has("expert_count") and self._whole("expert_count") > 0:
            self.model_type = "mixtral"
        if self.architecture == "deepseek2":
            biased = any(name.endswith(".exp_probs_b.bias") for name in header.tensors)
            self.model_type = "deepseek_v3" if biased or self._scoring() == "sigmoid" else "deepseek_v2"

    def config(self) -> dict[str, Any]:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        for key in _NEEDED:
            if not self._has(key):
                raise SourceError(f"The GGUF file says nothing of {self.architecture}.{key}. Fetch it again.")
        tensors = self.header.tensors
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise SourceError("The GGUF file holds no token_embd.weight, which every model has. Fetch it again.")
        known: dict[str, Any] = CONFIG_MAPPING[self.model_type]().to_dict()
        found: dict[str, Any] = {
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "output.weight" not in tensors,
            "dtype": self._dtype(),
        }
        found |= {
            name: self._whole(key) for key, name in _NAMES.items() if self._has(key) and name in (*known, "head_dim")
        }
        found |= {name: self._float(key) for key, name in _FLOATS.items() if self._has(key)}
        if "expert_used_count" in self._keys() and self._whole("expert_used_count"):
            found[_EXPERT_COUNTS.get(self.model_type, "num_experts")] = self._whole("expert_count")
        for name, tensor in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_up.bias")):
            if name in known:
                found[name] = f"blk.0.{tensor}" in tensors
        found |= {name: self._token(role) for role, name in _ROLES.items()}
        found |= _OF_CODE.get(self.model_type, {})
        found |= self._deepseek(found["num_attention_heads"]) if self.architecture == "deepseek2" else {}
        found.setdefault("num_key_value_heads", found["num_attention_heads"])
        self._check(found)
        if "head_dim" in known:
            found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
        if not found.get("sliding_window", 1):
            found["sliding_window"] = None
        found |= self._gemma(found) if self.model_type in _AVERAGE_HEADS else {}
        return found | self._rotary(found)

    def _check(self, found: Mapping[str, Any]) -> None:
        """Numbers that the tensors tell as well, and by which nothing may be divided or made large."""
        blocks = {name.split(".")[1] for name in self.header.tensors if name.startswith("blk.")}
        hidden = self.header.tensors["token_embd.weight"].shape[1]
        for what, said, there in (
            ("blocks", found["num_hidden_layers"], len(blocks)),
            ("columns of the embedding", found["hidden_size"], hidden),
        ):
            if said != there:
                raise SourceError(
                    f"The GGUF file says that there are {said} {what}, and holds {there}. Fetch it again."
                )
        heads, groups = found["num_attention_heads"], found["num_key_value_heads"]
        if not 0 < groups <= heads or heads % groups or found.get("head_dim") == 0 or heads > found["hidden_size"]:
            raise SourceError(f"The GGUF file gives the model {heads} heads and {groups} of keys. Fetch it again.")

    def _dtype(self) -> str:
        kinds = [tensor.type for tensor in self.header.tensors.values() if len(tensor.shape) > 1]
        counts = {name: kinds.count(kind) for kind, name in (("BF16", "bfloat16"), ("F16", "float16"))}
        best = max(counts, key=lambda name: counts[name])
        if counts[best]:
            return best
        return "float32" if kinds and all(kind == "F32" for kind in kinds) else "bfloat16"

    def _gemma(self, found: Mapping[str, Any]) -> dict[str, Any]:
        blocks, heads = found["num_hidden_layers"], found["num_attention_heads"]
        size = found.get("head_dim") or found["hidden_size"] // heads
        average = blocks == _AVERAGE_HEADS[self.model_type]
        rebuilt: dict[str, Any] = {"query_pre_attn_scalar": found["hidden_size"] // heads if average else size}
        if self.model_type == "gemma3_text":
            every = _GEMMA3_PATTERN if self._has("attention.sliding_window") else 1
            if self._has("attention.sliding_window_pattern"):
                every = self._whole("attention.sliding_window_pattern")
            kinds = ("sliding_attention", "full_attention")
            rebuilt["layer_types"] = [kinds[every < 1 or (block + 1) % every == 0] for block in range(blocks)]
        return rebuilt

    def _deepseek(self, heads: int) -> dict[str, Any]:
        """What is DeepSeek's own. Its one head of latent keys stands for as many as there are of queries."""
        turned = self._whole("rope.dimension_count")
        split = "_mla" if self._has("attention.key_length_mla") else ""  # older files give these sizes of whole heads
        nope = self._whole(f"attention.key_length{split}") - turned
        groups = {"n_group": 1, "topk_group": 1} if self.model_type == "deepseek_v3" else {}
        scoring = self._scoring()
        rebuilt: dict[str, Any] = {
            "num_key_value_heads": heads,
            "head_dim": turned,
            "kv_lora_rank": self._whole("attention.kv_lora_rank"),
            "q_lora_rank": None,
            "qk_rope_head_dim": turned,
            "qk_nope_head_dim": nope,
            "v_head_dim": self._whole(f"attention.value_length{split}"),
            "routed_scaling_factor": self._float("expert_weights_scale") if self._has("expert_weights_scale") else 1.0,
            "norm_topk_prob": self._has("expert_weights_norm") and self._value("expert_weights_norm") is True,
            **({"scoring_func": scoring} if scoring is not None else {}),
            **groups,
            **{name: self._whole(key) for key, name in _DEEPSEEK.items() if self._has(key)},
        }
        if turned < 1 or nope < 1 or rebuilt["v_head_dim"] < 1 or rebuilt["kv_lora_rank"] < 1:
            raise SourceError(f"The GGUF file gives the model heads of {nope} and {turned} turned. Fetch it again.")
        if self.model_type == "deepseek_v3":
            rebuilt["num_nextn_predict_layers"] = 0
        elif rebuilt.get("n_group", 1) > 1:
            rebuilt["topk_method"] = "group_limited_greedy"
        return rebuilt

    def _scoring(self) -> str | None:
        return _SCORING.get(self._whole("expert_gating_func")) if self._has("expert_gating_func") else None

    def _rotary(self, found: Mapping[str, Any]) -> dict[str, Any]:
        base = self._float("rope.freq_base") if self._has("rope.freq_base") else _BASE
        size = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
        turned = self._whole("rope.dimension_count") if self._has("rope.dimension_count") else size
        rebuilt: dict[str, Any] = {"rope_theta": base}
        if self.model_type == "phi3":
            rebuilt["partial_rotary_factor"] = turned / size
        elif turned != size:
            raise SourceError(f"The GGUF file turns {turned} of a head's {size} columns, which is not read.")
        if self.model_type == "gemma3_text":
            swa = self._float("rope.freq_base_swa") if self._has("rope.freq_base_swa") else _BASE
            rebuilt["rope_local_base_freq"] = swa
        scaling = self._scaling(found, rebuilt, turned)
        return rebuilt | ({"rope_scaling": scaling} if scaling else {})

    def _scaling(self, found: Mapping[str, Any], rebuilt: dict[str, Any], turned: int) -> dict[str, Any] | None:
        kind = self._text("rope.scaling.type")
        before = self._before(found)
        if "rope_factors_long.weight" in self.lists:
            rebuilt["original_max_position_embeddings"] = before
            return {
                "type": "longrope",
                **{n: self._list(f"rope_factors_{n[:-7]}.weight", turned) for n in ("long_factor", "short_factor")},
            }
        if "rope_freqs.weight" in self.lists:
            return self._divided({**found, **rebuilt}, self._list("rope_freqs.weight", turned))
        if kind in ("", "none"):
            return None
        if kind not in ("linear", "yarn"):
            raise SourceError(f"The GGUF file scales rotary frequencies by {kind!r}, which is not read.")
        scaling: dict[str, Any] = {"rope_type": kind, "factor": self._float("rope.scaling.factor")}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = before
            further = {name: f"rope.scaling.{key}" for key, name in _YARN.items()}
            scaling |= {name: self._float(key) for name, key in further.items() if self._has(key)}
            if self.model_type == "gpt_oss":
                scaling["truncate"] = False
            if self._has("rope.scaling.yarn_log_multiplier"):  # of the tenth that the logarithm is multiplied by
                whole = float(f"{10 * self._float('rope.scaling.yarn_log_multiplier'):.7g}")
                scaling |= {"mscale": whole, "mscale_all_dim": whole}
        return scaling

    def _before(self, found: Mapping[str, Any]) -> int:
        """The context before it was stretched."""
        key = "rope.scaling.original_context_length"
        return self._whole(key) if self._has(key) else int(found.get("max_position_embeddings", 0))

    def _divided(self, found: Mapping[str, Any], factors: list[float]) -> dict[str, Any]:
        """Frequencies divided by a list: Llama 3's scaling where that gives the list, else one that takes any."""
        tried = {"rope_type": "llama3", "factor": max(factors), **_LLAMA3}
        theirs = extra_tensors({**found, "rope_scaling": tried}, "llama")["rope_freqs.weight"].numpy()
        if np.allclose(theirs, factors, rtol=1e-6):
            return tried
        context = found.get("max_position_embeddings", 0)
        return {
            "rope_type": "longrope", "long_factor": factors, "short_factor": factors, "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }  # fmt: skip

    def _list(self, name: str, turned: int) -> list[float]:
        values = self.lists.get(name)
        if values is None or len(values) != turned // 2 or not np.isfinite(values).all() or (values <= 0).any():
            raise SourceError(f"The GGUF file's {name} is no list of {turned // 2} factors. Fetch it again.")
        return [float(value) for value in values]

    def _keys(self) -> set[str]:
        start = self.architecture + "."
        return {key.removeprefix(start) for key in self.header.metadata if key.startswith(start)}

    def _has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.header.metadata

    def _value(self, key: str) -> object:
        return self.header.metadata[f"{self.architecture}.{key}"].value

    def _whole(self, key: str) -> int:
        value = self._value(key) if self._has(key) else None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST:
            raise SourceError(f"The GGUF file gives {value!r} as {self.architecture}.{key}, no count. Fetch it again.")
        return value

    def _float(self, key: str) -> float:
        value = self._value(key) if self._has(key) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SourceError(f"The GGUF file gives {value!r} as {self.architecture}.{key}, no number. Fetch it again.")
        # the shortest number that is this one in float32: 1e-06, not 9.999999974752427e-07
        return float(str(np.float32(value)))

    def _text(self, key: str) -> str:
        value = self._value(key) if self._has(key) else ""
        return value if isinstance(value, str) else repr(value)

    def _token(self, role: str) -> int | None:
        found = self.header.metadata.get(f"tokenizer.ggml.{role}_token_id")
        size = self.header.tensors["token_embd.weight"].shape[0]
        value = found.value if found is not None else None
        return value if type(value) is int and 0 <= value < size else None
