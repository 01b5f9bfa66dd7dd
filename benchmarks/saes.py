"""Training sparse autoencoders beside other libraries, what buffer and cache cost, and the kernel beside its twins.

`python benchmarks/saes.py [--out benchmarks/results/saes.md] [--repeats 5] [--peers]`: attention outputs of
SmolLM2-135M, float32. A training step is all that a library does with a batch once it has it: forward, loss, backward,
clipping, Adam, what keeps the decoder in shape, counts of what fired. All begin from the same weights and get the same
batches. Peers: `pip install sae-lens eai-sparsify dictionary-learning`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from machine import describe, interleaved_seconds
from torch.nn.functional import embedding_bag

import interp
from interp.kernels.sparse_decode import sparse_decode
from interp.model import Site
from interp.saes.activations import Buffer, gather, keeper
from interp.saes.learner import Learner
from interp.saes.recipe import Recipe
from interp.saes.text import open_text

LAYERS, LENGTH, K = (12, 13, 14, 15), 128, 32
SITE = Site.parse("blocks.15.attn.hook_z")
SIZES = ((576, 4608, 4096), (2304, 16384, 2048))
"""Width, features and batch of the training steps: z of one layer, and of four side by side."""
RATE = 2e-4
SERVED = 2**17
"""Tokens that go through the buffer and the cache: the default size of a buffer."""
FORWARD_TOKENS = 4096


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="measure the other libraries, too")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = parser.parse_args()
    model = interp.load("smollm2-135m")
    lines = ["# Sparse autoencoders\n", f"{describe()}; medians of {options.repeats} interleaved runs."]
    print("\n".join(lines), flush=True)
    for part in options.parts:
        found = PARTS[part](model, options)
        print("\n".join(found), flush=True)
        lines += found
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


def training(model, options):
    """Tables of training steps."""
    z = activations(model, max(batch for _, _, batch in SIZES))
    lines = [
        "\n## Training steps\n",
        f"TopK, k = {K}, Adam at {RATE}, gradients clipped to norm 1, decoder rows held at norm 1 and their "
        "gradients projected, except where it says otherwise; no feature is dead yet, so that AuxK has nothing to do. "
        "Limit: the time of the encoder's matrix product alone, measured in the same run, as a share of the step. "
        "Forward: up to the loss, without gradients.",
    ]
    for width, n_features, batch in SIZES:
        x = z[:batch, -width:].contiguous()
        lines += step_table(x, n_features, options)
    return lines


def step_table(x, n_features, options):
    """One table: every library's step on the same batch and initial weights."""
    learner = new_learner(x, n_features)
    weights = {name: value.detach().clone() for name, value in learner.sae.state_dict().items()}
    runs = {"interp": (partial(learner.step, 0, {SITE: x}), partial(learner.sae.loss, x))}
    for name, make in peers(options.peers).items():
        runs[name] = make(x, weights)
    runs["dense PyTorch, no constraint, no clipping"] = dense(x, weights)
    product = torch.empty(len(x), n_features)
    functions = {"product": lambda: torch.mm(x, weights["W_enc"], out=product)}
    for name, (step, forward) in runs.items():
        functions[name], functions[f"{name}: forward"] = step, torch.no_grad()(forward)
    seconds = interleaved_seconds(functions, options.repeats)
    limit = seconds["product"]
    lines = [
        f"\nd = {x.shape[1]}, F = {n_features:,}, {len(x):,} tokens a batch; the encoder's product takes "
        f"{limit * 1e3:.0f} ms ({2 * len(x) * x.shape[1] * n_features / limit / 1e9:.0f} GFLOP/s).\n",
        "| library | step, ms | tokens/s | of the limit | interp is faster by | forward, ms | interp's forward is by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in runs:
        step, forward = seconds[name], seconds[f"{name}: forward"]
        lines.append(
            f"| {name} | {step * 1e3:.0f} | {len(x) / step:,.0f} | {limit / step:.0%} | "
            f"{step / seconds['interp']:.2f} | {forward * 1e3:.0f} | {forward / seconds['interp: forward']:.2f} |"
        )
    return lines


def activations(model, n):
    """The z of all layers side by side, [token, d]: natural text, in the order read."""
    sites = [Site.parse(f"blocks.{layer}.attn.hook_z") for layer in LAYERS]
    parts = []
    chunks = open_text(model, "natural", length=LENGTH, chunk_tokens=1024, seed=0).chunks_from(0)
    for chunk in itertools.islice(chunks, n // 1024):
        seen = gather(model, chunk.tokens, sites)
        parts.append(torch.cat([seen[site].flatten(0, 1) for site in sites], dim=1))
    return torch.cat(parts)


def new_learner(x, n_features):
    """What `interp.saes.train` makes of these settings."""
    recipe = Recipe(
        architecture="topk",
        settings={"k": K},
        expansion=8,
        d_sae=n_features,
        n_tokens=10**9,
        batch_size=len(x),
        learning_rate=RATE,
        warm_up=0,
        decay=0,
        sparsity_warm_up=0,
        clip=1.0,
        unit_decoder=True,
        normalise=False,
        dead_after_tokens=10**7,
        resample_every=None,
        resample_times=0,
        autocast=None,
        seed=0,
    )
    learner = Learner(SITE, None, recipe, {SITE: x.shape[1]}, x.device)
    learner.start({SITE: x})
    return learner


def peers(wanted):
    """What makes the step of each library that is installed, by name and version."""
    makers = {
        "SAELens": ("sae_lens", "sae-lens", saelens, ", norms in the product instead of a constraint"),
        "SAELens, sparse": (
            "sae_lens",
            "sae-lens",
            partial(saelens, sparse=True),
            ", sparse activations, decoder left free",
        ),
        "sparsify": ("sparsify", "eai-sparsify", sparsify, ", no clipping"),
        "dictionary_learning": ("dictionary_learning", "dictionary-learning", dictionary_learning, ""),
    }
    found = {}
    for name, (module, package, make, remark) in makers.items() if wanted else ():
        if importlib.util.find_spec(module) is None:
            print(f"{name} is not installed: pip install {package}")
        else:
            found[f"{name.partition(',')[0]} {importlib.metadata.version(package)}{remark}"] = make
    return found


def saelens(x, weights, sparse=False):
    """`SAETrainer.step` of SAELens."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    n_features = len(weights["W_dec"])
    # Its sparse activations have no gradient through the decoder's norms (torch 2.13: 'aten::view' of 'SparseCPU').
    settings = TopKTrainingSAEConfig(
        d_in=x.shape[1],
        d_sae=n_features,
        k=K,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
        apply_b_dec_to_input=True,
    )
    sae = TopKTrainingSAE(settings)
    sae.load_state_dict(weights)
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=len(x),
        lr=RATE,
        lr_end=RATE,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step():
        loss = trainer.step(x).loss
        trainer.n_training_steps += 1
        return loss.detach()

    return step, lambda: sae.mse_loss_fn(sae.decode(sae.encode_with_hidden_pre(x)[0]), x).sum(-1).mean()


def sparsify(x, weights):
    """What `Trainer.fit` of sparsify does with a batch of activations, with Adam as its option "adam" makes it."""
    if not torch.cuda.is_available():
        # Its Triton kernel would be chosen wherever triton is installed.
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    n_features = len(weights["W_dec"])
    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=n_features, k=K))
    with torch.no_grad():
        sae.encoder.weight.copy_(weights["W_enc"].T)
        for mine, name in ((sae.encoder.bias, "b_enc"), (sae.W_dec, "W_dec"), (sae.b_dec, "b_dec")):
            mine.copy_(weights[name])
    optimiser = torch.optim.Adam([{"params": sae.parameters(), "lr": RATE}])
    schedule = get_linear_schedule_with_warmup(optimiser, 0, 10**9)
    since_fired = torch.zeros(n_features, dtype=torch.long)

    def forward():
        return sae(x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())

    def step():
        sae.set_decoder_norm_to_unit_norm()
        out = forward()
        did_fire = torch.zeros(n_features, dtype=torch.bool)
        did_fire[out.latent_indices.flatten()] = True
        loss = float(out.fvu.detach())
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        since_fired.add_(len(x))
        since_fired[did_fire] = 0
        return loss

    return step, forward


def dictionary_learning(x, weights):
    """`TopKTrainer.update` of dictionary_learning; step 0, which sets b_dec, is left out."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    n_features = len(weights["W_dec"])
    trainer = TopKTrainer(
        steps=10**9,
        activation_dim=x.shape[1],
        dict_size=n_features,
        k=K,
        layer=15,
        lm_name="smollm2",
        lr=RATE,
        warmup_steps=0,
        device="cpu",
    )
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(weights["W_enc"].T)
        trainer.ae.encoder.bias.copy_(weights["b_enc"])
        trainer.ae.decoder.weight.copy_(weights["W_dec"].T)
        trainer.ae.b_dec.copy_(weights["b_dec"])
    return partial(trainer.update, 1, x), partial(trainer.loss, x, step=1)


def dense(x, weights):
    """What one writes first: dense products, autograd, Adam."""
    own = {name: value.clone().requires_grad_() for name, value in weights.items()}
    optimiser = torch.optim.Adam(own.values(), lr=RATE)

    def forward():
        values, indices = torch.topk((x - own["b_dec"]) @ own["W_enc"] + own["b_enc"], K, sorted=False)
        features = x.new_zeros(len(x), len(own["W_dec"])).scatter(1, indices, values.relu())
        return (features @ own["W_dec"] + own["b_dec"] - x).square().sum(-1).mean()

    def step():
        optimiser.zero_grad()
        loss = forward()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step, forward


def buffer(model, options):
    """Table of what storing, mixing and serving cost beside the forward pass."""
    text = open_text(model, "natural", length=LENGTH, chunk_tokens=1024, seed=0)
    chunks = list(itertools.islice(text.chunks_from(0), FORWARD_TOKENS // 1024))
    seen = [gather(model, chunk.tokens, [SITE]) for chunk in chunks]
    tokens = torch.cat([chunk.tokens for chunk in chunks])

    def served():
        """A full buffer of these activations over and over, and every batch of it."""
        again = lambda start: (chunks[number % len(chunks)] for number in range(start, SERVED // 1024))  # noqa: E731
        keep = keeper(text, [SITE], mask=None, skip_tokens=(), positions=slice(None))
        whole = Buffer(
            model,
            replace(text, chunks_from=again),
            [SITE],
            keep=keep,
            capacity=SERVED,
            batch_size=4096,
            seed=0,
            device=model.device,
        )
        with patch("interp.saes.activations.gather", lambda model, tokens, sites: seen[0]):
            return exhausted(whole)

    assert served() == SERVED
    functions = {
        "forward pass, whole": lambda: [model(chunk.tokens, logits_to_keep=1) for chunk in chunks],
        "forward pass as far as the site, activations gathered": lambda: [
            gather(model, chunk.tokens, [SITE]) for chunk in chunks
        ],
        "buffer: stored, mixed, served": served,
    }
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            functions[f"batches of 4,096 from a cache on disk, {dtype}"] = cached(
                model, tokens, seen, Path(folder) / dtype, dtype
            )
        seconds = interleaved_seconds(functions, options.repeats)
    n_tokens = {name: FORWARD_TOKENS if name.startswith("forward") else SERVED for name in functions}
    per_token = {name: value / n_tokens[name] for name, value in seconds.items()}
    whole, partly = list(per_token.values())[:2]
    lines = [
        "\n## Buffer and cache\n",
        f"{SITE}, natural text, chunks of 1,024 tokens, batches of 4,096; {FORWARD_TOKENS:,} tokens through the model, "
        f"and their activations {SERVED // FORWARD_TOKENS} times over through a buffer of {SERVED:,} tokens and a "
        "cache.\n",
        "| what | tokens/s | µs a token | of the whole forward | of the forward as far as the site |",
        "|---|---|---|---|---|",
    ]
    for name, value in per_token.items():
        lines.append(f"| {name} | {1 / value:,.0f} | {value * 1e6:.1f} | {value / whole:.1%} | {value / partly:.1%} |")
    return lines


def exhausted(batches):
    """Tokens served until there are no more."""
    n = 0
    while (rows := batches.next_batch()) is not None:
        n += len(rows[SITE])
    return n


def cached(model, tokens, seen, folder, dtype):
    """What reads an epoch of a cache of these activations."""
    text = tokens.repeat(SERVED // FORWARD_TOKENS, 1)
    with patch("interp.saes.activations.gather", lambda model, tokens, sites: seen[0]):
        cache = interp.saes.cache_activations(
            model, [str(SITE)], text, folder, n_tokens=SERVED, dtype=dtype, progress=False
        )
    batches = cache.batches([SITE], batch_size=4096, seed=0, device=torch.device("cpu"))
    return lambda: [batches.next_batch() for _ in range(SERVED // 4096)]


def kernels(model, options):
    """Tables of sparse decoding; on a GPU, too, if there is one."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    lines = []
    for device in devices:
        n = 1024 if device == "cpu" else 8192
        lines += [
            f"\n## Sparse decoding on {device}\n",
            f"{n:,} tokens, float32, milliseconds; backward: gradients to values and decoder.\n",
            "| d | F | k | forward: sparse_decode | embedding_bag | dense product | with backward: sparse_decode | "
            "embedding_bag | dense product |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for width, n_features, _ in SIZES:
            for k in (8, 32, 128):
                seconds = interleaved_seconds(decoders(n, k, n_features, width, device), options.repeats)
                times = " | ".join(f"{value * 1e3:.2f}" for value in seconds.values())
                lines.append(f"| {width} | {n_features:,} | {k} | {times} |")
    return lines


def decoders(n, k, n_features, width, device):
    """The three ways to decode a random code, forward, then forward and backward."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(n, n_features, generator=generator).topk(k).indices.to(device)
    values = torch.rand(n, k, generator=generator).to(device).requires_grad_()
    decoder = torch.randn(n_features, width, generator=generator).to(device).requires_grad_()
    slope = torch.randn(n, width, generator=generator).to(device)

    def product():
        return torch.zeros(n, n_features, device=device).scatter(1, indices, values) @ decoder

    ways = {
        "sparse_decode": lambda: sparse_decode(indices, values, decoder),
        "embedding_bag": lambda: embedding_bag(indices, decoder, mode="sum", per_sample_weights=values),
        "dense": product,
    }

    def timed(function):
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    def both(way):
        return torch.autograd.grad(way(), (values, decoder), slope)

    forward = {name: partial(timed, torch.no_grad()(way)) for name, way in ways.items()}
    return forward | {f"{name}, both": partial(timed, partial(both, way)) for name, way in ways.items()}


PARTS = {"training": training, "buffer": buffer, "kernels": kernels}


if __name__ == "__main__":
    main()
