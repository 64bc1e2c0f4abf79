"""What every loss of the table promises."""

import pytest

from mixora.losses import LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_switched_off_by_default(name):
    assert LOSSES[name].Config().coefficient == 0
