import numpy as np
import pytest

from interp import heads

from .dense import folded


def dense(model, kind: str, earlier: tuple[int, int], later: tuple[int, int]) -> float:
    """By [d_model, d_model] matrices, norm gains folded by hand."""
    W_V, W_O = folded(model, *earlier)
    writer = (W_V @ W_O).numpy()
    layer, head = later
    if kind == "V":
        W_V, W_O = folded(model, layer, head)
        reader = (W_V @ W_O).numpy()
    else:
        gain = model.tower.blocks[layer].ln1.weight.detach().double()[:, None]
        W_Q = gain * model.W_Q[layer, head].double()
        W_K = gain * model.W_K[layer, head * model.n_kv_heads // model.n_heads].double()
        if model.anatomy.family == "gpt2":
            W_Q, W_K = W_Q - W_Q.mean(0), W_K - W_K.mean(0)
        reader = (W_Q @ W_K.T if kind == "Q" else W_K @ W_Q.T).numpy()
    return np.linalg.norm(writer @ reader) / (np.linalg.norm(writer) * np.linalg.norm(reader))


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_equals_dense_products(tiny, kind) -> None:
    found = heads.composition(tiny, kind)
    assert found.dims == ("layer_from", "head_from", "layer_to", "head_to")
    n_layers, n_heads = tiny.n_layers, tiny.n_heads
    for earlier in range(n_layers):
        for later in range(n_layers):
            for one in range(n_heads):
                for other in range(n_heads):
                    score = float(found[earlier, one, later, other])
                    if earlier >= later:
                        assert np.isnan(score)
                    else:
                        expected = dense(tiny, kind, (earlier, one), (later, other))
                        assert score == pytest.approx(expected, rel=1e-3)
