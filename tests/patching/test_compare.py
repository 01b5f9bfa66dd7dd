"""Estimates beside exact effects: the same numbers as each method by itself."""

import numpy as np
import torch

import interp
from interp.patching import activation_patching, agreement, attribution_patching
from interp.patching.compare import agreement_by_method, compare
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens


def test_compare_holds_each_method_and_the_exact_effects():
    model = interp.Model(FAMILIES["llama"].make_model("sdpa", torch.float64))
    tokens = torch.randint(3, 55, (8, 7), generator=torch.Generator().manual_seed(1))
    task = task_of_tokens(tokens[:4], tokens[4:])
    options = {"by": ("layer", "position"), "direction": "noise"}
    compared = compare(model, task, methods=["atp", "normgrad"], sites=["attn_out", "mlp_out"], **options)
    assert list(compared) == ["attn_out", "mlp_out"]
    arrays = compared["mlp_out"]
    assert arrays.dims == ("estimate", "prompt", "layer", "position")
    assert list(arrays["estimate"].values) == ["exact", "atp", "normgrad"]
    exact = activation_patching(model, task, site="mlp_out", per_prompt=True, **options)
    scores = attribution_patching(model, task, site="mlp_out", per_prompt=True, **options)
    np.testing.assert_allclose(arrays.sel(estimate="exact").values, exact.values, atol=1e-9)
    np.testing.assert_allclose(arrays.sel(estimate="atp").values, scores.values, atol=1e-9)
    table = agreement_by_method(compared, top_k=(3,), n_resamples=20)
    alone = agreement(scores, exact, top_k=(3,), n_resamples=20)
    row = table.loc["atp", "mlp_out", "without layer 0"]
    np.testing.assert_allclose(row["pearson"], alone.loc["without layer 0", "pearson"], atol=1e-9)
    # An estimate without signs is held against magnitudes.
    unsigned = arrays.sel(estimate="normgrad", drop=True).assign_attrs(unsigned=0)
    against_magnitudes, against_effects = (
        agreement(unsigned, other, top_k=(3,), n_resamples=0).loc["all", "pearson"] for other in (abs(exact), exact)
    )
    found = table.loc["normgrad", "mlp_out", "all"]["pearson"]
    np.testing.assert_allclose(found, against_magnitudes, atol=1e-9)
    assert abs(found - against_effects) > 1e-3
