from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from interp import heads

LENGTH = 9


@pytest.fixture
def pattern():
    scores = torch.randn(2, 3, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.fixture
def links():
    return torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.6


def test_alignment_is_the_area_under_the_curve_of_scikit_learn(pattern, links):
    pattern = (pattern * 20).round() / 20  # with ties
    found = heads.structure_alignment(pattern, links)
    earlier = np.tril(np.ones((LENGTH, LENGTH), dtype=bool), -1)
    for batch in range(2):
        for head in range(3):
            expected = roc_auc_score(links.numpy()[earlier], pattern[batch, head].numpy()[earlier])
            assert float(found[batch, head]) == pytest.approx(expected)
    nodes = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    nodes[4:, 1:4] = True
    expected = roc_auc_score(links[nodes].numpy(), pattern[0, 0][nodes].numpy())
    assert float(heads.structure_alignment(pattern, links, pairs=nodes)[0, 0]) == pytest.approx(expected)


def test_only_links_between_a_query_and_earlier_keys_are_read(pattern, links):
    expected = heads.structure_alignment(pattern, links)
    assert torch.equal(heads.structure_alignment(pattern, links | torch.ones_like(links).triu()), expected)
    assert torch.equal(heads.structure_alignment(pattern + torch.eye(LENGTH), links), expected)


def test_planted_links_score_one_and_a_head_that_avoids_them_zero(links):
    follows = links.float() + 0.1
    found = heads.structure_alignment(torch.stack([follows, -follows, torch.ones_like(follows)]), links)
    assert found.tolist() == [1, 0, 0.5]


@pytest.mark.parametrize("all_linked", [True, False])
def test_alignment_is_undefined_without_links_or_without_others(pattern, all_linked):
    found = heads.structure_alignment(pattern, torch.full((LENGTH, LENGTH), all_linked))
    assert found.shape == (2, 3)
    assert found.isnan().all()


def test_parents_are_the_largest_entry_beside_the_diagonal_and_what_is_excluded(pattern):
    before = pattern.clone()
    found = heads.attention_parents(pattern, exclude=[0])
    assert torch.equal(pattern, before)
    for query in range(LENGTH):
        row = pattern[1, 2, query].clone()
        row[[0, query]] = -1
        assert int(found[1, 2, query]) == (int(row.argmax()) if query > 1 else -1)
    assert (heads.attention_parents(pattern)[..., 1] == 0).all()


def test_parents_refuse_positions_outside_and_parts_of_patterns(pattern):
    with pytest.raises(ValueError, match=r"position 9 is outside the prompt; positions run 0\.\.8"):
        heads.attention_parents(pattern, exclude=[9])
    with pytest.raises(ValueError, match="this one has 2 queries and 9 keys"):
        heads.attention_parents(pattern[..., :2, :])
