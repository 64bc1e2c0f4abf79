import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mixora.data import Collator, EncodingConfig, Rows, encode
from mixora.data.packing import pack
from mixora.errors import DataError


def rows_of(form, *rows):
    return Rows(rows, form, None, "rows")


@given(lengths=st.lists(st.integers(1, 16), max_size=60))
def test_bins_hold_each_row_once_and_are_never_overfull(lengths):
    bins = pack(lengths, 16)
    assert sorted(row for members in bins for row in members) == list(range(len(lengths)))
    totals = sorted(sum(lengths[row] for row in members) for members in bins)
    assert all(total <= 16 for total in totals)
    assert len(totals) < 2 or totals[0] + totals[1] > 16  # no two bins could be one


WORDS = st.lists(st.tuples(*[st.text("abc", min_size=1, max_size=6)] * 2), min_size=1, max_size=12)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(pairs=WORDS)
def test_packed_bins_unpack_to_the_same_rows(make_tokenizer, pairs):
    rows = rows_of("completion", *[{"prompt": a, "completion": b} for a, b in pairs])
    tokenizer = make_tokenizer()
    loose = encode(rows, tokenizer, EncodingConfig(max_length=20), model_kind="decoder")
    packed = encode(rows, tokenizer, EncodingConfig(max_length=20, packing=True), model_kind="decoder")
    found = []
    for line in packed.dataset:
        starts = [place for place, position in enumerate(line["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(line["position_ids"])], strict=True):
            assert line["position_ids"][start:end] == list(range(end - start))
            found.append((line["input_ids"][start:end], line["labels"][start:end]))
    assert sorted(found) == sorted((line["input_ids"], line["labels"]) for line in loose.dataset)
    assert (packed.tokens, packed.supervised_tokens) == (loose.tokens, loose.supervised_tokens)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("multiple", [None, 16])
def test_packed_rows_do_not_see_each_other(make_tokenizer, attention, multiple):
    """The loss of packed rows, in batches of several bins, is that of the rows on their own."""
    tokenizer = make_tokenizer()
    rows = rows_of("completion", *[{"prompt": "abc" * n, "completion": "cab" * (n % 3 + 1)} for n in range(1, 7)])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    losses = {}
    for packing in (False, True):
        encoded = encode(rows, tokenizer, EncodingConfig(max_length=40, packing=packing), model_kind="decoder")
        batch = Collator(tokenizer, "decoder", multiple)(list(encoded.dataset))
        assert ("attention_mask" in batch) != packing
        assert packing == (batch["input_ids"].shape[0] == 1)
        with torch.no_grad():
            losses[packing] = model(**batch, use_cache=False).loss
    torch.testing.assert_close(losses[True], losses[False])


def test_collator_pads_with_a_mask(make_tokenizer):
    tokenizer = make_tokenizer()
    features = [{"input_ids": [5, 2], "labels": [-100, 2]}, {"input_ids": [6], "labels": [6]}]
    for padding in ("<pad>", None):
        tokenizer.pad_token = padding
        batch = Collator(tokenizer, "decoder", 4)(features)
        filler = 0 if padding else tokenizer.eos_token_id
        assert batch["input_ids"].tolist() == [[5, 2, filler, filler], [6, filler, filler, filler]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
        assert batch["labels"].tolist() == [[-100, 2, -100, -100], [6, -100, -100, -100]]
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a PAD nor an EOS token"):
        Collator(tokenizer, "decoder")(features)
    with pytest.raises(DataError, match="pad_to_multiple_of: got 0; valid: 1 or more"):
        Collator(tokenizer, "decoder", 0)


def test_padding_of_packed_rows_can_be_told(plain_tokenizer):
    batch = Collator(plain_tokenizer, "decoder", 4)(
        [{"input_ids": [5, 2], "labels": [-100, 2], "position_ids": [0, 1]}]
    )
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100]]


def test_trainer_takes_the_collator_and_keeps_packed_rows_apart(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    rows = rows_of("completion", *[{"prompt": "abc" * n, "completion": "cab" * (n % 3 + 1)} for n in range(1, 7)])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
        )
    )
    losses = []
    for packing in (False, True):
        encoded = encode(rows, tokenizer, EncodingConfig(max_length=40, packing=packing), model_kind="decoder")
        options = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=8,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        collator = Collator(tokenizer, "decoder")
        trainer = Trainer(model=model, args=options, train_dataset=encoded.dataset, data_collator=collator)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_to_answer_need_no_labels(plain_tokenizer):
    batch = Collator(plain_tokenizer, "decoder")([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
