"""The guide's example runs as it stands."""

import json
import re
from pathlib import Path

from mixora.answering.roster import Roster
from tests.endpoint.service import running

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "chat_and_serve.md"


def test_the_examples_of_the_guide(roster, capsys):
    text = GUIDE.read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (body,) = re.findall(r"-d '\s*(\{.*?\})'", text, flags=re.DOTALL)
    named = Roster(roster.model, roster.tokenizer, "tiny", {"first": ("red", "auto")})
    with running(named) as service:
        answer = service.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        exec(compile(block.replace("http://127.0.0.1:8000", service.url), str(GUIDE), "exec"), names := {})
        names["client"].close()
    assert json.loads(body)["messages"] == names["asked"]["messages"]
    assert capsys.readouterr().out.startswith(answer + "\n") and len(answer) > 20
