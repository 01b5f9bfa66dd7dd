"""Every method of heads, sinks and vision on tiny random models that see, on prompts with an image."""

import numpy as np
import pytest
import torch

import interp
from interp import heads, sinks, vision
from interp.sinks.interventions import mean_nll
from tests.vision.seeing import SEEING, picture, seeing_model

TEXT = "<image> what digit is this :"
SINK_DIMS = [3, 7]


@pytest.fixture(scope="module", params=SEEING)
def seeing(request):
    model = seeing_model(request.param)
    return model, torch.cat([model.to_tokens(TEXT, images=[picture(seed)]) for seed in (0, 1)])


def task_of(model):
    pair = {"clean": TEXT, "corrupted": TEXT, "answer": "cat", "wrong": "dog"}
    return interp.tasks.from_pairs(
        model, [pair | {"images": [picture(seed)], "corrupted_images": [picture(seed + 9)]} for seed in (0, 1)]
    )


READINGS = {
    "attention_statistics": lambda model, tokens: heads.attention_statistics(model, tokens, progress=False)["entropy"],
    "attention_received": lambda model, tokens: heads.attention_received(model, tokens, progress=False),
    "pattern": lambda model, tokens: heads.pattern(model, tokens[:1], [0, 1], [0], rows=[-1]),
    "layer_similarity": lambda model, tokens: heads.layer_similarity(model, tokens, progress=False),
    "divergence": lambda model, tokens: heads.divergence(model, tokens, vision.without_images(model, tokens)),
    "reinforced_heads": lambda model, tokens: heads.reinforced_heads(
        model, tokens, vision.without_images(model, tokens), layers=[1, 2]
    ),
    "massive_activations": lambda model, tokens: sinks.massive_activations(model, tokens, progress=False)["value"],
    "sink_rate": lambda model, tokens: sinks.sink_rate(model, tokens, progress=False)["rate"],
    "mask": lambda model, tokens: sinks.mask(model, tokens, dimensions=SINK_DIMS, progress=False),
    "sink_checks": lambda model, tokens: sinks.sink_checks(model, tokens, progress=False)["value_norm_ratio"],
    "dormant_heads": lambda model, tokens: sinks.dormant_heads(model, tokens, progress=False)["sink_mass"],
    "intervene": lambda model, tokens: sinks.intervene(model, tokens, SINK_DIMS, 1, progress=False)["nll"],
    "modality_mass": lambda model, tokens: vision.modality_mass(model, tokens, progress=False),
    "calibration_search": lambda model, tokens: sinks.calibration_search(
        model,
        task_of(model),
        metric="logit_diff",
        candidates=torch.ones(3, 4, dtype=torch.bool),
        theta=0.2,
        progress=False,
    )["gain"],
}

METHODS = {
    "activation_patching": lambda model, task: interp.patching.activation_patching(
        model, task, site="resid_pre", progress=False
    ),
    "relevance_patching": lambda model, task: interp.patching.relevance_patching(
        model, task, site="z", by=("layer", "head"), verify=2, progress=False
    ),
    "secant_patching": lambda model, task: interp.patching.secant_patching(
        model, task, site="vision.z", by=("layer", "head"), batch_size=1, progress=False
    ),
    "path_patching": lambda model, task: interp.patching.path_patching(model, task, readers="logits", progress=False),
    "leave_one_out": lambda model, task: heads.leave_one_out(model, task, progress=False)["effect"],
    "direct_logit_attribution": lambda model, task: heads.direct_logit_attribution(model, task)["effect"],
    "discover": lambda model, task: interp.circuits.discover(model, task, "eap", edges=30, progress=False).scores,
    "acdc": lambda model, task: interp.circuits.discover(model, task, "acdc", progress=False).scores,
    "evaluate": lambda model, task: interp.circuits.evaluate(
        model, task, interp.circuits.discover(model, task, "secant", edges=30, progress=False), progress=False
    )["faithfulness"],
}


@pytest.mark.parametrize("name", METHODS)
def test_parts_one_to_three_run_between_pictures(seeing, name):
    model, _ = seeing
    found = np.asarray(METHODS[name](model, task_of(model)), dtype=float)
    assert bool(np.isfinite(found).any())


@pytest.mark.parametrize("name", READINGS)
def test_it_reads_prompts_with_an_image(seeing, name):
    found = READINGS[name](*seeing)
    assert found.size
    assert bool(np.isfinite(found.values.astype(float)).any())


CONTEXTS = {
    "redistributed": lambda model, tokens: sinks.redistributed(
        model, model.images.mask(tokens), SINK_DIMS, tau_rel=0.3, rho=0.0, min_image_mass=0.0, layers=[1]
    ),
    "calibrated": lambda model, tokens: sinks.calibrated(
        model, torch.ones(3, 4, dtype=torch.bool), theta=0.15, prompt_length=tokens.shape[1]
    ),
    "reinforced": lambda model, tokens: heads.reinforced(model, torch.ones(3, 4, dtype=torch.bool), alpha=1.5),
    "streaming": lambda model, tokens: sinks.streaming(
        model, sinks=1, recent=tokens.shape[1] + 1, rope="original" if "qwen" in model.name else "cache"
    ),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_it_holds_while_generating_from_an_image(seeing, name):
    model, tokens = seeing
    before = model(tokens)
    with CONTEXTS[name](model, tokens):
        inside = model(tokens)
        generated = model.generate(tokens, max_new_tokens=3)
    assert torch.equal(generated[:, : tokens.shape[1]], tokens)
    assert generated.shape[1] == tokens.shape[1] + 3
    assert torch.equal(model(tokens), before)
    assert torch.allclose(inside, before, atol=1e-5) == (name == "streaming")


def test_streaming_losses_are_of_words(seeing):
    model, tokens = seeing
    with pytest.raises(ValueError, match="give prompts of text alone"):
        sinks.stream_nll(model, tokens, sinks.sink_windows(8))


def test_losses_leave_out_the_pieces_of_the_image(seeing):
    model, tokens = seeing
    losses = mean_nll(model, tokens)
    logits = model(tokens).double().log_softmax(-1)
    words = [position for position in range(1, tokens.shape[1]) if not bool(model.images.mask(tokens[0, position]))]
    expected = -sum(logits[0, position - 1, tokens[0, position]] for position in words) / len(words)
    assert float(losses[0]) == pytest.approx(float(expected), abs=1e-6)
