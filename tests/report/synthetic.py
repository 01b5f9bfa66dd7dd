"""A study with numbers made up: every variable that a report draws, for a small model that does not exist."""

import json

import numpy as np
import xarray as xr

LAYERS, HEADS, KV_HEADS, PROMPTS, TOP = 6, 4, 2, 5, 3
TOKENS = ["When", " Mary", " and", " John", " went", " S2", " gave", " to"]
ATTRS = {
    "model": "made-up", "architecture": "llama, 6 layers of 4 heads", "task": "ioi", "metric": "logit_diff", "seed": 0,
    "description": "Name the indirect object.", "corruption": "s2", "model_dtype": "float32", "device": "cpu",
    "interp": "0", "torch": "0", "transformers": "0", "python": "3", "hardware": "2 cores", "date": "2026-11-21",
    "command": "interp report",
    "top_prompt": "".join(TOKENS),
    "seconds": json.dumps({"behaviour": 1.0, "heads": 2.0}),
}  # fmt: skip


def synthetic_study(seed=0, *, tokens=TOKENS, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS):
    """Effects from a normal distribution, patterns causal and normalised, one score NaN."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    def texts(*shape):
        return random.choice(np.array(tokens, dtype=object), shape)

    n_tokens = len(tokens)
    attrs = {"n_prompts": 4, "roles_by": "importance_mean", "ablated": "L4H1"}
    variables = {name: (("prompt",), [text] * PROMPTS) for name, text in (
        ("clean_text", "".join(tokens)), ("corrupted_text", "".join(tokens[::-1])), ("answer", tokens[1]),
        ("wrong", tokens[3]), ("predicted", tokens[1]),
    )}  # fmt: skip
    variables |= {name: (("prompt",), normal(PROMPTS) + 3) for name in ("clean_metric", "answer_probability")}
    variables |= {
        "corrupted_metric": (("prompt",), normal(PROMPTS) - 3),
        "correct": (("prompt",), np.array([1, 1, 0, 1, 1])),
    }
    lens = np.cumsum(normal(2 * layers))
    for name, shift in (("lens", 0), ("lens_low", -1), ("lens_high", 1)):
        variables[name] = (("depth",), lens + np.float32(shift), attrs)
    variables["contribution"] = (("layer", "part"), normal(layers, 2), attrs)
    for name in ("importance_resample", "importance_mean", "importance_zero", "direct"):
        effect = normal(layers, heads)
        for end, shift in (("", 0), ("_low", -0.3), ("_high", 0.4)):
            variables[name + end] = (("layer", "head"), effect + np.float32(shift), attrs)
    for name in ("direct_before", "direct_after", "gate_signed", "kl_mean", "patch_pattern", "entropy"):
        variables[name] = (("layer", "head"), normal(layers, heads), attrs)
    for name in ("previous_token", "duplicate_token", "induction"):
        variables[name] = (("layer", "head"), np.abs(normal(layers, heads)) % 1, attrs)
    variables["entropy"][1][0, 0] = np.nan
    variables["role"] = (("layer", "head"), np.full((layers, heads), "", dtype=object), attrs)
    variables["patch_value"] = (("layer", "kv_head"), normal(layers, kv_heads), attrs)
    for name in ("patch_resid_pre", "patch_attn_out", "patch_mlp_out"):
        effect = normal(layers, n_tokens)
        for end, shift in (("", 0), ("_low", -0.3), ("_high", 0.4)):
            variables[name + end] = (("layer", "position"), effect + np.float32(shift), attrs)
    pattern = np.tril(np.abs(normal(TOP, n_tokens, n_tokens)))
    variables["top_pattern"] = (("top", "query", "key"), pattern / pattern.sum(-1, keepdims=True))
    variables["top_layer"] = (("top",), np.arange(TOP))
    variables["top_head"] = (("top",), np.arange(TOP) % heads)
    for name in ("top_writes", "top_erases"):
        variables[name] = (("top", "rank"), texts(TOP, 5))
    coords = {
        "layer": range(layers), "head": range(heads), "kv_head": range(kv_heads), "prompt": range(PROMPTS),
        "part": ["attention", "MLP"], "position": range(n_tokens), "rank": range(5),
        "depth": np.arange(2 * layers) / 2,
        "top": [f"L{one}H{one % heads}" for one in range(TOP)], "query": range(n_tokens), "key": range(n_tokens),
        "token": ("position", list(tokens)), "query_token": ("query", list(tokens)), "key_token": ("key", list(tokens)),
        "label": ("position", list(tokens)),
    }  # fmt: skip
    return xr.Dataset(variables, coords, ATTRS)
