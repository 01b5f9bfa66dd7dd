import numpy as np
import pytest
import torch
import transformers

import interp
from interp import heads

from .dense import folded
from .models import make


def dense_copying(model: interp.Model, layer: int, head: int) -> float:
    """From the eigenvalues of the whole [d_vocab, d_vocab] circuit."""
    W_V, W_O = folded(model, layer, head)
    final = model.tower.ln_final.weight.detach().double()
    W_U = (1 + final if model.anatomy.family == "gemma2" else final)[:, None] * model.W_U.double()
    if model.anatomy.family == "gpt2":
        W_U = W_U - W_U.mean(0)
    eigenvalues = np.linalg.eigvals((model.W_E.double() @ W_V @ W_O @ W_U).numpy())
    return float(eigenvalues.real.sum() / np.abs(eigenvalues).sum())


def check_eigenvalues(model: interp.Model) -> None:
    found = heads.copying_eigenvalues(model)
    assert found.shape == (model.n_layers, model.n_heads)
    for layer, head in ((0, 0), (1, 1), (1, 2), (1, 3)):
        assert float(found[layer, head]) == pytest.approx(dense_copying(model, layer, head), abs=1e-3)


def test_eigenvalues_equal_those_of_the_dense_circuit(tiny) -> None:
    check_eigenvalues(tiny)


def test_eigenvalues_with_a_norm_after_attention(tiny_tokenizer) -> None:
    check_eigenvalues(make("gemma2", tiny_tokenizer))


def copying_model(sign: float) -> interp.Model:
    """One head of layer 1 hands tokens on as they are (or their opposite), the others nothing; tied embedding."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        hf.model.embed_tokens.weight.copy_(torch.nn.init.orthogonal_(torch.empty(40, 64)))
        for block in hf.model.layers:
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight.zero_()
        hf.model.layers[1].self_attn.v_proj.weight.copy_(torch.eye(64))
        hf.model.layers[1].self_attn.o_proj.weight[:, 64:] = sign * torch.eye(64)
    return interp.load(hf)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_head_built_to_copy_copies(sign: int) -> None:
    model = copying_model(sign)
    found = heads.copying_top_k(model, torch.arange(3, 13)[None], k=1)
    assert found.attrs["n_tokens"] == 10
    expected = np.zeros((2, 2))
    expected[1, 1] = 1
    np.testing.assert_array_equal(found["copying" if sign > 0 else "negative"], expected)
    np.testing.assert_array_equal(found["negative" if sign > 0 else "copying"], np.zeros((2, 2)))
    assert float(heads.copying_eigenvalues(model)[1, 1]) == pytest.approx(sign)


def test_copying_of_a_tasks_names_equals_a_loop(tiny, task) -> None:
    k = 100
    found = heads.copying_top_k(tiny, task, k=k)
    names = set(task.answers.flatten().tolist()) | set(task.wrong.flatten().tolist())
    _, cache = tiny.run_with_cache(task.clean, "resid_post")
    copied = []
    for name in names:
        row, position = (task.clean == name).nonzero()[0].tolist()
        stream = cache["resid_post", 0][row, position]
        counts = torch.zeros(tiny.n_layers, tiny.n_heads)
        for layer in range(tiny.n_layers):
            for head in range(tiny.n_heads):
                group = head * tiny.n_kv_heads // tiny.n_heads
                with torch.no_grad():
                    normed = tiny.tower.blocks[layer].ln1(stream)
                written = (normed @ tiny.W_V[layer, group] + tiny.b_V[layer, group]) @ tiny.W_O[layer, head]
                logits = tiny.unembed(tiny.final_norm(written))
                counts[layer, head] = name in logits.topk(k).indices.tolist()
        copied.append(counts)
    np.testing.assert_allclose(found["copying"], torch.stack(copied).mean(0), atol=1e-6)
    assert 0 < float(found["copying"].mean()) < 1
    assert found.attrs["n_tokens"] == len(names)


def test_answers_that_are_not_in_the_prompt_cannot_be_copied(tiny) -> None:
    pair = {"clean": "Mary and John went", "corrupted": "Tom and John went", "answer": " store", "wrong": " school"}
    found = heads.copying_top_k(tiny, interp.tasks.from_pairs(tiny, [pair]))
    assert np.isnan(found["copying"]).all()
    assert found.attrs["n_tokens"] == 0
