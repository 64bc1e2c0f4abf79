"""What goes to the hub, against a stand-in for huggingface_hub's client that notes its calls: no network."""

import inspect
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from huggingface_hub import HfApi, errors
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from typer.testing import CliRunner

import mixora
from mixora.bases import load_base
from mixora.cli import app
from mixora.errors import ConfigError, UnwrittenError
from mixora.exporting import check_login, check_repository, hub, list_upload, upload
from mixora.exporting.folder import _check_base_name
from tests.characters import save_bases
from tests.models import adapt


class Client:
    """Notes what it is asked for; `error` is what the hub answers the second time."""

    calls: list = []
    texts: list = []
    error: Exception | None = None

    def create_repo(self, repo_id, **settings):
        self.calls.append(("create_repo", repo_id, settings))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, folder_path, allow_patterns, **settings):
        if self.error is not None:
            raise self.error
        folder = Path(folder_path)
        self.texts.extend((folder / name).read_text() for name in allow_patterns if not name.endswith(".safetensors"))
        sent = {name: (folder / name).stat().st_size for name in allow_patterns}
        self.calls.append(("upload_folder", sent, (folder / "README.md").read_text(), settings))


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Client)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(Client, "calls", [])
    monkeypatch.setattr(Client, "texts", [])
    return Client


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A saved `lora` on a base in a folder, with files beside it that are nobody's business."""
    root = tmp_path_factory.mktemp("hub")
    save_bases(root)
    base, _ = load_base(str(root / "llama"))
    model = adapt(base, mixora.recipe("lora", rank=2, task_type="CAUSAL_LM"))
    model.save_pretrained(root / "adapter", save_embedding_layers=False)
    (root / "adapter" / "optimizer.pt").write_bytes(b"x")
    (root / "adapter" / ".secret").write_text("x")
    return root / "adapter"


def call(*words):
    return CliRunner().invoke(app, ["export", *map(str, words), "--to", "hub"])


def spoken(result):
    return " ".join(result.output.split())


def test_the_client_has_what_the_stand_in_is_asked_for():
    asked = {"create_repo": {"repo_id", "private", "exist_ok"}}
    asked["upload_folder"] = {"repo_id", "folder_path", "allow_patterns", "commit_message"}
    for name, arguments in asked.items():
        assert arguments <= set(inspect.signature(getattr(HfApi, name)).parameters)


@pytest.mark.parametrize("form", ["adapter", "peft-lora", "dense", "standalone"])
def test_a_rehearsal_lists_exactly_what_an_upload_sends(form, adapter, client, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words = [adapter, "--repo", "me/mine", "--form", form, "--base-id", "org/base", "--model", adapter.parent / "llama"]
    words += ["--licence", "mit", "--json"]
    listed = json.loads(call(*words, "--dry-run").output)
    assert client.calls == [] and listed["address"] is None
    sent = json.loads(call(*words, "--private").output)
    (create, name, settings), (upload_folder, files, card, how) = client.calls
    assert (create, upload_folder, name) == ("create_repo", "upload_folder", "me/mine")
    assert settings == {"private": True, "exist_ok": False}
    assert how == {"repo_id": "me/mine", "commit_message": "Upload by mixora"}
    assert {file["name"]: file["bytes"] for file in listed["files"]} == files
    assert listed["card"] == sent["card"] == card and sent["address"] == "https://huggingface.co/me/mine"
    assert ".mixora" not in files and ".secret" not in files and "optimizer.pt" not in files
    holds = {"adapter": "adapter_model", "peft-lora": "adapter_model", "dense": "model", "standalone": "model"}
    assert f"{holds[form]}.safetensors" in files and {"README.md", "tokenizer.json"} <= files.keys()
    assert "license: mit" in card and 'from_pretrained("me/mine"' in card.replace('base, "', '"')
    # no path of this machine goes out, and nothing stays
    assert not [text for text in client.texts if str(adapter.parent) in text or str(tmp_path) in text]
    named = [text for text in client.texts if '"base_model_name_or_path": "org/base"' in text]
    assert len(named) == (form in ("adapter", "peft-lora"))
    assert list(tmp_path.iterdir()) == []


def test_no_path_of_this_machine_goes_out(adapter, client):
    result = call(adapter, "--repo", "me/mine", "--model", adapter.parent / "llama", "--dry-run")
    assert result.exit_code == 2 and client.calls == []
    assert "valid: --base-id OWNER/NAME, the same weights on the hub" in spoken(result)
    listed = call(adapter, "--repo", "me/mine", "--base-id", "org/base", "--dry-run")
    assert listed.exit_code == 0 and str(adapter.parent) not in listed.output
    assert "nothing was uploaded" in listed.output and "adapter_model.safetensors" in listed.output
    assert "# A mixture of adapters" in listed.output


def test_a_short_name_of_a_base_is_enough_for_mixora_only():
    for form in ("adapter", "dense", "standalone"):
        _check_base_name("smollm2-135m-instruct", form)
    for form in ("averaged", "peft-lora"):
        with pytest.raises(
            ConfigError, match="--base-id OWNER/NAME, HuggingFaceTB/SmolLM2-135M-Instruct, of which this one is a"
        ):
            _check_base_name("smollm2-135m-instruct", form)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry-run"], "repo: is required with --to hub; valid: --repo OWNER/NAME"),
        (["--repo", "mine"], "repo: got 'mine'; valid: OWNER/NAME"),
        (["--repo", "me/mi ne"], "repo: got 'me/mi ne'"),
        (["--repo", "me/mine", "--out", "x"], "out: --to hub keeps no folder"),
        (["--repo", "me/mine", "--form", "gguf"], "to: got 'gguf' (known: adapter, averaged"),
        (["--repo", "me/mine", "--rank", 2], "rank: nothing is merged; valid: with peft-lora, averaged, dense"),
        (["--repo", "me/mine", "--licence", "Mine!"], "licence: got 'Mine!'"),
    ],
)
def test_mistakes(words, message, adapter, client):
    result = call(adapter, *words)
    assert result.exit_code == 2 and message in spoken(result) and client.calls == []


def test_without_a_token_nothing_is_begun(adapter, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    result = call(adapter, "--repo", "me/mine", "--base-id", "org/base")
    assert result.exit_code == 2 and "hub: there is no token here; valid: `hf auth login`, or HF_TOKEN" in spoken(
        result
    )
    with pytest.raises(ConfigError, match="there is no token here"):
        check_login()


def answer(status):
    # of the library that huggingface_hub asks with: httpx, or httpx2
    library = import_module(errors.Response.__module__.partition(".")[0])
    response = errors.Response(status, request=library.Request("POST", "https://huggingface.co"))
    return HfHubHTTPError("many words", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(401), "the hub does not know the token; valid: `hf auth login`"),
        (answer(403), "the token may not write there"),
        (answer(409), "is there already; valid: another name, or --overwrite to add a commit to it"),
        (answer(500), "the hub took nothing, or not all; it answered: many words"),
        (OfflineModeIsEnabled("offline\nmode"), "the hub took nothing, or not all; it answered: offline mode"),
        (errors.HTTPError("no route"), "the hub took nothing, or not all; it answered: no route"),
    ],
)
def test_what_the_hub_answers_is_one_line(error, message, client, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "error", error)
    (tmp_path / "README.md").write_text("card")
    with pytest.raises(UnwrittenError, match=re.escape(f"me/mine: {message}")) as caught:
        upload(tmp_path, list_upload(tmp_path, "me/mine", False), overwrite=True)
    assert "\n" not in str(caught.value)
    assert client.calls == [("create_repo", "me/mine", {"private": False, "exist_ok": True})]


def test_names_of_repositories():
    check_repository("me/my-model_1.0")
    for name in ("mine", "a/b/c", "", "me/", "me/..", "me/x--y", "https://huggingface.co/me/mine"):
        with pytest.raises(ConfigError, match="repo: got"):
            check_repository(name)
