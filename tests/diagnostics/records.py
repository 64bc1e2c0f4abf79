"""Records for tests of the page: a small one, and one of a model with many sites."""

import math
import random

from mixora.diagnostics.record import RunRecord, Similar, Token, Typical

HOSTILE = "<script>alert('x')</script> \"quoted\" & $title ${body} </dd> ünï 日本 \N{PARTY POPPER} http://example.org"
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
WORDS = ("Ġthe", " kitchen", "\n", " lights", "(", " play", "_volume", " 日本", "<b>", "\N{RIGHT-TO-LEFT OVERRIDE}x")


def make_large_record(layers=30, experts=8, seed=0):
    """Every section filled; one dead expert, one collapsed router and one pair of twins among many healthy sites."""
    draw = random.Random(seed)
    paths = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS]
    routing = [_route(path, experts, draw) for path in paths]
    routing[3]["load"][2] = 0.0
    routing[3]["dead_experts"] = [2]
    routing[9]["load"] = [0.5, 0.5] + [0.0] * (experts - 2)
    routing[9]["dead_experts"] = list(range(2, experts))
    groups = ["calendar", "lights", "music", "news", "a group with a long name", HOSTILE]
    return RunRecord(
        title="Household commands on a model with many sites",
        recipe="hilo",
        base="smollm2-135m-instruct",
        data="examples/quickstart/data",
        created="2026-01-02T03:04:05+00:00",
        command="mixora train examples/quickstart/run.yaml adapter.recipe=hilo",
        next_command="mixora train --recipe hilo --model YOUR_MODEL --data YOUR_DATA --out runs/yours",
        plan=[_plan(path, experts) for path in paths],
        parameters={"total": 136_000_000, "trainable": 4_200_000, "active": 1_300_000},
        before={"loss": 4.1, "exact_match": 0.0, "slot_f1": 0.01, "rows": 42},
        after={"loss": 0.31, "exact_match": 0.74, "slot_f1": 0.9, "rows": 42},
        reloaded={"loss": 0.31, "exact_match": 0.74, "slot_f1": 0.9},
        history=[_log(step, draw) for step in range(1, 2001)],
        load={
            "groups": groups,
            "sites": paths,
            "load": [[_shares(experts, draw, spread=1.2) for _ in groups] for _ in paths],
        },
        routing=routing,
        similar=[
            Similar(path=paths[len(paths) // 6], first=2, second=6, cosine=0.991, correlation=0.42),
            *(Similar(path=path, first=0, second=1, cosine=draw.uniform(0, 0.6), correlation=None) for path in paths),
        ],
        typical=[_typical(path, expert, draw) for path in paths[:: len(paths) // 2] for expert in range(experts)],
        strongest=[_typical(path, 1, draw, words=1) for path in paths[:20]],
        generations=[{"prompt": "dim the lights", "expected": "dim()", "before": "I cannot.", "after": "dim()"}],
        environment={"mixora": "0.1.0", "torch": "2.13.0", "device": "CPU, 2 threads", "minutes": 4.2},
        notes=["3 training rows were longer than max_length and lost tokens.", HOSTILE],
    )


def _shares(experts, draw, spread=0.4):
    weights = [math.exp(draw.gauss(0, spread)) for _ in range(experts)]
    return [weight / sum(weights) for weight in weights]


def _route(path, experts, draw):
    return {
        "path": path,
        "experts_per_token": 2.0,
        "entropy": math.log(experts) * draw.uniform(0.5, 0.95),
        "max_entropy": math.log(experts),
        "dropped_share": draw.uniform(0, 0.08),
        "dead_experts": [],
        "load": _shares(experts, draw),
    }


def _plan(path, experts):
    row = {"path": path, "shape": [576, 1536], "experts": experts, "rank": "4", "top_k": 2, "router": "topk"}
    return {**row, "kernel": "joint", "parameters": 72_192, "active_parameters": 21_504}


def _log(step, draw):
    return {
        "step": step,
        "loss": 4 * math.exp(-step / 300) + 0.3 + draw.uniform(0, 0.2),
        "load_balance": 1 + 0.4 * math.exp(-step / 500) + draw.uniform(0, 0.02),
        "z_loss": 4.3 + draw.uniform(0, 0.1),
        "routing/entropy": 0.6 + 0.3 * math.exp(-step / 500),
        "routing/evenness": 0.9 + draw.uniform(0, 0.05),
        "routing/largest_share": 0.4 + draw.uniform(0, 0.05),
        "routing/dropped_share": 0.04 + draw.uniform(0, 0.01),
        "routing/dead_experts": draw.uniform(0, 0.2),
    }


def _typical(path, expert, draw, words=6):
    tokens = [
        Token(text=text, count=draw.randint(3, 90), share=draw.uniform(0.4, 1), score=draw.uniform(3, 12))
        for text in draw.sample(WORDS, words)
    ]
    return Typical(path=path, expert=expert, usual=draw.uniform(0.1, 0.4), tokens=tokens)
