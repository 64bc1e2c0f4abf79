"""What `--overwrite` may take away, and what it leaves alone."""

import pytest

from mixora.errors import ConfigError
from mixora.files.folders import check_folder, claim_folder


def test_a_result_inside_of_a_result_is_kept(tmp_path):
    for folder in ("runs", "runs/first", "runs/first/export"):
        (claim_folder(tmp_path / folder, overwrite=True) / "results.txt").write_text("x")
    for outer, inner in [("runs", "first"), ("runs/first", "export")]:
        for act in (check_folder, claim_folder):
            with pytest.raises(ConfigError, match=rf"holds .*{inner}, a result by itself.*valid: another folder"):
                act(tmp_path / outer, overwrite=True)
        assert (tmp_path / outer / "results.txt").exists()
    claim_folder(tmp_path / "runs/first/export", overwrite=True)
    assert not (tmp_path / "runs/first/export/results.txt").exists()
