"""Train `regression`: linear regression in context, by transformers of one layer with 1 and with 2 heads.

Both meet the same prompts, drawn anew for every step.

>>> python -m interp.zoo.training.train_regression --out interp/zoo/weights/regression.safetensors
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from interp.zoo.regression import draw, untrained
from interp.zoo.training.loop import arguments, save, train

BATCH = 256
LEARNING_RATE = 1e-2


def mean_squared_error(model: nn.Module, generator: torch.Generator, n: int = BATCH) -> Tensor:
    """Mean squared error on prompts drawn for this call."""
    prompts = draw(n, generator)
    return (model(prompts.x, prompts.y, prompts.x_query) - prompts.y_query).square().mean()


def main() -> None:
    """Train each transformer, measure on new prompts, and save."""
    options = arguments("Train the zoo's regression transformers.", steps=5000)
    torch.manual_seed(options.seed)
    models = untrained()
    errors = {}
    for name, model in models.items():
        generator = torch.Generator().manual_seed(options.seed)
        train(
            model,
            partial(mean_squared_error, generator=generator),
            steps=options.steps,
            learning_rate=LEARNING_RATE,
        )
        with torch.no_grad():
            held_out = torch.Generator().manual_seed(options.seed + 1)
            errors[name] = round(float(mean_squared_error(model, held_out, n=20_000)), 4)
    save(models, options.out, seed=options.seed, steps=options.steps, mean_squared_error=errors)


if __name__ == "__main__":
    main()
