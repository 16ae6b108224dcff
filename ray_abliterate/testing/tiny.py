"""Tiny random models of every family, built on the CPU without a download.

Hidden is 32 and intermediate 48, never equal, so that a swapped axis raises; norm weights and
biases are random, so that nothing hides behind ones and zeros; hybrids have every type of layer.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

TINY_HIDDEN = 32
TINY_INTERMEDIATE = 48
TINY_VOCAB = 97

# settings that a configuration class declares are set; the others are left out
COMMON: dict[str, Any] = {
    "hidden_size": TINY_HIDDEN,
    "intermediate_size": TINY_INTERMEDIATE,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": TINY_VOCAB,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 40,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "state_size": 8,
    "n_groups": 1,
}

_LATENT = {"num_key_value_heads": 4}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "hidden_size": 24, "intermediate_size": 40}
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}


def _vlm(text: str, **vision: Any) -> dict[str, Any]:
    return {"text": text, "vision_config": vision}


# what a family needs in addition to `COMMON`; a variant of it is named "family/variant"
TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1},
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_shared_experts": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": {},
    "cohere2_moe": {},
    "cwm": {},
    "deepseek_v2": {**_LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**_LATENT, "first_k_dense_replace": 1},
    "deepseek_v32": {
        **_LATENT,
        "first_k_dense_replace": 1,
        "index_n_heads": 2,
        "index_head_dim": 8,
    },
    "diffllama": {},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {"ffn_hidden_size": TINY_INTERMEDIATE},
    "falcon/alibi": {"alibi": True, "bias": True, "parallel_attn": False},
    "falcon/new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": TINY_VOCAB,
        "global_head_dim": 8,
    },
    "gemma4_text/moe": {
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 8,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT,
    "gpt2": {"n_inner": TINY_INTERMEDIATE},
    "gpt_bigcode": {"n_inner": TINY_INTERMEDIATE},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {},
    "gpt_neox/sequential": {"use_parallel_residual": False},
    "gpt_neox_japanese": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 4, "n_inner": TINY_INTERMEDIATE},
    "granite": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": _HYBRID, "shared_intermediate_size": 40},
    "granitemoehybrid/dense": {
        "layer_types": _HYBRID,
        "shared_intermediate_size": 40,
        "num_local_experts": 0,
    },
    "granitemoeshared": {"shared_intermediate_size": 40},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hyperclovax": {},
    "hyperclovax/pre-norm": {"use_post_norm": False},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "jetmoe": {"kv_channels": 8},
    "laguna": {},
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "llama": {},
    "llama/biases": {"attention_bias": True, "mlp_bias": True},
    "llama4_text": {
        "intermediate_size_mlp": 40,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1,
    },
    "mamba": {},
    "mamba2": {"num_heads": 8},
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": _LATENT,
    "minimax_m2": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "moe_shared_expert_intermediate_size": 40,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "opt": {"ffn_dim": TINY_INTERMEDIATE, "word_embed_proj_dim": TINY_HIDDEN},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": {},
    "qwen3_5_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "recurrent_gemma": {"lru_width": TINY_HIDDEN, "intermediate_size": 2 * TINY_INTERMEDIATE},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "stablelm/parallel": {"use_parallel_residual": True},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {"ffn_dim": TINY_INTERMEDIATE},
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 4},
    "youtu": _LATENT,
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
    },
    # multimodal models: the language tower's type, and what the vision tower needs
    "aya_vision": _vlm("cohere2", **_VISION, model_type="siglip_vision_model"),
    "gemma4": _vlm("gemma4_text", **{k: v for k, v in _VISION.items() if k != "image_size"}),
    "glm4v": _vlm("glm4v_text", **_QWEN_VISION, image_size=28, out_hidden_size=TINY_HIDDEN),
    "paligemma": _vlm("gemma", **_VISION, model_type="siglip_vision_model"),
    "smolvlm": _vlm("llama", **_VISION),
    "gemma3": _vlm("gemma3_text", **_VISION),
    "internvl": _vlm("qwen2", **_VISION),
    "llama4": _vlm(
        "llama4_text",
        **_VISION,
        vision_output_dim=24,
        projector_input_dim=24,
        projector_output_dim=24,
    ),
    "llava": _vlm("llama", **_VISION, model_type="clip_vision_model"),
    "mistral3": _vlm("mistral", **_VISION, model_type="pixtral"),
    "qwen2_5_vl": _vlm("qwen2_5_vl_text", **_QWEN_VISION, out_hidden_size=TINY_HIDDEN),
    "qwen2_vl": _vlm("qwen2_vl_text", depth=2, num_heads=2, embed_dim=24, hidden_size=TINY_HIDDEN),
    "qwen3_5": _vlm("qwen3_5_text", **_QWEN_VISION, out_hidden_size=TINY_HIDDEN),
    "qwen3_vl": _vlm(
        "qwen3_vl_text", **_QWEN_VISION, out_hidden_size=TINY_HIDDEN, deepstack_visual_indexes=[0]
    ),
    "qwen3_vl_moe": _vlm(
        "qwen3_vl_moe_text",
        **_QWEN_VISION,
        out_hidden_size=TINY_HIDDEN,
        deepstack_visual_indexes=[0],
    ),
}
# text towers that are only built inside a multimodal model
_INNER: dict[str, dict[str, Any]] = {
    "glm4v_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen3_vl_text": _MROPE,
    "qwen3_vl_moe_text": _MROPE,
}


def tiny_config(model_type: str, layers: int = 4, **overrides: Any) -> Any:
    """Return the configuration of a tiny model of the family; `overrides` come last."""
    from transformers import CONFIG_MAPPING

    settings = {**_settings(model_type, layers), **overrides}
    return CONFIG_MAPPING[model_type.partition("/")[0]](**settings)


def tiny_model(model_type: str, seed: int = 0, layers: int = 4, **overrides: Any) -> Any:
    """Return a tiny random model of the family: float32, evaluation mode, eager attention."""
    config = tiny_config(model_type, layers, **overrides)
    return randomised(_model_class(model_type).from_config(config).float().eval(), seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw the parameters of `model` again, in place: norms too, and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            if "Norm" in type(owner).__name__ and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias") and not name.endswith("dt_bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            elif parameter.ndim >= 2 and not name.endswith("A_log"):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def _settings(name: str, layers: int) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    own = TINY_FAMILIES.get(name, _INNER.get(name))
    if own is None:
        raise KeyError(f"no tiny configuration is declared for {name!r}")
    model_type = name.partition("/")[0]
    if "text" in own:
        text = own["text"]
        return {
            "text_config": {**_settings(text, layers), "model_type": text.partition("/")[0]},
            "vision_config": own["vision_config"],
            "attn_implementation": "eager",
        }
    config_class = CONFIG_MAPPING[model_type]
    aliases: Mapping[str, str] = config_class.attribute_map
    declared = {field.name for field in fields(config_class)} | set(aliases)
    common = {**COMMON, "num_hidden_layers": layers}
    chosen = {k: v for k, v in common.items() if k in declared}
    for alias, meant in aliases.items():
        if meant in chosen:
            chosen.pop(alias, None)
    return {**chosen, **own, "attn_implementation": "eager"}


def _model_class(model_type: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return (
        AutoModelForImageTextToText if "text" in TINY_FAMILIES[model_type] else AutoModelForCausalLM
    )
