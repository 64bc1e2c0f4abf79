"""Nobody who does not use a plug-in pays for it."""

from pathlib import Path

import mixora

SOURCE = Path(mixora.__file__).parent


def test_nothing_of_the_package_imports_the_plugins():
    others = [path for path in SOURCE.rglob("*.py") if "integrations" not in path.relative_to(SOURCE).parts]
    assert len(others) > 200
    assert [path for path in others if "mixora.integrations" in path.read_text(encoding="utf-8")] == []
