"""`colours`: a LLaVA wired by hand that names the colour of a cell, with heads of known kinds and a planted sink.

A picture is 3 x 3 cells of one colour each; a prompt is "<image> Mary cell5", the answer the colour of that cell. In
layer 1

* L1H0, the image head, attends from "cell5" to that cell and writes its colour;
* L1H2, the prior head, attends to the writer's name and writes the colour that this one prefers, half as strong again:
  where picture and prior disagree, the prior wins, unless the image head is scaled by more than 1.5;
* L1H4, the outlier head, attends to the picture, of which it writes nothing; without one it attends to the name, and
  its z is five times as long as that of any other;
* L1H6, the mixed head, spreads over the whole picture and the sinks, and writes a little of the colours.

The BOS and the cell in the middle carry a massive activation in one dimension, and every other head rests on them: what
they hold beside is divided away by the norm. All streams but theirs have one length, so that the norms are the
identity on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from interp.zoo.configurations import llama_config
from interp.zoo.wiring import Block, llama_blocks
from interp.zoo.words import BOS_WORD

COLOURS = ("red", "green", "blue")
NAMES = ("Mary", "John", "Anna")
"""Name i prefers colour i."""
IMAGE_WORD = "<image>"
N_CELLS, SIZE, PATCH = 9, 12, 4
WORDS = (BOS_WORD, IMAGE_WORD, *COLOURS, *NAMES, *(f"cell{cell}" for cell in range(N_CELLS)))

IMAGE_HEAD, PRIOR_HEAD, OUTLIER_HEAD, MIXED_HEAD = (1, 0), (1, 2), (1, 4), (1, 6)
SINK_CELL = 4
PARTS = {
    "colour": 3, "cell": 9, "is image": 1, "name": 3, "is name": 1, "asked": 9, "answer": 3, "filler": 1, "sink": 1,
}  # fmt: skip
D_MODEL, D_HEAD, D_VISION, LENGTH, MASSIVE = 64, 32, 16, 3.0, 200.0
_ENDS = np.cumsum([0, *PARTS.values()]).tolist()
PART = {name: slice(begin, end) for name, begin, end in zip(PARTS, _ENDS[:-1], _ENDS[1:], strict=True)}
SINK_DIMENSION = PART["sink"].start
# The slots of a head that turn least with position; frequencies come in pairs (i, i + 16).
_MATCH, _SINK, _IMAGE, _NAME = [8, 9, 10, 11, 12, 13, 14, 15, 24], 25, 26, 27
_REST, _STRONG = 6.0, 16.0


def picture(colours: Sequence[str]) -> Any:
    """A PIL image of nine cells, row by row.

    Raises:
        ValueError: if there are not nine, or one is none of `COLOURS`.
    """
    from PIL import Image

    if len(colours) != N_CELLS or not set(colours) <= set(COLOURS):
        raise ValueError(f"{list(colours)}: a picture has {N_CELLS} cells, each of {', '.join(COLOURS)}")
    cells = np.zeros((N_CELLS, 3), dtype=np.uint8)
    cells[range(N_CELLS), [COLOURS.index(one) for one in colours]] = 255
    return Image.fromarray(cells.reshape(3, 3, 3).repeat(PATCH, 0).repeat(PATCH, 1))


def prompt(name: str, cell: int, *, seeing: bool = True) -> str:
    """The text that goes with a picture, or the same without its place for one."""
    return f"{IMAGE_WORD + ' ' if seeing else ''}{name} cell{cell}"


@torch.no_grad()
def colours_model() -> Any:
    """The wired model: a CLIP that hands on its patches, and a 2-layer Llama of 8 heads on 4 key/value heads."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    text = llama_config(
        len(WORDS),
        rope_theta=1e8,
        hidden_size=D_MODEL,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=D_HEAD,
        intermediate_size=4,
        max_position_embeddings=64,
    )
    vision = CLIPVisionConfig(
        hidden_size=D_VISION,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=D_VISION,
    )
    hf = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=WORDS.index(IMAGE_WORD),
            image_seq_length=N_CELLS,
            vision_feature_layer=-1,
            projector_hidden_act="relu",
            tie_word_embeddings=False,
        )
    )
    for parameter in hf.parameters():
        parameter.zero_()
    _see(hf.model.vision_tower)
    _project(hf.model.multi_modal_projector)
    _embed(hf.model.language_model)
    blocks = llama_blocks(hf.model.language_model)
    for block in blocks:
        _rest(block)
    _wire(blocks[1])
    for block in blocks:
        block.q.mul_(D_HEAD**0.5)
    hf.lm_head.weight[2 : 2 + len(COLOURS), PART["answer"]] = 8.0 * torch.eye(len(COLOURS))
    return hf


def _see(vision: Any) -> None:
    """A patch becomes its colour (1 and twice -1) and a direction for its cell; the layer adds nothing."""
    embeddings = vision.embeddings
    for colour in range(3):
        embeddings.patch_embedding.weight[colour, colour] = 1 / PATCH**2
    embeddings.position_embedding.weight[1:, 3 : 3 + N_CELLS] = torch.eye(N_CELLS)
    # The mean of such a vector is 0 and its squares add up to 4: these gains make the norm the identity.
    vision.pre_layrnorm.weight.fill_(2 / D_VISION**0.5)


def _project(projector: Any) -> None:
    """Colour and cell as they are (the ReLU drops what is negative), and the mark of an image; a sink in the middle."""
    constant = D_MODEL - 1
    projector.linear_1.weight[:3, :3] = projector.linear_2.weight[PART["colour"], :3] = torch.eye(3)
    projector.linear_1.weight[3:12, 3:12] = projector.linear_2.weight[PART["cell"], 3:12] = torch.eye(N_CELLS)
    projector.linear_1.bias[constant] = 1.0
    projector.linear_2.weight[PART["is image"], constant] = 1.0
    projector.linear_2.weight[PART["filler"], constant] = (LENGTH**2 - 3) ** 0.5
    projector.linear_2.weight[PART["sink"], 3 + SINK_CELL] = MASSIVE


def _embed(stack: Any) -> None:
    """Names with what they prefer, cells that are asked for, a massive BOS; norms that are the identity elsewhere."""
    tokens = stack.embed_tokens.weight
    first_name, first_cell = WORDS.index(NAMES[0]), WORDS.index("cell0")
    tokens[first_name : first_name + len(NAMES), PART["name"]] = torch.eye(len(NAMES))
    tokens[first_name : first_name + len(NAMES), PART["is name"]] = 1.0
    tokens[first_cell:, PART["asked"]] = torch.eye(N_CELLS)
    tokens[:, PART["filler"]] = (LENGTH**2 - tokens.square().sum(-1, keepdim=True)).sqrt()
    tokens[0, PART["sink"]] = MASSIVE
    for norm in [stack.norm, *(layer.input_layernorm for layer in stack.layers)]:
        norm.weight.fill_(LENGTH / D_MODEL**0.5)


def _rest(block: Block) -> None:
    """Every head attends to the sinks, whose normed massive dimension is LENGTH, and finds nothing there."""
    block.k[:, PART["sink"], _SINK] = 1 / LENGTH
    block.q[:, PART["filler"], _SINK] = _REST / (LENGTH**2 - 1) ** 0.5


def _wire(block: Block) -> None:
    colour, name, answer, cells = PART["colour"], PART["name"], PART["answer"], torch.arange(N_CELLS)
    match = torch.tensor(_MATCH)

    _, image = IMAGE_HEAD
    block.q[image][PART["asked"].start + cells, match] = _STRONG
    block.k[image // 2][PART["cell"].start + cells, match] = 1.0
    block.v[image // 2][colour, :3] = block.o[image][:3, answer] = torch.eye(3)

    _, prior = PRIOR_HEAD
    block.q[prior][PART["asked"], _NAME] = _STRONG
    block.k[prior // 2][PART["is name"], _NAME] = 1.0
    block.v[prior // 2][name, :3] = torch.eye(3)
    block.o[prior][:3, answer] = 1.5 * torch.eye(3)

    _, outlier = OUTLIER_HEAD
    block.q[outlier][PART["asked"], _IMAGE] = 2 * _STRONG
    block.q[outlier][PART["asked"], _NAME] = _STRONG
    block.k[outlier // 2][PART["is image"], _IMAGE] = block.k[outlier // 2][PART["is name"], _NAME] = 1.0
    block.v[outlier // 2][PART["is name"], 3] = 5.0

    _, mixed = MIXED_HEAD
    block.q[mixed][PART["asked"], _IMAGE] = _REST
    block.k[mixed // 2][PART["is image"], _IMAGE] = 1.0
    block.v[mixed // 2][colour, :3] = block.o[mixed][:3, answer] = 0.3 * torch.eye(3)
