"""Codes by hand, planted codes found again, and scores of a model against what they are defined to be."""

import math

import numpy as np
import pytest
import torch

import interp
from interp import zoo
from interp.circuits import codes as codes_module
from interp.circuits import discover, node_roc
from interp.circuits.code_book import CodeBook, code_book
from interp.circuits.code_statistics import (
    changed_share,
    code_information,
    swapped,
    unique_counts,
    unique_pair_counts,
)
from interp.circuits.codes import code_edge_scores, code_scores
from interp.model import Edit, Site
from tests.model.families import FAMILIES
from tests.patching.linear_model import pairs_of_tokens

POSITIVE = np.array([[1, 0, 5], [1, 0, 6], [2, 1, 5], [3, 1, 6]])
NEGATIVE = np.array([[2, 0, 5], [4, 0, 6], [4, 1, 6], [4, 1, 5]])


def tiny(name="llama"):
    return interp.load(FAMILIES[name].make_model("eager"))


# Statistics


def test_counts_by_hand():
    # Node 0: 1 and 3 are in no negative example, 2 is. The other nodes have the same codes in both classes.
    np.testing.assert_array_equal(unique_counts(POSITIVE, NEGATIVE), [2, 0, 0])
    np.testing.assert_array_equal(changed_share(POSITIVE, NEGATIVE), [1, 0, 0.5])


def test_information_by_hand():
    found = code_information(POSITIVE, NEGATIVE)
    positive, negative = [2 / 4, 1 / 4, 1 / 4, 0], [0, 1 / 4, 0, 3 / 4]

    def entropy(shares):
        return -sum(share * math.log(share) for share in shares if share)

    both = [(one + other) / 2 for one, other in zip(positive, negative, strict=True)]
    np.testing.assert_allclose(found, [entropy(both) - (entropy(positive) + entropy(negative)) / 2, 0, 0], atol=1e-12)
    apart = code_information(np.array([[0], [1]]), np.array([[2], [3]]))
    np.testing.assert_allclose(apart, [math.log(2)])


def test_pairs_against_sets_of_pairs():
    draw = np.random.default_rng(0)
    positive, negative = draw.integers(0, 4, (6, 5)), draw.integers(0, 4, (6, 5))
    layers = np.array([0, 0, 1, 1, 2])
    found = unique_pair_counts(positive, negative, layers)
    for writer in range(5):
        for reader in range(5):
            pairs = [{(row[writer], row[reader]) for row in codes.tolist()} for codes in (positive, negative)]
            if layers[writer] < layers[reader]:
                assert found[writer, reader] == len(pairs[0] - pairs[1])
            else:
                assert np.isnan(found[writer, reader])
    assert np.nanmax(found) > 0


def test_swaps_within_pairs():
    found = swapped(unique_counts, POSITIVE, NEGATIVE, 400, seed=0)
    # All ways to swap node 0's four pairs: its true score is the largest of the 16 (all kept, or the last but one).
    ways = [
        unique_counts(np.where(one, NEGATIVE, POSITIVE), np.where(one, POSITIVE, NEGATIVE))[0]
        for number in range(16)
        for one in [np.array([[bool(number >> bit & 1)] for bit in range(4)])]
    ]
    assert set(found[:, 0]) == set(ways)
    assert abs(found[:, 0].mean() - np.mean(ways)) < 0.15
    np.testing.assert_array_equal(found, swapped(unique_counts, POSITIVE, NEGATIVE, 400, seed=0))
    assert swapped(unique_counts, POSITIVE, NEGATIVE, 0, seed=0).shape == (0, 3)


# The code book


def planted(n_rows=240, n_kinds=6, d_model=20):
    """Vectors that are one of a few orthogonal directions, with a little noise, or noise alone (kind −1)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(d_model, n_kinds, generator=generator))[0].T
    kinds = torch.arange(n_rows) % (n_kinds + 1) - 1
    clean = torch.where(kinds[:, None] >= 0, directions[kinds], 0.0)
    return clean + 0.01 * torch.randn(n_rows, d_model, generator=generator), kinds


def test_planted_kinds_get_codes_of_their_own():
    vectors, kinds = planted()
    book = code_book(vectors, 30, progress=False)
    found = book.codes(vectors)
    sets = [set(found[kinds == kind].tolist()) for kind in range(6)]
    assert not set.intersection(*sets)
    assert all(not one & other for place, one in enumerate(sets) for other in sets[:place])
    assert torch.allclose(book.decoder.norm(dim=-1), torch.ones(30), atol=1e-5)


def test_training_lowers_the_loss_and_is_seeded():
    vectors, _ = planted()
    losses = []
    for steps in (0, 300):
        book = code_book(vectors, 10, steps=steps, seed=3, progress=False)
        features = book.features(vectors)
        error = (vectors - book.centre - features @ book.decoder).square().sum(1).mean()
        losses.append(float(error + 0.3 * features.sum(1).mean()))
    assert losses[1] < losses[0] - 0.1
    again = code_book(vectors, 10, seed=3, progress=False)
    assert torch.equal(again.encoder, book.encoder)
    assert not torch.equal(code_book(vectors, 10, seed=4, progress=False).encoder, book.encoder)


def test_the_penalty_makes_features_few():
    vectors, _ = planted()
    free, dear = (code_book(vectors, 10, sparsity=one, progress=False).features(vectors) for one in (0.0, 1.0))
    assert float(dear.sum(1).mean()) < 0.7 * float(free.sum(1).mean())


def test_nothing_is_a_code_of_its_own():
    book = CodeBook(torch.eye(3), torch.full((3,), -0.5), torch.eye(3), torch.zeros(3))
    assert book.codes(torch.tensor([[1.0, 0, 0.7], [0, 0, 0.6], [0.4, 0.4, 0.5]])).tolist() == [0, 2, 3]


# Of a model


@pytest.mark.parametrize("positions", ["mean", "last"])
@pytest.mark.parametrize("clean", [True, False])
def test_vectors_are_head_results_and_mlp_outputs(positions, clean):
    model, task = tiny("gpt2"), pairs_of_tokens(4)
    outputs = codes_module._run(model, task, clean=clean, positions=positions, mlps=True, batch_size=3)
    _, cache = model.run_with_cache(task.clean if clean else task.corrupted, ["result", "mlp_out"])
    plain = codes_module._Prepared(None, 1.0)
    for kind, site in (("heads", "result"), ("mlps", "mlp_out")):
        for layer, found in enumerate(outputs.vectors(kind, None, plain)):
            expected = cache[site, layer]
            expected = expected.mean(1) if positions == "mean" else expected[:, -1]
            torch.testing.assert_close(found, expected if kind == "heads" else expected[:, None], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["heads", "mlps"])
def test_training_vectors_have_mean_squared_norm_1_and_mean_0_if_centred(kind):
    model, task, chosen = tiny("gpt2"), pairs_of_tokens(6), [4, 1, 2]
    outputs = [
        codes_module._run(model, task, clean=clean, positions="mean", mlps=True, batch_size=None)
        for clean in (True, False)
    ]
    for centred in (True, False):
        by = codes_module._prepare(kind, outputs, chosen, centred)
        layers = [torch.cat(both) for both in zip(*(one.vectors(kind, chosen, by) for one in outputs), strict=True)]
        vectors = torch.stack(layers, dim=1)  # [example, layer, node, d_model]
        assert vectors.shape[0] == 2 * len(chosen)
        assert float(vectors.square().sum(-1).mean()) == pytest.approx(1, rel=1e-4)
        assert (float(vectors.mean(0).abs().max()) < 1e-5) == centred


def test_codes_are_trained_on_as_many_examples_as_asked_for(monkeypatch):
    model, task, trained_on = tiny(), pairs_of_tokens(8), []

    def recorded(vectors, *args, **kwargs):
        trained_on.append(len(vectors))
        return code_book(vectors, *args, **kwargs)

    monkeypatch.setattr(codes_module, "code_book", recorded)
    for n_train in (4, 100):
        found = code_scores(model, task, n_train=n_train, steps=2, n_codes=4, progress=False)
        assert found.attrs["n_train"] == min(n_train, 16)
    assert trained_on == [4 * 12, 16 * 12]  # of 12 heads each


def test_a_head_that_says_the_same_in_both_runs_scores_nothing(monkeypatch):
    """And one that is made to say two different things scores most."""
    model, task = tiny(), pairs_of_tokens(8)
    generator = torch.Generator().manual_seed(0)
    said = torch.randn(2, model.d_head, generator=generator) * 20
    clean = {tuple(row) for row in task.clean_ids}

    def z_by_class(z):
        marks = [0 if tuple(row) in clean else 1 for row in current]
        z = z.clone()
        z[:, :, 1] = said[marks][:, None]
        return z

    current = []
    run = model.run_with_cache

    def recorded(tokens, *args, **kwargs):
        current[:] = tokens.tolist()
        return run(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "run_with_cache", recorded)
    with model.edited([Edit(Site("z", 1), fn=z_by_class), Edit(Site("z", 2), heads=[3], value=0.5)]):
        count = code_scores(model, task, score="count", progress=False)
        information = code_scores(model, task, score="information", progress=False)
    assert float(information.sel(node="L1H1")) == pytest.approx(math.log(2))
    assert float(information.max()) == pytest.approx(math.log(2))
    assert float(information["p_value"].sel(node="L1H1")) < 0.05
    # Of 200 swaps and the actual one, which counts as one of them.
    shares = information["p_value"].dropna("node").values * 201
    np.testing.assert_allclose(shares, shares.round(), atol=1e-9)
    assert shares.min() >= 1
    assert float(count.sel(node="L1H1")) >= 1
    assert float(count.sel(node="L2H3")) == float(information.sel(node="L2H3")) == 0
    assert float(information["p_value"].sel(node="L2H3")) == 1


@pytest.mark.parametrize("score", ["changed", "count", "information"])
@pytest.mark.parametrize("options", [{}, {"mlps": True, "positions": "last", "centred": False}])
def test_result(score, options):
    model, task = tiny(), pairs_of_tokens(4)
    found = code_scores(model, task, score=score, steps=20, n_codes=16, progress=False, **options)
    again = code_scores(model, task, score=score, steps=20, n_codes=16, progress=False, batch_size=1, **options)
    np.testing.assert_array_equal(found, again)
    assert found.dims == ("node",)
    expected = ["embed"]
    for layer in range(3):
        expected += [f"L{layer}H{head}" for head in range(4)] + [f"mlp{layer}"]
    assert found["node"].values.tolist() == expected
    silent = found["node"].values[np.isnan(found.values)].tolist()
    assert silent == (["embed"] if options else ["embed", "mlp0", "mlp1", "mlp2"])
    assert found.attrs["n_train"] == found.attrs["n_scored"] == 8
    assert {"model", "task", "method", "metric", "direction", "seconds"} <= set(found.attrs)
    assert bool(np.isnan(found["p_value"]).all()) == (score == "changed")
    assert found.attrs["n_permutations"] == (0 if score == "changed" else 200)


def test_changed_codes_are_the_default_and_find_more_than_the_published_count():
    model, known = zoo.load("duplicate"), ("L0H1", "L1H2", "L2H0")
    aucs = {"changed": 0.0, "count": 0.0}
    for seed in range(3):
        task = zoo.task("duplicate", n=10, seed=seed)
        for score in aucs:
            found = code_scores(model, task, score=score, seed=seed, n_permutations=0, progress=False)
            aucs[score] += node_roc(found, known)["auroc"] / 3
    assert aucs["changed"] > 0.75
    assert aucs["changed"] > aucs["count"] + 0.05
    circuit = discover(model, task, "codes", nodes=3)
    assert circuit.attrs["score"] == "changed"


def test_edges_are_pairs_of_the_same_codes():
    model, task = tiny(), pairs_of_tokens(4)
    found = code_edge_scores(model, task, steps=20, n_codes=16, progress=False)
    assert found.dims == ("writer", "reader")
    assert found["writer"].values.tolist() == found["reader"].values.tolist()
    assert found.shape == (12, 12)
    layers = np.repeat(range(3), 4)
    np.testing.assert_array_equal(np.isnan(found.values), layers[:, None] >= layers)
    # A code that positive examples alone have makes a pair with every later head in each of its examples.
    nodes = code_scores(model, task, score="count", steps=20, n_codes=16, progress=False)
    nodes = nodes.sel(node=found["writer"].values).values
    assert (found.values[:4, 4:] >= nodes[:4, None]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "counts"}, "score='counts'"),
        ({"positions": "first"}, "positions='first'"),
        ({"n_train": 1}, "n_train=1; it is 2 or more"),
        ({"n_codes": 0}, "n_codes=0"),
        ({"sparsity": -0.1}, "sparsity=-0.1; it is 0 or more"),
        ({"n_permutations": -1}, "n_permutations=-1"),
    ],
)
def test_bad_choices(options, message, monkeypatch):
    model = tiny()
    monkeypatch.setattr(model, "run_with_cache", None)
    with pytest.raises(ValueError, match=message):
        code_scores(model, pairs_of_tokens(), **options)
