import logging
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from tokenizers.normalizers import Prepend, Replace
from transformers import T5Config, T5ForConditionalGeneration

from mixora.data import Collator, EncodingConfig, Rows, encode, read_rows, render_choices, render_prompt
from mixora.errors import DataError

PLAIN = EncodingConfig(prompt_format="plain")
SUM = {"prompt": "2+2", "completion": "4"}
CHOICE = {"context": "Sky.", "question": "Hue?", "choices": ["red", "blue"], "answer": 1}
TALK = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "hey"},
        {"role": "assistant", "content": "nay"},
    ]
}


def rows_of(form, *rows, labels=None):
    return Rows(rows, form, labels, "rows")


def learned(tokenizer, row):
    return tokenizer.decode([token for token in row["labels"] if token != -100])


def one(form, row, tokenizer, config=PLAIN, model_kind="decoder", labels=None):
    return encode(rows_of(form, row, labels=labels), tokenizer, config, model_kind=model_kind).dataset[0]


def test_plain_completion_is_supervised_up_to_eos(plain_tokenizer):
    row = one("completion", SUM, plain_tokenizer)
    assert plain_tokenizer.decode(row["input_ids"]) == "<s>2+2\n4</s>"
    assert learned(plain_tokenizer, row) == "4</s>"


def test_auto_uses_the_chat_template_where_there_is_one(chat_tokenizer, plain_tokenizer):
    row = one("completion", SUM, chat_tokenizer, EncodingConfig())
    assert chat_tokenizer.decode(row["input_ids"]) == "<s>[user]2+2</s>\n[assistant]4</s>"
    assert learned(chat_tokenizer, row) == "4</s>"
    assert one("completion", SUM, plain_tokenizer, EncodingConfig()) == one("completion", SUM, plain_tokenizer)
    with pytest.raises(DataError, match="prompt_format: got 'chat', but the tokenizer has no chat template"):
        one("completion", SUM, plain_tokenizer, EncodingConfig(prompt_format="chat"))


def test_all_assistant_turns_are_supervised(chat_tokenizer):
    row = one("messages", TALK, chat_tokenizer, EncodingConfig())
    assert learned(chat_tokenizer, row) == "ho</s>\nnay</s>"
    whole = chat_tokenizer.apply_chat_template(TALK["messages"], tokenize=False).removesuffix("\n")
    assert chat_tokenizer.decode(row["input_ids"]) == whole
    assert row["input_ids"].count(chat_tokenizer.bos_token_id) == 1


def test_templates_that_cannot_be_supervised_are_refused(chat_tokenizer, plain_tokenizer):
    with pytest.raises(DataError, match="rows, row 1: messages of several turns or roles need a chat template"):
        one("messages", TALK, plain_tokenizer, EncodingConfig())
    chat_tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(DataError, match="row 1: the chat template renders 3 messages so that they do not start like"):
        one("messages", TALK, chat_tokenizer, EncodingConfig())
    chat_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="the chat template refuses the messages: no system role"):
        one("messages", TALK, chat_tokenizer, EncodingConfig())


def test_text_and_choice_rows(plain_tokenizer):
    text = one("text", {"text": "once"}, plain_tokenizer, EncodingConfig())
    assert plain_tokenizer.decode(text["input_ids"]) == "<s>once</s>"
    assert learned(plain_tokenizer, text) == "once</s>"
    choice = one("choice", CHOICE, plain_tokenizer)
    assert plain_tokenizer.decode(choice["input_ids"]) == "<s>Sky. Hue?\nblue</s>"
    assert learned(plain_tokenizer, choice) == "blue</s>"
    ids = render_choices(CHOICE, plain_tokenizer, PLAIN)
    assert [plain_tokenizer.decode(i) for i in ids] == ["red", "blue"]


def test_long_encodings_are_told_of_and_ends_are_not_doubled(plain_tokenizer):
    told = []
    rows = rows_of("completion", *[SUM] * 250)
    encode(rows, plain_tokenizer, PLAIN, model_kind="decoder", advance=lambda *given: told.append(given))
    assert told[:2] == [(100, 250), (200, 250)]
    plain = one("completion", SUM, plain_tokenizer, model_kind="encoder-decoder")["labels"]
    end = plain_tokenizer.eos_token_id
    assert plain[-1] == end and end not in plain[:-1]
    ends = {"single": "$A </s>", "special_tokens": [("</s>", end)]}
    plain_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**ends)
    assert one("completion", SUM, plain_tokenizer, model_kind="encoder-decoder")["labels"].count(end) == 1


def test_train_on_all_supervises_all_but_the_first_token(plain_tokenizer):
    row = one("completion", SUM, plain_tokenizer, EncodingConfig(train_on="all"))
    assert row["labels"] == [-100, *row["input_ids"][1:]]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize(("form", "row"), [("completion", SUM), ("choice", CHOICE), ("messages", TALK)])
def test_training_ids_start_with_the_prompt_ids(make_tokenizer, chat, opens, form, row):
    if form == "messages" and not chat:
        row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    tokenizer = make_tokenizer(chat=chat, opens=opens)
    prompt = render_prompt(row, form, tokenizer, EncodingConfig())
    encoded = one(form, row, tokenizer, EncodingConfig())
    assert encoded["input_ids"][: len(prompt)] == prompt
    answer = encoded["labels"][len(prompt) :]
    assert answer == encoded["input_ids"][len(prompt) :]
    assert prompt.count(tokenizer.bos_token_id) == (1 if chat or opens else 0)


def test_a_prompt_needs_no_answer(chat_tokenizer):
    assert render_prompt({"prompt": "2+2"}, "completion", chat_tokenizer, EncodingConfig()) == render_prompt(
        SUM, "completion", chat_tokenizer, EncodingConfig()
    )
    asked = {"messages": TALK["messages"][:4]}
    assert render_prompt(asked, "messages", chat_tokenizer, EncodingConfig()) == render_prompt(
        TALK, "messages", chat_tokenizer, EncodingConfig()
    )
    with pytest.raises(DataError, match="form: got 'text', which has no prompt; valid: completion, messages, choice"):
        render_prompt({"text": "a"}, "text", chat_tokenizer, EncodingConfig())


def test_a_bos_written_in_the_prompt_is_not_doubled(plain_tokenizer):
    ids = render_prompt({"prompt": "<s>hi"}, "completion", plain_tokenizer, PLAIN)
    assert plain_tokenizer.decode(ids) == "<s>hi\n"


def test_answers_get_no_mark_of_a_text_start(make_tokenizer):
    """Tokenizers of the SentencePiece kind put a space before any text they are given on its own."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Prepend(" ")
    row = one("completion", SUM, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "<s> 2+2\n4</s>"
    assert [tokenizer.decode(ids) for ids in render_choices(CHOICE, tokenizer, PLAIN)] == ["red", "blue"]


def test_long_prompts_lose_their_start_but_not_bos(plain_tokenizer):
    config = EncodingConfig(max_length=6, prompt_format="plain")
    ids = render_prompt({"prompt": "abcdefgh"}, "completion", plain_tokenizer, config)
    assert plain_tokenizer.decode(ids) == "<s>efgh\n"
    ids = render_prompt({"prompt": "abcdefgh"}, "completion", plain_tokenizer, config, room=3)
    assert plain_tokenizer.decode(ids) == "<s>h\n"
    with pytest.raises(DataError, match="room: got 6; valid: 0 to 5"):
        render_prompt(SUM, "completion", plain_tokenizer, config, room=6)


@pytest.mark.parametrize(
    ("limit", "expected", "truncated"),
    [(20, "<s>question\nanswer</s>", 0), (12, "<s>ion\nanswer</s>", 1), (9, "<s>\nanswer</s>", 1), (5, "<s>answ", 1)],
)
def test_truncation_spares_the_answer_and_is_reported(plain_tokenizer, caplog, limit, expected, truncated):
    row = {"prompt": "question", "completion": "answer"}
    with caplog.at_level(logging.WARNING, logger="mixora"):
        encoded = encode(
            rows_of("completion", row), plain_tokenizer, EncodingConfig(max_length=limit), model_kind="decoder"
        )
    assert plain_tokenizer.decode(encoded.dataset[0]["input_ids"]) == expected
    assert encoded.truncated == truncated
    assert len(caplog.records) == truncated
    if truncated:
        assert f"rows: 1 of 1 rows are longer than max_length {limit}" in caplog.text


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(prompt=st.integers(1, 20), answer=st.integers(1, 20), limit=st.integers(3, 25), opens=st.booleans())
def test_truncation_properties(make_tokenizer, prompt, answer, limit, opens):
    tokenizer = make_tokenizer(opens=opens)
    row = {"prompt": "p" * prompt, "completion": "a" * answer}
    encoded = encode(rows_of("completion", row), tokenizer, EncodingConfig(max_length=limit), model_kind="decoder")
    got = encoded.dataset[0]
    whole = opens + prompt + 1 + answer + 1
    assert len(got["input_ids"]) == min(whole, limit) == encoded.tokens
    assert encoded.truncated == (whole > limit)
    assert encoded.supervised_tokens == min(answer + 1, limit - 1)
    assert got["labels"][0] == -100


def test_counts(plain_tokenizer):
    encoded = encode(rows_of("completion", SUM, SUM), plain_tokenizer, PLAIN, model_kind="decoder")
    assert (encoded.tokens, encoded.supervised_tokens, encoded.truncated) == (14, 4, 0)


def test_encoder_decoder_rows(make_tokenizer):
    tokenizer = make_tokenizer(opens=False)
    row = one("completion", SUM, tokenizer, EncodingConfig(), "encoder-decoder")
    assert tokenizer.decode(row["input_ids"]) == "2+2"
    assert tokenizer.decode(row["labels"]) == "4</s>"
    assert render_prompt(SUM, "completion", tokenizer, PLAIN, model_kind="encoder-decoder") == row["input_ids"]
    choice = render_choices(CHOICE, tokenizer, PLAIN, model_kind="encoder-decoder")
    assert [tokenizer.decode(ids) for ids in choice] == ["red", "blue"]
    config = EncodingConfig(max_length=4)
    rows = rows_of("completion", SUM, {"prompt": "12345", "completion": "987654"})
    encoded = encode(rows, tokenizer, config, model_kind="encoder-decoder")
    assert tokenizer.decode(encoded.dataset[1]["input_ids"]) == "2345"
    assert tokenizer.decode(encoded.dataset[1]["labels"]) == "9876"
    assert (encoded.truncated, encoded.tokens, encoded.supervised_tokens) == (1, 3 + 2 + 4 + 4, 2 + 4)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    batch = Collator(tokenizer, "encoder-decoder")(list(encoded.dataset))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("model_kind", ["encoder", "decoder"])
def test_labelled_rows(plain_tokenizer, model_kind):
    plain_tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    row = {"text": "abc", "text_pair": "de", "label": 1}
    got = one("pair", row, plain_tokenizer, EncodingConfig(), model_kind, labels=("no", "yes"))
    assert plain_tokenizer.decode(got["input_ids"]) == "<s>abc</s>de"
    assert got["labels"] == 1
    assert ("token_type_ids" in got) == (model_kind == "encoder")
    short = EncodingConfig(max_length=4)
    encoded = encode(
        rows_of("classification", {"text": "abcdef", "label": 0.5}, {"text": "a", "label": 1.0}),
        plain_tokenizer,
        short,
        model_kind=model_kind,
    )
    assert plain_tokenizer.decode(encoded.dataset[0]["input_ids"]) == "<s>abc"
    assert (encoded.truncated, encoded.supervised_tokens) == (1, 2)
    batch = Collator(plain_tokenizer, model_kind)(list(encoded.dataset))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.5, 1.0]
    assert batch["input_ids"].shape == (2, 4)


@pytest.mark.parametrize(
    ("form", "row", "model_kind", "config", "message"),
    [
        ("completion", SUM, "encoder", {}, "got 'completion' rows for an encoder model; valid: classification, pair"),
        ("text", {"text": "a"}, "encoder-decoder", {}, "got 'text' rows for an encoder-decoder model; valid: comp"),
        ("completion", SUM, "encoder-decoder", {"packing": True}, "packing: has no effect on 'completion' rows"),
        ("classification", {"text": "a", "label": 0}, "decoder", {"packing": True}, "packing: has no effect"),
        ("completion", SUM, "encoder-decoder", {"train_on": "all"}, "train_on: 'all' has no effect"),
        (
            "text",
            {"text": "a"},
            "decoder",
            {"prompt_format": "plain"},
            "prompt_format: 'plain' has no effect on 'text'",
        ),
    ],
)
def test_settings_without_effect_are_refused(plain_tokenizer, form, row, model_kind, config, message):
    with pytest.raises(DataError, match=message):
        one(form, row, plain_tokenizer, EncodingConfig(**config), model_kind)


def test_rows_that_teach_nothing_are_refused(make_tokenizer):
    tokenizer = make_tokenizer(opens=False)
    with pytest.raises(DataError, match="rows: has no rows to encode"):
        encode(rows_of("completion"), tokenizer, PLAIN, model_kind="decoder")
    tokenizer.backend_tokenizer.normalizer = Replace("x", "")
    with pytest.raises(DataError, match="rows, row 2: keeps no token to learn from"):
        encode(rows_of("text", {"text": "a"}, {"text": "x"}), tokenizer, EncodingConfig(), model_kind="decoder")
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="rows, row 1: the chat template renders nothing for an answer"):
        one("completion", SUM, tokenizer, EncodingConfig())
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="the tokenizer has no EOS token"):
        one("completion", SUM, tokenizer)


def test_a_long_row_gives_no_foreign_warning(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(one("text", {"text": "abcdefgh"}, tokenizer, EncodingConfig())["input_ids"]) == 10


def test_real_rows_encode_and_pack(shared_data, plain_tokenizer):
    rows = read_rows(shared_data / "quickstart_own", limit=50)
    encoded = encode(rows, plain_tokenizer, EncodingConfig(max_length=256, packing=True), model_kind="decoder")
    assert encoded.truncated == 0
    assert encoded.tokens / (256 * len(encoded.dataset)) > 0.9
