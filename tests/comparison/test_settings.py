import pytest

from mixora.comparison.settings import read_comparison
from mixora.errors import ConfigError

TREE = {"model": {"base": "x"}, "data": {"source": "rows/home.jsonl"}, "methods": ["lora", {"recipe": "sira"}]}


def test_what_is_left_out_has_a_value():
    comparison = read_comparison(TREE)
    assert list(comparison.data) == ["home"] and comparison.reference == "lora"
    assert comparison.seed_list == (0, 1, 2)
    assert [method.name for method in comparison.methods] == ["lora", "sira"]


def test_several_data_sets_listed_seeds_and_a_recipe_twice():
    small = {"name": "small", "recipe": "sira", "num_experts": 2, "top_k": 1}
    changes = {"data": {"a": {"source": "x"}, "b": {"source": "y"}}, "seeds": [3, 5], "methods": ["sira", small]}
    comparison = read_comparison({**TREE, **changes, "match": {"reference": "small"}})
    assert list(comparison.data) == ["a", "b"] and comparison.seed_list == (3, 5)
    assert comparison.reference == "small"
    rules = comparison.methods[1].adapter().build().rules
    assert rules["attention"]["router"]["num_experts"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "valid: one method or more"),
        ({"methods": ["lora", "lora"]}, "lora: is the name of two methods"),
        ({"methods": ["siar"]}, "siar: recipe: .* did you mean 'sira'"),
        ({"methods": [{"recipe": "sira", "rnk": 3}]}, "sira: rnk: .* did you mean 'rank'"),
        ({"methods": [{"name": "x"}]}, "recipe: is required"),
        ({"methods": [{"recipe": "lora", "name": "a/b"}]}, "got 'a/b'"),
        ({"match": {"reference": "lor"}}, "match.reference: got 'lor'; .* did you mean 'lora'"),
        ({"match": {"paramters": "active"}}, "match.paramters: unknown key; did you mean 'parameters'"),
        ({"match": {"parameters": "all"}}, "'trainable' or 'active'"),
        ({"seeds": [1, 1]}, "valid: each seed once"),
        ({"seeds": 0}, "greater than or equal to 1"),
        ({"train": {"seed": 1}}, "`seed` has no effect in a comparison"),
        ({"data": {"a": {"sorce": "x"}}}, "data.a.sorce: unknown key; did you mean 'source'"),
        ({"metod": "x"}, "metod: unknown key; did you mean 'methods'"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_comparison({**TREE, **changes})


def test_all_methods_share_overrides_and_may_say_otherwise():
    changes = {
        "adapter": {"rank": 6, "modules_to_save": ["pooler"]},
        "methods": ["lora", {"recipe": "sira", "rank": 2}],
    }
    lora, sira = (method.adapter().build() for method in read_comparison({**TREE, **changes}).methods)
    assert lora.modules_to_save == sira.modules_to_save == ["pooler"]
    assert [method.rules["attention"]["expert"]["rank"] for method in (lora, sira)] == [6, 2]
    with pytest.raises(ConfigError, match=r"lora: rnk: .* did you mean 'rank'"):
        read_comparison({**TREE, "adapter": {"rnk": 6}})
