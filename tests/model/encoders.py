"""Tiny random encoders: masked language models and vision transformers."""

from __future__ import annotations

from dataclasses import replace

import transformers as hf

from tests.model.family import (
    D_MLP,
    D_MODEL,
    IMAGE_SIZE,
    N_HEADS,
    N_LAYERS,
    PATCH,
    SIZES,
    VOCABULARY,
    Family,
    finish_bert,
    finish_distilbert,
    image,
    padded_text,
    pre_norm,
)

bert = Family(
    "bert",
    hf.BertForMaskedLM,
    SIZES,
    padded_text,
    blocks="bert.encoder.layer",
    finish=finish_bert,
    attn="attention.self",
    o="attention.output.dense",
    attn_input="resid_pre",
    post_norm=True,
    causal=False,
)
vit = Family(
    "vit",
    hf.ViTForImageClassification,
    {
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "intermediate_size": D_MLP,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "num_labels": 5,
    },
    image,
    blocks="vit.layers",
    finish=pre_norm("layernorm_after"),
    attn="attention",
    o="attention.o_proj",
    causal=False,
)
dinov2 = replace(
    vit,
    name="dinov2",
    architecture=hf.Dinov2ForImageClassification,
    config={k: v for k, v in vit.config.items() if k != "intermediate_size"} | {"mlp_ratio": 1},
    blocks="dinov2.encoder.layer",
    finish=pre_norm("norm2", post="layer_scale2"),
    attn_post="layer_scale1",
    mlp_post="layer_scale2",
)
clip = replace(
    vit,
    name="clip",
    architecture=hf.CLIPVisionModel,
    config={k: v for k, v in vit.config.items() if k != "num_labels"} | {"projection_dim": D_MODEL},
    blocks="encoder.layers",
    finish=pre_norm("layer_norm2"),
    attn="self_attn",
    o="self_attn.out_proj",
    pooled_norm=True,
)

ENCODERS = [
    bert,
    replace(bert, name="roberta", architecture=hf.RobertaForMaskedLM, blocks="roberta.encoder.layer"),
    replace(
        bert,
        name="distilbert",
        architecture=hf.DistilBertForMaskedLM,
        config={
            "vocab_size": VOCABULARY,
            "dim": D_MODEL,
            "hidden_dim": D_MLP,
            "n_layers": N_LAYERS,
            "n_heads": N_HEADS,
            "max_position_embeddings": 32,
        },
        blocks="distilbert.transformer.layer",
        finish=finish_distilbert,
        attn="attention",
        o="attention.out_lin",
    ),
    vit,
    dinov2,
    replace(dinov2, name="dinov2-gated", config=dinov2.config | {"use_swiglu_ffn": True, "mlp_ratio": 2}),
    replace(
        dinov2,
        name="dinov2_with_registers",
        architecture=hf.Dinov2WithRegistersForImageClassification,
        config=dinov2.config | {"num_register_tokens": 2},
        blocks="dinov2_with_registers.encoder.layer",
    ),
    clip,
]
