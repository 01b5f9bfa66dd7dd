"""Images in prompts, against transformers' own processors and forward passes."""

import numpy as np
import pytest
import torch

import interp
from interp import Model
from interp.model.images import FIRST_ID
from tests.model.families import FAMILIES
from tests.vision.seeing import SEEING, picture, processor, saved, seeing_model, tokenizer

TEXT = "<image> what digit is this :"


@pytest.fixture(params=SEEING)
def seeing(request):
    return request.param, seeing_model(request.param)


def _pair(**fields):
    return {"clean": TEXT, "corrupted": TEXT, "images": [picture(0)], "answer": "cat", "wrong": "dog"} | fields


def by_transformers(name, model, text, pictures):
    """Logits of the family's own way from text and pictures."""
    if name == "qwen2_vl":  # its whole processor needs torchvision
        pixels = processor(name)(images=pictures, return_tensors="pt")
        ids = tokenizer()(text.replace("<image>", "<image> " * 4))["input_ids"]
        tokens = torch.tensor([ids])
        inputs = dict(pixels) | {"input_ids": tokens, "mm_token_type_ids": (tokens == 60).int()}
    else:
        made = processor(name)(text=[text], images=pictures)
        inputs = {key: torch.tensor(np.array(made[key])) for key in made if key not in ("labels", "attention_mask")}
    with torch.no_grad():
        return model.hf(**inputs, use_cache=False).logits


def test_logits_are_those_of_the_familys_own_processor(seeing):
    name, model = seeing
    tokens = model.to_tokens(TEXT, images=[picture(0)])
    torch.testing.assert_close(model(tokens), by_transformers(name, model, TEXT, [picture(0)]), atol=0, rtol=0)


def test_pieces_are_labelled_by_row_and_column(seeing):
    _, model = seeing
    labels = model.to_str_tokens(model.to_tokens(TEXT, images=[picture(0)]))
    assert labels[:4] == ["[0,0]", "[0,1]", "[1,0]", "[1,1]"]
    assert labels[-2:] == ["this", ":"]


def test_a_batch_of_pictures_is_each_alone(seeing):
    _, model = seeing
    rows = [model.to_tokens(TEXT, images=[picture(seed)]) for seed in range(3)]
    together = model(torch.cat(rows))
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(model(row)[0], logits, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0, -1], together[1, -1], atol=1e-3)


def test_two_pictures_in_one_prompt():
    model = seeing_model("llava")
    text = "<image> is this a cat <image> is this"
    tokens = model.to_tokens(text, images=[picture(0), picture(1)])
    torch.testing.assert_close(
        model(tokens), by_transformers("llava", model, text, [picture(0), picture(1)]), atol=0, rtol=0
    )
    swapped = model.to_tokens(text, images=[picture(1), picture(0)])
    assert not torch.allclose(model(tokens), model(swapped), atol=1e-3)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_prompts_of_different_length_are_each_alone(name):
    model = seeing_model(name)
    long, short = (model.to_tokens(text, images=[picture(0)])[0].tolist() for text in (TEXT, "<image> what digit"))
    padded = model([long, short])
    torch.testing.assert_close(padded[0], model([long])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[1, -len(short) :], model([short])[0], atol=1e-5, rtol=0)


def test_generation_goes_on_from_the_picture(seeing):
    _, model = seeing
    tokens = model.to_tokens(TEXT, images=[picture(0)])
    generated = model.generate(tokens, max_new_tokens=3)
    assert torch.equal(generated[:, : tokens.shape[1]], tokens)
    if seeing[0] != "paligemma":  # there the prompt is attended both ways, and later tokens are not
        step_by_step = tokens
        for _ in range(3):
            step_by_step = torch.cat([step_by_step, model(step_by_step)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(generated, step_by_step)


def test_an_image_is_known_by_its_content():
    one, other = seeing_model("llava"), seeing_model("llava")
    first = one.to_tokens(TEXT, images=[picture(0)])
    assert torch.equal(first, other.to_tokens(TEXT, images=[picture(0)]))
    one.to_tokens(TEXT, images=[picture(0)])
    assert len(one.images) == 1
    assert not torch.equal(first, one.to_tokens(TEXT, images=[picture(1)]))


@pytest.mark.parametrize("site", ["resid_pre", "z", "vision.z", "vision.resid_pre"])
def test_patching_between_pictures_equals_whole_runs(seeing, site):
    name, model = seeing
    pairs = [_pair(corrupted_images=[picture(1)]), _pair(corrupted=TEXT.replace("digit", "red"), images=[picture(2)])]
    task = interp.tasks.from_pairs(model, pairs)
    by = ("layer", "position") if site.endswith("resid_pre") else ("layer", "head")
    options = {"site": site, "by": by, "batch_size": 1 if name == "qwen2_vl" else None, "progress": False}
    fast = interp.patching.activation_patching(model, task, **options)
    slow = interp.patching.activation_patching(model, task, **options, reference=True)
    assert float(abs(fast - slow).max()) < 1e-5
    assert float(abs(slow).max()) > 1e-2
    assert ("token" in fast.coords) == (site == "resid_pre")


def test_gradients_reach_the_vision_tower():
    model = Model(FAMILIES["llava"].make_model("eager", torch.float64), tokenizer())
    image = model.images.add({"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64)})
    tokens = torch.tensor([[*[image.id] * image.n_tokens, 10, 11]])
    site = "vision.blocks.1.attn.hook_z"
    _, cache, gradients = model.run_with_gradients(tokens, lambda logits: logits[:, -1, 5], site)
    direction = torch.randn_like(cache[site])
    step = 1e-3
    up, down = (
        model.run_with_hooks(tokens, [(site, lambda z, hook, sign=sign: z + sign * step * direction)])[0, -1, 5]
        for sign in (1, -1)
    )
    torch.testing.assert_close((gradients[site] * direction).sum(), (up - down) / (2 * step), rtol=1e-3, atol=1e-6)


def test_a_checkpoint_brings_its_processor(tmp_path):
    for name in ("llava", "qwen2_vl"):
        model = interp.load(saved(name, tmp_path / name))
        live = seeing_model(name)
        tokens = model.to_tokens(TEXT, images=[picture(0)])
        assert torch.equal(tokens, live.to_tokens(TEXT, images=[picture(0)]))
        torch.testing.assert_close(model(tokens), live(tokens), atol=2e-5, rtol=0)


def test_a_task_with_pictures_is_read_back(tmp_path):
    model = seeing_model("llava")
    task = interp.tasks.from_pairs(model, [_pair(corrupted_images=[picture(1)])])
    task.to_jsonl(tmp_path / "task.jsonl")
    assert torch.equal(interp.tasks.read(model, tmp_path / "task.jsonl").clean, task.clean)
    with pytest.raises(ValueError, match="nor of an image that this model has been shown"):
        interp.tasks.read(seeing_model("llava"), tmp_path / "task.jsonl")


def test_what_cannot_be_shown_is_said():
    model = seeing_model("llava")
    with pytest.raises(ValueError, match=r"the text has 0 places for an image \('<image>'\) and 1 pictures"):
        model.to_tokens("what is this", images=[picture(0)])
    with pytest.raises(ValueError, match="nor of an image that this model has been shown"):
        model(torch.tensor([[FIRST_ID + 1, 10]]))
    tokens = model.to_tokens(TEXT, images=[picture(0)])
    with pytest.raises(ValueError, match="at position 0 has 4 pieces; not all of them are in the prompt"):
        model(tokens[:, 1:])
    with pytest.raises(ValueError, match="no processor"):
        Model(model.hf, tokenizer()).to_tokens(TEXT, images=[picture(0)])
    with pytest.raises(ValueError, match="takes no images"):
        Model(FAMILIES["llama"].make_model(), tokenizer(), processor=processor("llava")).to_tokens(
            TEXT, images=[picture(0)]
        )
    qwen = seeing_model("qwen2_vl")
    both = torch.cat([qwen.to_tokens(TEXT, images=[picture(seed)]) for seed in (0, 1)])
    with pytest.raises(NotImplementedError, match="one image at a time"):
        qwen.run_with_cache(both, "vision.z")
