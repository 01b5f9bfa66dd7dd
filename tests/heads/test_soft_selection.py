from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
import xarray as xr

import interp
from interp import heads
from interp.heads.soft_selection import injection_loss
from tests.patching.tokens_task import task_of_tokens

D_HEAD, N_HEADS = 4, 3
TASK_A, TASK_B, ANSWER_A, ANSWER_B, FIRST_WORD = 0, 1, 5, 9, 10
"""Tokens: two that say which task it is, the answer to each, and from FIRST_WORD on words that say nothing."""


@pytest.fixture(scope="module")
def planted() -> interp.Model:
    """One layer whose heads attend evenly. Head 0 carries the task; head 1 reads and writes nothing; head 2 reads what
    few-shot prompts have and other prompts have not, and pushes the answer to task B."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=12, intermediate_size=4, num_hidden_layers=1, num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS, head_dim=D_HEAD, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        attn, embed = hf.model.layers[0].self_attn, hf.model.embed_tokens.weight
        embed[:, 2] = 1
        embed[TASK_A, 0], embed[TASK_B, 0] = 4, -4
        embed[[TASK_A, TASK_B], 1] = 4
        attn.v_proj.weight[0, 0] = attn.v_proj.weight[2 * D_HEAD, 1] = 1
        attn.o_proj.weight[3, 0], attn.o_proj.weight[3, 2 * D_HEAD] = 0.5, -0.5
        hf.lm_head.weight[ANSWER_A, 3], hf.lm_head.weight[ANSWER_B, 3] = 1, -1
    return interp.Model(hf)


def prompts(n: int, *, task: int | None, seed: int = 0) -> torch.Tensor:
    """Words, after two tokens that name the task in few-shot prompts."""
    words = torch.randint(FIRST_WORD, 16, (n, 5), generator=torch.Generator().manual_seed(seed))
    if task is not None:
        words[:, :2] = task
    return words


@pytest.fixture(scope="module")
def zero_shot() -> interp.tasks.Task:
    clean = prompts(10, task=None)
    return task_of_tokens(clean, clean.roll(1, dims=0) % 16)


def tiny_case(model: interp.Model, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(2)
    t = torch.randn(model.n_layers, model.n_heads, model.d_head, generator=generator).to(dtype)
    alpha = torch.rand(model.n_layers, model.n_heads, generator=generator).to(dtype)
    return t, alpha, torch.randint(10, 90, (2, 6), generator=generator)


def test_the_planted_head_is_taken_its_opponent_left_and_the_idle_one_stays(planted, zero_shot):
    t = heads.mean_head_outputs(planted, prompts(8, task=TASK_A, seed=1))
    alpha = heads.soft_selection(planted, t, zero_shot, steps=60, seed=0)
    assert float(alpha.sel(layer=0, head=0)) > 0.95
    assert float(alpha.sel(layer=0, head=1)) == 0.5
    assert float(alpha.sel(layer=0, head=2)) < 0.05
    before = planted(zero_shot.clean)[:, -1]
    assert (before[:, ANSWER_A] == before[:, ANSWER_B]).all()
    with heads.injected(planted, t, alpha):
        assert (planted(zero_shot.clean)[:, -1].argmax(-1) == ANSWER_A).all()
    assert torch.equal(planted(zero_shot.clean)[:, -1], before)
    assert alpha.attrs["loss_after"] < 0.6 * alpha.attrs["loss_before"]
    assert alpha.attrs["n_held_out"] == 2


def test_selection_reproduces_and_leaves_the_model_as_it_was(planted, zero_shot):
    t = heads.mean_head_outputs(planted, prompts(8, task=TASK_A, seed=1))
    state = torch.get_rng_state()
    one, again = (heads.soft_selection(planted, t, zero_shot, steps=5, batch_size=2, seed=3) for _ in range(2))
    assert np.array_equal(one, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in planted.hf.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in planted.hf.modules())
    assert one.attrs["training_seed"] == 3
    assert one.attrs["model"] == planted.name


def test_the_checkpoint_with_the_least_held_out_loss_is_kept(planted, zero_shot):
    """Validated on the other task, every step makes it worse: the beginning is the best."""
    t = heads.mean_head_outputs(planted, prompts(8, task=TASK_A, seed=1))
    other = interp.tasks.Task(**{**vars(zero_shot), "answers": zero_shot.wrong, "wrong": zero_shot.answers})
    alpha = heads.soft_selection(planted, t, zero_shot, validation=other, steps=20, validate_every=8)
    assert (alpha == 0.5).all()
    assert alpha.attrs["step"] == 0
    losses = alpha.attrs["validation_loss"]
    assert len(losses) == 4  # at steps 0, 8, 16 and 20
    assert losses == sorted(losses)
    assert alpha.attrs["loss_after"] == losses[0]


def test_mean_head_outputs_are_means_of_z_at_the_last_token(tiny, mixed_task):
    t = heads.mean_head_outputs(tiny, mixed_task, batch_size=1)
    expected = [tiny.run_with_cache(torch.tensor([ids]), "z")[1] for ids in mixed_task.clean_ids]
    for layer in range(3):
        mean = torch.stack([cache["z", layer][0, -1] for cache in expected]).mean(0)
        np.testing.assert_allclose(t.sel(layer=layer), mean, atol=1e-6)
    assert t.dims == ("layer", "head", "d_head")
    assert t.attrs["n_prompts"] == 3
    assert t.attrs["task"] == mixed_task.name


def test_nothing_injected_is_the_identity_and_all_injected_is_t(tiny):
    t, _, tokens = tiny_case(tiny)
    before = tiny(tokens)
    with heads.injected(tiny, t, torch.zeros(3, 4)):
        assert torch.equal(tiny(tokens), before)
    with heads.injected(tiny, t, torch.ones(3, 4)):
        after, cache = tiny.run_with_cache(tokens, "z")
    assert torch.equal(after[:, :-1], before[:, :-1])
    for layer in range(3):
        assert torch.equal(cache["z", layer][:, -1], t[layer].expand(2, -1, -1))


def test_a_half_is_half_way_and_one_head_is_that_head_alone(tiny):
    t, _, tokens = tiny_case(tiny)
    _, before = tiny.run_with_cache(tokens, "z")
    alpha = torch.zeros(3, 4)
    alpha[0, 2] = 0.25
    with heads.injected(tiny, t, alpha):
        _, after = tiny.run_with_cache(tokens, "z")
    expected = before["z", 0].clone()
    expected[:, -1, 2] = 0.75 * expected[:, -1, 2] + 0.25 * t[0, 2]
    torch.testing.assert_close(after["z", 0], expected)


def test_texts_of_different_length_are_each_as_alone(tiny):
    t, alpha, _ = tiny_case(tiny)
    texts = ["Mary and John went to the store", "Then the dog"]
    with heads.injected(tiny, t, alpha):
        together = tiny(texts)[:, -1]
        alone = torch.cat([tiny(text)[:, -1] for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_generation_injects_at_the_last_prompt_token_only(tiny):
    """With the cache, each step's scores are those of a full pass with the edit at the prompt's last position."""
    t, alpha, tokens = tiny_case(tiny)
    with heads.injected(tiny, t, alpha):
        found = tiny.hf.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    last = tokens.shape[1] - 1

    def edit(layer):
        def blend(z, hook):
            z[:, last] = (1 - alpha[layer, :, None]) * z[:, last] + alpha[layer, :, None] * t[layer]

        return blend

    hooks = [(f"blocks.{layer}.attn.hook_z", edit(layer)) for layer in range(3)]
    for step, logits in enumerate(found.logits):
        expected = tiny.run_with_hooks(found.sequences[:, : last + 1 + step], hooks)[:, -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found.logits[0], tiny(tokens)[:, -1], atol=1e-2)


def test_the_gradient_is_that_of_finite_differences(tiny_gpt2):
    tiny_gpt2.hf.double()  # a Llama norms in float32 whatever its dtype, too coarse for these steps
    t, theta, tokens = tiny_case(tiny_gpt2, torch.float64)
    task = task_of_tokens(tokens, tokens.roll(1, dims=0))
    theta = (4 * theta - 2).requires_grad_()
    (gradient,) = torch.autograd.grad(injection_loss(tiny_gpt2, t, theta, task), [theta])
    theta = theta.detach()
    step = 1e-5
    for layer, head in ((0, 0), (0, 3), (1, 2), (2, 1)):
        sides = []
        for sign in (1, -1):
            moved = theta.clone()
            moved[layer, head] += sign * step
            sides.append(float(injection_loss(tiny_gpt2, t, moved, task).detach()))
        assert float(gradient[layer, head]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-9)
    assert gradient.abs().min() > 0


def test_the_loss_is_the_cross_entropy_of_the_answer(tiny):
    t, alpha, tokens = tiny_case(tiny)
    task = task_of_tokens(tokens, tokens.roll(1, dims=0))
    with heads.injected(tiny, t, alpha):
        expected = torch.nn.functional.cross_entropy(tiny(tokens)[:, -1], task.answers[:, 0])
    theta = (alpha / (1 - alpha)).log()
    torch.testing.assert_close(injection_loss(tiny, t, theta, task).detach(), expected)


def test_bad_arguments_are_refused(tiny, task):
    t, alpha, _ = tiny_case(tiny)
    with (
        pytest.raises(ValueError, match=r"alpha runs from .* to 2; it lies in 0\.\.1"),
        heads.injected(tiny, t, 2 * torch.ones(3, 4)),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"alpha has the shape \(2, 4\); that of this model is \(3, 4\)"),
        heads.injected(tiny, t, xr.DataArray(alpha[:2].numpy())),
    ):
        pass
    with pytest.raises(ValueError, match=r"t has the shape \(3, 4, 7\)"):
        heads.soft_selection(tiny, t[..., 1:], task)
    with pytest.raises(ValueError, match="steps=0; it is greater than 0"):
        heads.soft_selection(tiny, t, task, steps=0)
    with pytest.raises(ValueError, match="a task of one prompt leaves none to validate on"):
        heads.soft_selection(tiny, t, task[:1])
