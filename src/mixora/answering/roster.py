"""Who can answer: one base, and saved adapters on it by name."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from mixora.answering.rows import Decoder
from mixora.bases import load_base, read_tokenizer
from mixora.config import did_you_mean, parse
from mixora.data.prompts import EncodingConfig, uses_chat
from mixora.display.stages import Stage, silently
from mixora.errors import ConfigError, ModelError
from mixora.evaluate.generation import end_ids
from mixora.files.documents import show
from mixora.loading import add_pretrained, check_files, find_adapter, from_pretrained, read_adapter_config, task_of
from mixora.training.run_config import ModelSection, read_settings
from mixora.training.run_folder import RUN_FILE

MOST_LENGTH = 2**31 - 1


@dataclass(frozen=True)
class Voice:
    """Who answers. `inner`: the adapter's name on the model, None for the base alone. `chat`: by the chat template."""

    name: str
    inner: str | None
    chat: bool


@dataclass(frozen=True)
class Source:
    """A saved adapter: its name, its folder, the base that it was trained on, and what its run says of both."""

    name: str
    folder: Path
    model: ModelSection
    prompt_format: str = "auto"


def find_source(word: str, model: str | None = None, dtype: str | None = None) -> Source:
    """What `PATH` or `NAME=PATH` names: the folder of a run, of a saved adapter, or a hub id.

    `model` and `dtype` take the place of what the adapter says. Raises `ConfigError` or `CheckpointError`.
    """
    name, _, place = ("", "", word) if Path(word).exists() else word.rpartition("=")
    folder, tree = Path(place).expanduser(), {}
    run = folder.parent if folder.name == "adapter" else folder
    if (run / RUN_FILE).is_file():
        tree, found = read_settings(run / RUN_FILE), run / "adapter"
    else:
        run, found = folder, find_adapter(folder if folder.exists() else place)
    check_files(found)
    config = read_adapter_config(found)
    if task_of(config) != "causal-lm":
        raise ConfigError(f"{place}: was trained for {task_of(config)}, which gives no text; valid: causal-lm")
    asked = {key: value for key, value in (("base", model), ("dtype", dtype)) if value is not None}
    section = {"base": config.base_model_name_or_path, **tree.get("model", {}), **asked}
    if not section["base"]:
        raise ConfigError(f"{place}: does not name its base; valid: --model BASE")
    prompt_format = tree.get("data", {}).get("prompt_format", "auto")
    return Source(name or run.resolve().name, found, parse(ModelSection, section, "model"), prompt_format)


class Roster:
    """One base with adapters on it. `voices`: by name, the base first; `limit`: the most tokens of a text.

    `num_tokens`: the ids that the model knows, from 0 on; a tokenizer may know more.

    `adapters`: for each name the adapter's own on `model`, and its prompt format as in a run's `data`. Raises
    `ConfigError` where an adapter has the base's name, `DataError` where an answer would have no end or a chat template
    is asked for but absent, and `ModelError` for a model that cannot answer in batches.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        base_name: str,
        adapters: Mapping[str, tuple[str, str]],
    ) -> None:
        if base_name in adapters:
            raise ConfigError(f"{base_name}: is the base's name, and an adapter's too; valid: NAME=PATH")
        self.model, self.tokenizer, self.base_name = model.eval(), tokenizer, base_name
        voices = [Voice(base_name, None, bool(tokenizer.chat_template))]
        voices += [
            Voice(name, inner, uses_chat(tokenizer, _encoding(form))) for name, (inner, form) in adapters.items()
        ]
        self.voices = {voice.name: voice for voice in voices}
        self.ends = frozenset(end_ids(model, tokenizer))
        padding = tokenizer.pad_token_id
        self.decoder = Decoder(model, min(self.ends) if padding is None else padding)
        self.limit = _limit_of(model, tokenizer)
        self.num_tokens: int = model.get_input_embeddings().weight.shape[0]
        self._active: Voice | None = None

    def find(self, name: str) -> Voice:
        """`ConfigError` for a name that nobody has."""
        if name not in self.voices:
            raise ConfigError(f"model: got {show(name)}, which is not served{did_you_mean(name, self.voices)}")
        return self.voices[name]

    def activate(self, voice: Voice) -> None:
        """Let `voice` compute what follows."""
        if voice == self._active:
            return
        # nobody, should it break off half-way
        self._active = None
        tuner: Any = self.model.base_model
        if voice.inner is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(voice.inner, inference_mode=True)
        self._active = voice


def load_roster(sources: Sequence[Source], device: str = "cpu", progress: Stage = silently) -> Roster:
    """The base of all sources with their adapters on it.

    Raises `ConfigError` where names, bases or dtypes do not go together, and what loading and `Roster` raise.
    """
    section = _agree(sources)
    place = _check_device(device)
    with progress(f"reading {section.base} and {len(sources)} adapter(s)"):
        base, _ = load_base(section.base, dtype=section.dtype)
        # the first one alone may bring tokens of its own
        tokenizer = read_tokenizer(section.base, sources[0].folder)
        model = from_pretrained(base.to(place), sources[0].folder, adapter_name="voice_0")
        for number, source in enumerate(sources[1:], 1):
            add_pretrained(model, source.folder, f"voice_{number}")
    adapters = {source.name: (f"voice_{number}", source.prompt_format) for number, source in enumerate(sources)}
    return Roster(model, tokenizer, _name_base(section.base), adapters)


def _encoding(prompt_format: str) -> EncodingConfig:
    return parse(EncodingConfig, {"prompt_format": prompt_format}, "data")


def _agree(sources: Sequence[Source]) -> ModelSection:
    """The base of all of them, and its dtype."""
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{twice[0]}: two adapters have this name; valid: NAME=PATH for one of them")
    for field, option in (("base", "--model"), ("dtype", "--dtype")):
        found = {getattr(source.model, field): source.name for source in sources}
        if len(found) > 1:
            told = ", ".join(f"{name} has {value}" for value, name in found.items())
            raise ConfigError(f"model.{field}: {told}; valid: one for all adapters, or {option}")
    return sources[0].model


def _name_base(base: str) -> str:
    path = Path(base).expanduser()
    return path.resolve().name if path.exists() else base


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(f"device: got {name!r}: {reason}; valid: cpu, or a device of this machine") from None
    return device


def _limit_of(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> int:
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    told: Iterable[Any] = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    known = [int(number) for number in told if number and 0 < number <= MOST_LENGTH]
    if not known:
        raise ModelError("neither the base nor its tokenizer says how many tokens it takes; valid: one that does")
    return min(known)
