import datasets
import pytest

from mixora.data import read_rows, splits_of
from mixora.errors import DataError


def test_hub_rows_with_class_names_and_a_configuration(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}], features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("someone/things:small", "test", limit=1)
    assert rows.rows == ({"text": "a", "label": 1},)
    assert rows.labels == ("no", "yes")
    assert rows.origin == "someone/things:small (test)"
    assert asked == [("someone/things", "small", "test")]


def test_hub_labels_without_names_are_counted_in_the_train_split(monkeypatch):
    splits = {"train": [0, 1, 2], "test": [1]}
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: list(splits))
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, split: datasets.Dataset.from_list([{"text": "a", "label": n} for n in splits[split]]),
    )
    assert splits_of("someone/things") == ("train", "test")
    assert read_rows("someone/things", "test").labels == ("0", "1", "2")


def test_hub_failure_is_one_sentence(monkeypatch):
    def fail(name, config, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="someone/things: no such file or folder, and the hub answered: offline"):
        read_rows("someone/things")
