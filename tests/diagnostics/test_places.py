import pytest

from mixora.diagnostics.places import group_by_kind, name_site, places_of


@pytest.mark.parametrize(
    ("path", "kind", "layer", "name"),
    [
        ("model.layers.5.self_attn.q_proj", "self_attn.q_proj", 5, "layer 5 self_attn.q_proj"),
        ("transformer.h.11.mlp.c_fc", "mlp.c_fc", 11, "layer 11 mlp.c_fc"),
        ("0.up", "up", 0, "layer 0 up"),
        ("fc1.proj", "fc1.proj", None, "fc1.proj"),
        ("up", "up", None, "up"),
        (
            "decoder.block.2.layer.1.EncDecAttention.q",
            "layer.1.EncDecAttention.q",
            2,
            "decoder layer 2 layer.1.EncDecAttention.q",
        ),
    ],
)
def test_a_path_tells_kind_and_layer(path, kind, layer, name):
    assert places_of([path])[path] == (kind, layer)
    assert name_site(path) == name


def test_stacks_are_kept_apart_and_layers_are_in_order():
    paths = ["encoder.block.10.q", "encoder.block.2.q", "decoder.block.0.q"]
    kinds = group_by_kind([{"path": path} for path in paths])
    assert {kind: [label for label, _ in rows] for kind, rows in kinds.items()} == {
        "decoder q": ["0"],
        "encoder q": ["2", "10"],
    }
