"""Published circuits: sizes that their sources state, and names that the package understands."""

import pytest
import transformers

import interp
from interp.circuits.known import KNOWN
from interp.patching.edges import Reader, Writer, is_upstream

SIZES = {"gpt2": (12, 12), "attn-only-4l": (4, 8)}


def sized_model(name):
    """A GPT-2 with as many layers and heads as the model of the paper, and no more weights than needed."""
    n_layers, n_heads = SIZES[name]
    config = transformers.GPT2Config(vocab_size=7, n_embd=2 * n_heads, n_layer=n_layers, n_head=n_heads, n_positions=4)
    return interp.load(transformers.GPT2LMHeadModel(config).eval())


@pytest.fixture(scope="module")
def models():
    return {name: sized_model(name) for name in SIZES}


@pytest.mark.parametrize(
    ("name", "n_heads", "n_mlps", "n_edges"),
    [
        ("ioi", 26, 0, 1041 - 3 * 26),  # ACDC counts an edge into each head's q, k and v besides
        ("ioi-cdt", 26, 0, 0),
        ("ioi-oneill", 26, 0, 0),
        ("greater_than", 9, 8, 262 - 3 * 9),
        ("greater_than-cdt", 8, 0, 0),
        ("greater_than-oneill", 9, 0, 0),
        ("docstring", 6, 0, 37 - 13),  # 13 q, k and v are in the circuit
        ("docstring-cdt", 8, 0, 0),
        ("docstring-oneill", 6, 0, 0),
    ],
)
def test_sizes(name, n_heads, n_mlps, n_edges):
    circuit = KNOWN[name]
    assert circuit.name == name
    assert sum(map(len, circuit.heads.values())) == len(circuit.head_names) == n_heads
    assert len(circuit.mlp_names) == n_mlps
    assert len(circuit.edges) == n_edges
    assert circuit.source


@pytest.mark.parametrize("name", KNOWN)
def test_every_name_is_a_node_of_the_model_and_every_edge_goes_forward(name, models):
    circuit = KNOWN[name]
    model = models[circuit.model]
    for node in circuit.head_names | circuit.mlp_names:
        Writer.parse(node).check(model)
    for writer_name, reader_name in circuit.edges:
        writer, reader = Writer.parse(writer_name), Reader.parse(reader_name, model)
        writer.check(model)
        assert is_upstream(writer, reader, parallel=False), (writer_name, reader_name)
    assert hasattr(interp.tasks, circuit.task)


def test_edges_of_heads_stay_within_the_list():
    for circuit in KNOWN.values():
        ends = {name.split(".")[0] for edge in circuit.edges for name in edge}
        assert {name for name in ends if name.startswith("L")} == (circuit.head_names if circuit.edges else set())


def test_ioi_classes():
    ioi, cdt, oneill = KNOWN["ioi"], KNOWN["ioi-cdt"], KNOWN["ioi-oneill"]
    sizes = {role: len(names) for role, names in ioi.heads.items()}
    assert sizes == {
        "name mover": 3,
        "backup name mover": 8,
        "negative name mover": 2,
        "S-inhibition": 4,
        "induction": 4,
        "duplicate token": 3,
        "previous token": 2,
    }
    assert ioi.head_names ^ cdt.head_names == {"L11H10", "L11H0"}
    assert ioi.head_names ^ oneill.head_names == {"L9H0", "L11H3"}
    for edge in [
        ("L2H2", "L5H5.k"),
        ("L5H5", "L7H3.v"),
        ("L8H10", "L9H9.q"),
        ("embed", "L9H9.v"),
        ("L9H9", "logits"),
        ("mlp0", "L2H2.q"),
        ("L3H0", "mlp3"),
    ]:
        assert edge in ioi.edges
    for edge in [("L2H2", "L5H5.q"), ("L8H10", "L9H9.k"), ("embed", "L9H9.q"), ("L8H6", "logits")]:
        assert edge not in ioi.edges


def test_docstring_edges_one_by_one():
    expected = {
        *(("L0H5", f"L1H4.{one}") for one in "v"),
        *(("embed", f"{node}.v") for node in ("L0H5", "L1H4")),
        *((writer, f"L2H0.{one}") for writer in ("embed", "L0H5") for one in "qk"),
        ("L1H4", "L2H0.v"),
        *((writer, f"L1H2.{one}") for writer in ("embed", "L0H5") for one in "qk"),
    }
    for mover in ("L3H0", "L3H6"):
        expected |= {(mover, "logits"), ("L1H4", f"{mover}.q"), ("embed", f"{mover}.v"), ("L0H5", f"{mover}.v")}
        expected |= {("L2H0", f"{mover}.k"), ("L1H2", f"{mover}.k")}
    assert KNOWN["docstring"].edges == expected


def test_greater_than_keeps_mlps_whole_before_the_last_mid_head():
    edges = KNOWN["greater_than"].edges
    assert {("mlp4", "mlp8"), ("mlp6", "L7H10.q"), ("L0H1", "mlp0"), ("L9H1", "mlp9"), ("L0H3", "L5H5.k")} <= edges
    assert not {("mlp6", "L7H10.k"), ("mlp4", "mlp9"), ("L0H3", "mlp0"), ("mlp0", "logits"), ("embed", "mlp4")} & edges
