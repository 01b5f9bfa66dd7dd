"""Tiny random models of every family that `interp` supports, with what is known of each from its own source.

Windows are shorter than the prompts, head sizes differ from d_model / heads where the family allows it, keys and values
are grouped where it groups them, and biases are on where it has them.
"""

from __future__ import annotations

from dataclasses import replace

import transformers as hf

from tests.model.encoders import ENCODERS, clip
from tests.model.family import (
    D_HEAD,
    D_MLP,
    D_MODEL,
    IMAGE_TOKEN,
    LOCAL_GLOBAL,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    PATCH,
    SIZES,
    SPECIAL,
    VOCABULARY,
    WINDOW,
    Family,
    finish_bloom,
    finish_olmo2,
    finish_opt,
    finish_opt_post_norm,
    pre_norm,
    text,
    text_after_prefix,
    text_with_image,
    text_with_patches,
)

_GROUPED = SIZES | {"num_key_value_heads": N_KV_HEADS}
_WIDE = _GROUPED | {"head_dim": D_HEAD}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
_QWEN3_NORMS = ("q_norm", "k_norm")

llama = Family("llama", hf.LlamaForCausalLM, _WIDE | {"attention_bias": True, "mlp_bias": True}, text)
gpt2 = Family(
    "gpt2",
    hf.GPT2LMHeadModel,
    dict(
        vocab_size=VOCABULARY,
        n_embd=D_MODEL,
        n_head=N_HEADS,
        n_layer=N_LAYERS,
        n_inner=D_MLP,
        n_positions=32,
        **SPECIAL,
    ),
    text,
    blocks="transformer.h",
    finish=pre_norm("ln_2"),
    attn="attn",
    o="attn.c_proj",
)
gpt_neo = replace(
    gpt2,
    name="gpt_neo",
    architecture=hf.GPTNeoForCausalLM,
    config=dict(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_layers=N_LAYERS,
        num_heads=N_HEADS,
        intermediate_size=D_MLP,
        max_position_embeddings=32,
        window_size=WINDOW,
        attention_types=[[["local", "global", "local"], 1]],
        **SPECIAL,
    ),
    attn="attn.attention",
    o="attn.attention.out_proj",
    interface=False,
)
gptj = replace(
    gpt2,
    name="gptj",
    architecture=hf.GPTJForCausalLM,
    config=gpt2.config | {"rotary_dim": 4},
    finish=None,
    o="attn.out_proj",
    interface=False,
)
gpt_neox = Family(
    "gpt_neox",
    hf.GPTNeoXForCausalLM,
    SIZES | {"attention_bias": True, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    text,
    blocks="gpt_neox.layers",
    finish=None,
    attn="attention",
    o="attention.dense",
)
opt = Family(
    "opt",
    hf.OPTForCausalLM,
    {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL},
    text,
    blocks="model.decoder.layers",
    finish=finish_opt,
    has_kinks=True,
    o="self_attn.out_proj",
)
bloom = Family(
    "bloom",
    hf.BloomForCausalLM,
    {"vocab_size": VOCABULARY, "hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS},
    text,
    blocks="transformer.h",
    finish=finish_bloom,
    attn="self_attention",
    o="self_attention.dense",
    interface=False,
)
falcon = replace(
    bloom,
    name="falcon",
    architecture=hf.FalconForCausalLM,
    config=SIZES | {"ffn_hidden_size": D_MLP, "bias": True},
    finish=None,
)
qwen2 = replace(
    llama,
    name="qwen2",
    architecture=hf.Qwen2ForCausalLM,
    config=_GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LOCAL_GLOBAL},
)
qwen2_moe = replace(
    llama,
    name="qwen2_moe",
    architecture=hf.Qwen2MoeForCausalLM,
    config=_GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 20},
    experts=True,
)
qwen3 = replace(
    llama,
    name="qwen3",
    architecture=hf.Qwen3ForCausalLM,
    config=_WIDE | {"attention_bias": True},
    qk_norm=_QWEN3_NORMS,
)
qwen3_moe = replace(qwen3, name="qwen3_moe", architecture=hf.Qwen3MoeForCausalLM, config=_WIDE | _EXPERTS, experts=True)
gemma2 = replace(
    llama,
    name="gemma2",
    architecture=hf.Gemma2ForCausalLM,
    config=_WIDE
    | {
        "sliding_window": WINDOW,
        "layer_types": LOCAL_GLOBAL,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
        "attention_bias": True,
    },
    finish=pre_norm("pre_feedforward_layernorm", post="post_feedforward_layernorm"),
    attn_post="post_attention_layernorm",
    mlp_post="post_feedforward_layernorm",
)
phi = replace(
    llama,
    name="phi",
    architecture=hf.PhiForCausalLM,
    config=_GROUPED | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    finish=None,
    o="self_attn.dense",
)
stablelm = replace(
    llama, name="stablelm", architecture=hf.StableLmForCausalLM, config=_GROUPED | {"use_qkv_bias": True}
)
cohere = replace(
    llama,
    name="cohere",
    architecture=hf.CohereForCausalLM,
    config=_GROUPED | {"logit_scale": 0.3, "attention_bias": True},
    finish=None,
)
_TEXT_PART = {"blocks": "model.language_model.layers"}

_ALL = [
    gpt2,
    replace(gpt2, name="gpt2-untied", config=gpt2.config | {"tie_word_embeddings": False}),
    replace(
        gpt2,
        name="gpt2-inverse_layer_scale",
        config=gpt2.config | {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    ),
    gpt_neo,
    gptj,
    gpt_neox,
    replace(
        gpt_neox,
        name="gpt_neox-sequential",
        config=gpt_neox.config | {"use_parallel_residual": False},
        finish=pre_norm("post_attention_layernorm"),
    ),
    opt,
    replace(
        opt,
        name="opt-post_norm",
        config=opt.config | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        finish=finish_opt_post_norm,
        attn_input="resid_pre",
        post_norm=True,
    ),
    bloom,
    falcon,
    replace(
        falcon,
        name="falcon-grouped",
        config=falcon.config | {"new_decoder_architecture": True, "num_kv_heads": N_KV_HEADS},
    ),
    replace(
        falcon,
        name="falcon-grouped_one_norm",
        config=falcon.config
        | {"new_decoder_architecture": True, "num_kv_heads": N_KV_HEADS, "num_ln_in_parallel_attn": 1},
    ),
    replace(
        falcon,
        name="falcon-alibi",
        config=falcon.config | {"multi_query": False, "parallel_attn": False, "alibi": True},
        finish=pre_norm("post_attention_layernorm"),
    ),
    llama,
    replace(llama, name="llama-multi_query", config=_GROUPED | {"num_key_value_heads": 1}),
    replace(
        llama,
        name="mistral",
        architecture=hf.MistralForCausalLM,
        config=_WIDE | {"sliding_window": WINDOW},
    ),
    replace(
        llama,
        name="mixtral",
        architecture=hf.MixtralForCausalLM,
        config=_WIDE | {"num_local_experts": 4, "sliding_window": WINDOW},
        experts=True,
    ),
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    replace(qwen3_moe, name="qwen3_moe-dense_last", config=qwen3_moe.config | {"mlp_only_layers": [2]}),
    replace(llama, name="gemma", architecture=hf.GemmaForCausalLM, config=_WIDE | {"attention_bias": True}),
    gemma2,
    replace(
        gemma2,
        name="gemma3_text",
        architecture=hf.Gemma3ForCausalLM,
        config={k: v for k, v in gemma2.config.items() if not k.endswith("softcapping")},
        qk_norm=_QWEN3_NORMS,
    ),
    phi,
    replace(
        phi,
        name="phi-qk_norm",
        config=phi.config | {"qk_layernorm": True, "num_key_value_heads": N_HEADS},
        qk_norm=("q_layernorm", "k_layernorm"),
    ),
    replace(
        llama,
        name="phi3",
        architecture=hf.Phi3ForCausalLM,
        config=_GROUPED | {"sliding_window": WINDOW, "original_max_position_embeddings": 32},
    ),
    replace(
        gemma2,
        name="olmo2",
        architecture=hf.Olmo2ForCausalLM,
        config=_GROUPED | {"attention_bias": True},
        finish=finish_olmo2,
        attn_input="resid_pre",
        qk_norm=_QWEN3_NORMS,
        flat_qk_norm=True,
    ),
    stablelm,
    replace(
        stablelm,
        name="stablelm-parallel_qk_norm",
        config=stablelm.config | {"use_parallel_residual": True, "qk_layernorm": True},
        finish=None,
        qk_norm=("q_layernorm", "k_layernorm"),
    ),
    replace(
        llama,
        name="starcoder2",
        architecture=hf.Starcoder2ForCausalLM,
        config=_GROUPED | {"sliding_window": WINDOW},
    ),
    cohere,
    replace(cohere, name="cohere-qk_norm", config=cohere.config | {"use_qk_norm": True}, qk_norm=_QWEN3_NORMS),
    replace(
        llama,
        name="granite",
        architecture=hf.GraniteForCausalLM,
        config=_GROUPED
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.45,
        },
        finish=pre_norm("post_attention_layernorm", multiplier=0.6),
        residual_multiplier=0.6,
    ),
    replace(
        llama,
        name="smollm3",
        architecture=hf.SmolLM3ForCausalLM,
        config=_GROUPED
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_GLOBAL,
        },
    ),
    replace(
        llama,
        name="gpt_oss",
        architecture=hf.GptOssForCausalLM,
        config=_WIDE
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_GLOBAL,
            "rope_parameters": _YARN,
        },
        experts=True,
    ),
    *ENCODERS,
    replace(
        llama,
        name="llava",
        architecture=hf.LlavaForConditionalGeneration,
        config={
            "text_config": llama.config | {"model_type": "llama"},
            "vision_config": clip.config | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE_TOKEN,
            "image_seq_length": 4,
            "vision_feature_layer": -1,
        },
        make_inputs=text_with_image,
        vision=replace(clip, blocks="model.vision_tower.encoder.layers"),
        **_TEXT_PART,
    ),
    replace(
        llama,
        name="paligemma",
        architecture=hf.PaliGemmaForConditionalGeneration,
        config={
            "text_config": _WIDE | {"model_type": "gemma", "attention_bias": True},
            "vision_config": {k: v for k, v in clip.config.items() if k != "projection_dim"}
            | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "image_token_index": IMAGE_TOKEN,
            "projection_dim": D_MODEL,
            "hidden_size": D_MODEL,
        },
        make_inputs=text_after_prefix,
        vision=replace(clip, blocks="model.vision_tower.encoder.layers", pooled_norm=False),
        **_TEXT_PART,
    ),
    replace(
        qwen2,
        name="qwen2_vl",
        architecture=hf.Qwen2VLForConditionalGeneration,
        config={
            "text_config": qwen2.config
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
            "vision_config": {
                "depth": N_LAYERS,
                "embed_dim": D_MODEL,
                "num_heads": N_HEADS,
                "hidden_size": D_MODEL,
                "mlp_ratio": 2,
                "patch_size": PATCH,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 4,
            "vision_start_token_id": 3,
        },
        make_inputs=text_with_patches,
        vision=replace(
            clip, blocks="model.visual.blocks", finish=pre_norm("norm2"), attn="attn", o="attn.proj", causal=False
        ),
        **_TEXT_PART,
    ),
]

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
