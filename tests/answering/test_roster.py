"""One base and several adapters: who has which name, and who computes."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

import mixora
from mixora.answering.prompts import conversation_ids, text_ids
from mixora.answering.roster import find_source, load_roster
from mixora.bases import load_base
from mixora.data import EncodingConfig, render_prompt
from mixora.errors import CheckpointError, ConfigError, DataError
from mixora.loading import add_pretrained
from tests.characters import build_tokenizer
from tests.models import token_ids


def make_run(saved, folder, **model):
    """A folder as `mixora train` leaves it, as far as it is read here."""
    shutil.copytree(saved / "red", folder / "adapter")
    settings = {"model": {"base": str(saved / "tiny"), **model}, "data": {"source": "x", "prompt_format": "plain"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@torch.no_grad()
def logits(model):
    return model(input_ids=token_ids(1, 6)).logits


def test_each_voice_computes_as_its_adapter_loaded_alone(saved):
    roster = load_roster([find_source(str(saved / name)) for name in ("red", "blue")])
    assert list(roster.voices) == ["tiny", "red", "blue"] and roster.limit == 256 and roster.ends == {2}
    base, _ = load_base(saved / "tiny")
    want = {"tiny": logits(base)}
    for name in ("red", "blue"):
        alone = mixora.from_pretrained(load_base(saved / "tiny")[0], saved / name).eval()
        want[name] = logits(alone)
    for name in ("red", "tiny", "blue", "blue", "tiny", "red"):
        roster.activate(roster.find(name))
        torch.testing.assert_close(logits(roster.model), want[name])
    with pytest.raises(ConfigError, match="model: got 'rde', which is not served; did you mean 'red'"):
        roster.find("rde")


def test_names_and_settings_of_sources(saved, tmp_path):
    run = make_run(saved, tmp_path / "first", dtype="bfloat16")
    for word, name in ((run, "first"), (run / "adapter", "first"), (f"mine={run}", "mine")):
        source = find_source(str(word))
        assert (source.name, source.folder, source.prompt_format) == (name, run / "adapter", "plain")
        assert (source.model.base, source.model.dtype) == (str(saved / "tiny"), "bfloat16")
    given = find_source(str(run), "other", "float16").model.model_dump(exclude_defaults=True)
    assert given == {"base": "other", "dtype": "float16"}
    strange = tmp_path / "rate=3"
    shutil.copytree(saved / "red", strange)
    assert find_source(str(strange)).name == "rate=3"
    roster = load_roster([find_source(str(run), dtype="float32"), find_source(str(saved / "red"))])
    assert {name: voice.chat for name, voice in roster.voices.items()} == {"tiny": True, "first": False, "red": True}


def test_what_does_not_go_together(saved, tmp_path):
    red = find_source(str(saved / "red"))
    with pytest.raises(ConfigError, match="red: two adapters have this name; valid: NAME=PATH"):
        load_roster([red, red])
    with pytest.raises(ConfigError, match="tiny: is the base's name, and an adapter's too"):
        load_roster([find_source(f"tiny={saved / 'red'}")])
    run = find_source(str(make_run(saved, tmp_path / "run", dtype="bfloat16")))
    with pytest.raises(ConfigError, match=r"model.dtype: red has float32, run has bfloat16; valid: .* --dtype"):
        load_roster([red, run])
    with pytest.raises(ConfigError, match="device: got 'nowhere'"):
        load_roster([red], "nowhere")
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        find_source(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("task_type", "SEQ_CLS", "was trained for sequence-classification, which gives no text"),
        ("base_model_name_or_path", None, "does not name its base; valid: --model BASE"),
    ],
)
def test_adapters_that_cannot_answer(saved, tmp_path, field, value, message):
    shutil.copytree(saved / "red", tmp_path / "red")
    path = tmp_path / "red" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ConfigError, match=message):
        find_source(str(tmp_path / "red"))


def test_a_second_adapter_is_checked_as_the_first(saved, tmp_path):
    model = mixora.from_pretrained(saved / "tiny", saved / "red", "red").eval()
    before = logits(model)
    shutil.copytree(saved / "blue", tmp_path / "blue")
    path = tmp_path / "blue" / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    with pytest.raises(CheckpointError, match=f"1 tensors do not fit the model:\n  {lost}: missing"):
        add_pretrained(model, tmp_path / "blue", "blue")
    assert list(model.peft_config) == ["red"] and torch.equal(logits(model), before)
    add_pretrained(model, saved / "blue", "blue")
    assert torch.equal(logits(model), before)
    model.set_adapter("blue")
    alone = PeftModel.from_pretrained(load_base(saved / "tiny")[0], saved / "blue").eval()
    torch.testing.assert_close(logits(model), logits(alone))


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_are_those_of_training(chat):
    tokenizer = build_tokenizer(chat=True)
    config = EncodingConfig(prompt_format="chat" if chat else "plain")
    want = render_prompt({"prompt": "lamp hall"}, "completion", tokenizer, config)
    assert conversation_ids([{"role": "user", "content": "lamp hall"}], tokenizer, chat) == want


def test_a_conversation_without_a_template_is_its_lines():
    tokenizer = build_tokenizer()
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert conversation_ids(said, tokenizer, chat=False) == tokenizer("a\nb\nc\n").input_ids
    with pytest.raises(DataError, match="the prompt has no tokens"):
        text_ids("", build_tokenizer(opens=False))
