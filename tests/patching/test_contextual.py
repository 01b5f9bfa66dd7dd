"""Contextual decomposition against the rules written out by hand, and where it is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import interp
from interp.model import Model, Site
from interp.patching import contextual_rules as rules_module
from interp.patching.activation import activation_patching
from interp.patching.contextual import Decomposition, Node, contextual_decomposition, contextual_patching
from interp.patching.contextual_rules import Choice, contextual_rules, without_opposition
from interp.patching.rules.parts import parts_of
from interp.tasks import Task
from tests.model.families import FAMILIES
from tests.patching import two_parts

SUPPORTED = [
    "gpt2",
    "gpt_neox",
    "opt",
    "opt-post_norm",
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phi-qk_norm",
    "olmo2",
    "stablelm-parallel_qk_norm",
    "starcoder2",
    "cohere-qk_norm",
    "granite",
    "bert",
    "roberta",
    "distilbert",
]
"""One family for every way in which blocks are built."""
NODES = [Site("z", 0), Site("z", 1), Site("z", 2)]
SOURCES = [
    Node(NODES[0], head=1),
    Node(NODES[2], head=3, position=4),
    [Node(NODES[0], head=0, position=2), Node(NODES[1], head=2)],
    Node(NODES[1], position=8),
]


def family_model(name: str) -> tuple[Model, Tensor]:
    family = FAMILIES[name]
    return Model(family.make_model("eager", torch.float64)), family.make_inputs()["input_ids"]


def places(node: Node) -> tuple[slice | int, slice | int]:
    return tuple(slice(None) if index is None else index for index in (node.position, node.head))  # type: ignore[return-value]


def inserted_by_hand(source: Node | list[Node], reference: dict[Site, Tensor], prompt: int) -> two_parts.Source:
    def insert(layer: int, z: two_parts.Two) -> two_parts.Two:
        own = z.own.clone()
        for node in source if isinstance(source, list) else [source]:
            if node.site == NODES[layer]:
                own[places(node)] = (z.total - reference[NODES[layer]][prompt])[places(node)]
        return two_parts.Two(own, z.total - own)

    return insert


@pytest.mark.parametrize("name", SUPPORTED)
def test_total_of_stacked_rows_is_the_model_itself(name: str) -> None:
    """At every node, so that relevant and irrelevant part add up to the model's own activation."""
    model, tokens = family_model(name)
    sites = [site for site in model.sites if site.kind not in ("attn_scores", "pattern")]
    logits, plain = model.run_with_cache(tokens, sites)
    with contextual_rules(model, parts_of(model), 3, Choice()):
        stacked_logits, stacked = model.run_with_cache(tokens.repeat(3, 1), sites)
    torch.testing.assert_close(stacked_logits[: len(tokens)], logits, atol=1e-12, rtol=0)
    for site in sites:
        torch.testing.assert_close(stacked[site][: len(tokens)], plain[site], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["llama-multi_query", "mistral", "phi3"])
def test_all_of_the_input_is_relevant_everywhere(name: str) -> None:
    """In models without biases: a bias has its own share."""
    model, tokens = family_model(name)
    found = contextual_decomposition(model, tokens, [Node("hook_embed")], targets=["logits", "resid_post", "z"])
    for target, total in found.total.items():
        torch.testing.assert_close(found.relevant[target][0], total, atol=1e-5, rtol=0)


BY_HAND = {
    "gpt2": two_parts.gpt2,
    "bert": two_parts.bert,
    "llama": two_parts.llama,
    "qwen3": two_parts.llama,
    "gemma3_text": two_parts.llama,
}


@pytest.mark.parametrize("frozen", [False, True], ids=["moving", "frozen"])
@pytest.mark.parametrize(
    ("name", "bias"),
    # RMSNorm rounds to float32 inside, and shares of a bias make any rounding large.
    [("gpt2", "shared"), ("bert", "shared"), *((name, "irrelevant") for name in BY_HAND)],
)
def test_equals_the_rules_by_hand(monkeypatch: pytest.MonkeyPatch, name: str, bias: Any, frozen: bool) -> None:
    monkeypatch.setattr(rules_module, "TINY", 1e-300)
    model, tokens = family_model(name)
    generator = torch.Generator().manual_seed(3)
    _, cache = model.run_with_cache(tokens, NODES)
    reference = {site: torch.randn(cache[site].shape, generator=generator).double() for site in NODES}
    found = contextual_decomposition(
        model, tokens, SOURCES, reference=reference, frozen_attention=frozen, bias=bias, logits_to_keep=0, batch_size=8
    )
    rules = two_parts.Rules(frozen=frozen, share_bias=bias == "shared")
    for prompt in range(len(tokens)):
        for number, source in enumerate(SOURCES):
            with torch.no_grad():
                logits = BY_HAND[name](model.hf, tokens[prompt], inserted_by_hand(source, reference, prompt), rules)
            torch.testing.assert_close(found.relevant["logits"][number, prompt], logits.own, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.total["logits"][prompt], logits.total, atol=1e-5, rtol=1e-5)
    assert float(found.relevant["logits"].abs().amax((1, 2, 3)).min()) > 0.01


def plain_model(*, linear: bool = False) -> tuple[Model, Tensor]:
    """A GPT-2 without norms and biases, in float64; attention and activation function are what is not linear in it."""
    model, tokens = family_model("gpt2")
    for block in model.hf.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
        block.mlp.act = nn.LeakyReLU(1.0) if linear else block.mlp.act
    model.hf.transformer.ln_f = nn.Identity()
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".h." in name:
                parameter.mul_(0.5)
    return Model(model.hf), tokens


def patched_logits(model: Model, tokens: Tensor, source: Node | list[Node], reference: dict[Site, Tensor]) -> Tensor:
    """Logits of a run with the source's nodes at their reference, and every attention pattern as it was."""
    patterns = model.run_with_cache(tokens, "pattern")[1]
    nodes = source if isinstance(source, list) else [source]

    def put(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        for node in nodes:
            if node.site == hook.name:
                at = (slice(None), *places(node))
                z[at] = reference[Site.parse(node.site)][at]
        return z

    hooks = [("pattern", lambda pattern, hook: patterns[hook.name]), ("z", put)]
    return model.run_with_hooks(tokens, hooks)  # type: ignore[arg-type]


def test_exact_on_a_linear_model() -> None:
    """The contribution of a source is what its absence takes from the logits, patterns held."""
    model, tokens = plain_model(linear=True)
    _, cache = model.run_with_cache(tokens, NODES)
    # The other prompt's activations.
    reference = {site: cache[site].roll(1, 0) for site in NODES}
    sources = [SOURCES[0], SOURCES[1], SOURCES[3]]
    found = contextual_decomposition(
        model, tokens, sources, reference=reference, frozen_attention=True, logits_to_keep=0
    )
    for number, source in enumerate(sources):
        without = patched_logits(model, tokens, source, reference)
        torch.testing.assert_close(found.irrelevant("logits")[number], without, atol=1e-10, rtol=0)
    assert float(found.relevant["logits"].abs().amax((1, 2, 3)).min()) > 0.01


@pytest.mark.parametrize("frozen", [False, True])
def test_all_sources_together_are_the_output_less_the_reference_run(frozen: bool) -> None:
    """Whatever the activation function: its rule takes f of the irrelevant part, which is then a run of its own."""
    model, tokens = plain_model()
    _, cache = model.run_with_cache(tokens, NODES)
    reference = {site: cache[site].mean((0, 1)) for site in NODES}
    everything = [Node(site) for site in NODES]
    found = contextual_decomposition(
        model, tokens, [everything], reference=reference, frozen_attention=frozen, logits_to_keep=0
    )
    whole = {site: value.expand_as(cache[site]) for site, value in reference.items()}
    without = patched_logits(model, tokens, everything, whole)
    torch.testing.assert_close(found.irrelevant("logits")[0], without, atol=1e-10, rtol=0)


def test_sources_in_one_pass_equal_one_by_one() -> None:
    model, tokens = family_model("llama")
    targets = ["logits", "z", "resid_post", "mlp_post", "ln_final"]
    options: dict[str, Any] = {"targets": targets, "bias": "irrelevant"}
    together = contextual_decomposition(model, tokens, SOURCES, **options)
    for batch_size in (2, 5):
        assert_same(together, contextual_decomposition(model, tokens, SOURCES, batch_size=batch_size, **options))
    for number, source in enumerate(SOURCES):
        alone = contextual_decomposition(model, tokens, [source], **options)
        for target in together.total:
            torch.testing.assert_close(alone.relevant[target][0], together.relevant[target][number], atol=1e-6, rtol=0)
    # The second source is in the last layer: before it nothing is relevant.
    assert not together.relevant[Site("resid_post", 1)][1].any()
    assert together.relevant[Site("resid_post", 2)][1].any()


def assert_same(one: Decomposition, other: Decomposition) -> None:
    assert one.total.keys() == other.total.keys()
    for target in one.total:
        torch.testing.assert_close(one.total[target], other.total[target], atol=1e-6, rtol=0)
        torch.testing.assert_close(one.relevant[target], other.relevant[target], atol=1e-6, rtol=0)


def test_nothing_is_relevant_where_the_activation_is_the_reference() -> None:
    model, tokens = family_model("gemma2")
    _, cache = model.run_with_cache(tokens, NODES)
    found = contextual_decomposition(model, tokens, SOURCES, reference=cache, targets=["logits", "resid_post"])
    assert not any(relevant.any() for relevant in found.relevant.values())


def test_soft_cap_of_logits_is_an_activation_function() -> None:
    model, tokens = family_model("gemma2")
    capped = contextual_decomposition(model, tokens, SOURCES)
    model.hf.config.final_logit_softcapping = None
    plain = contextual_decomposition(model, tokens, SOURCES)
    expected = 2.0 * torch.tanh(plain.irrelevant("logits") / 2.0)
    torch.testing.assert_close(capped.irrelevant("logits"), expected, atol=1e-9, rtol=0)
    assert float((capped.relevant["logits"] - plain.relevant["logits"]).abs().max()) > 0.01


def test_sign_fix_leaves_no_parts_of_opposite_sign() -> None:
    total, part = torch.tensor([[1.0, 1.0, -1.0, 2.0]]), torch.tensor([[3.0, -1.0, -0.4, 0.5]])
    assert without_opposition(total, part).tolist() == [[1.0, 0.0, -0.4000000059604645, 0.5]]
    model, tokens = family_model("llama")
    targets = ["resid_post", "mlp_out", "resid_mid", "mlp_pre", "attn_out"]
    found = contextual_decomposition(model, tokens, SOURCES[:1], targets=targets, sign_fix=True)
    for target in found.total:
        opposed = found.relevant[target] * found.irrelevant(target) < -1e-9
        assert bool(opposed.any()) == (Site.parse(target).kind == "attn_out"), target


def test_relevance_is_the_ratio_of_sizes() -> None:
    found = Decomposition({"logits": torch.tensor([[[1.0, -2.0]]])}, {"logits": torch.tensor([[4.0, -1.0]])})
    assert found.irrelevant("logits").tolist() == [[[3.0, 1.0]]]
    assert found.relevance("logits").tolist() == [[0.75]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_model_is_left_as_it_was(name: str) -> None:
    model, tokens = family_model(name)
    before = model(tokens)
    contextual_decomposition(model, tokens, SOURCES, sign_fix=True)
    with pytest.raises(RuntimeError, match="stop"):
        contextual_decomposition(model, tokens, [Node(NODES[2])], reference={NODES[2]: _Stopping(tokens)})
    for module in model.hf.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert torch.equal(model(tokens), before)


class _Stopping(Tensor):
    """A reference that fails when it is read."""

    @staticmethod
    def __new__(cls, like: Tensor) -> _Stopping:
        return torch.zeros(1).as_subclass(cls)  # type: ignore[return-value]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to:
            raise RuntimeError("stop")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("name", "part"),
    [("mixtral", "mixture of experts of mixtral"), ("gptj", "attention of gptj"), ("falcon", "falcon")],
)
def test_families_without_rules_are_refused(name: str, part: str) -> None:
    model, tokens = family_model(name)
    with pytest.raises(NotImplementedError, match=part):
        contextual_decomposition(model, tokens, SOURCES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": [Node(NODES[0], head=4)]}, "head 4 of blocks.0.attn.hook_z is out of range; it runs 0..3"),
        ({"sources": [Node(NODES[0], position=9)]}, "position 9"),
        ({"sources": [Node(NODES[0], neuron=1)]}, "has no neuron axis"),
        ({"sources": [Node("blocks.0.hook_zz")]}, "matches no site"),
        ({"sources": [Node("pattern")]}, "cannot be a source"),
        ({"sources": [[]]}, "without nodes"),
        ({"sources": SOURCES, "targets": "attn_scores"}, "cannot be a target"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    model, tokens = family_model("llama")
    with pytest.raises(ValueError, match=message):
        contextual_decomposition(model, tokens, **arguments)


def linear_task(task: Task) -> Model:
    """A model for the task's tokens that is linear but for attention."""
    size = int(max(task.clean.max(), task.corrupted.max(), task.answers.max(), task.wrong.max())) + 1
    config = transformers.GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(config).double().eval()
    for block in hf.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.LeakyReLU(1.0)
    hf.transformer.ln_f = nn.Identity()
    for parameter in hf.parameters():
        parameter.data.normal_(std=0.2)
    return Model(hf)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("by", [("layer", "head"), ("position",)], ids=str)
def test_patching_has_the_form_of_exact_effects_and_equals_them_where_all_is_linear(
    tiny_gpt2: interp.Model, direction: Any, by: Any
) -> None:
    task = interp.tasks.induction(tiny_gpt2, n=2, seed=0)
    model = linear_task(task)
    # Everything after the last layer's z is linear; in the layer before, patterns move.
    options: dict[str, Any] = {"site": "blocks.1.attn.hook_z", "by": by, "direction": direction, "per_prompt": True}
    exact = activation_patching(model, task, reference=True, **options)
    estimate = contextual_patching(model, task, bias="irrelevant", **options)
    assert estimate.dims == exact.dims
    assert estimate.attrs.keys() >= exact.attrs.keys() - {"engine"}
    assert estimate.attrs["metric_clean"] == pytest.approx(exact.attrs["metric_clean"])
    torch.testing.assert_close(torch.tensor(estimate.values), torch.tensor(exact.values), atol=1e-6, rtol=1e-5)
    assert float(abs(exact).max()) > 1e-3


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_patching_with_a_mean_or_nothing(tiny_gpt2: interp.Model, ablation: Any) -> None:
    task = interp.tasks.induction(tiny_gpt2, n=2, seed=0)
    model = linear_task(task)
    options: dict[str, Any] = {
        "site": "blocks.1.attn.hook_z",
        "by": ("head",),
        "direction": "noise",
        "ablation": ablation,
    }
    exact = activation_patching(model, task, reference=True, **options)
    estimate = contextual_patching(model, task, bias="irrelevant", batch_size=3, **options)
    torch.testing.assert_close(torch.tensor(estimate.values), torch.tensor(exact.values), atol=1e-6, rtol=1e-5)
