"""The short form of tests/chaos.py."""

from pathlib import Path

import pytest
from chaos import chaos


@pytest.mark.full
def test_kills_at_random_moments_lose_nothing(phantoms: Path, tmp_path: Path):
    rows = list(chaos(6, 1, phantoms, tmp_path))
    assert rows[-1]["identical"] and rows[-1]["kills"] == 6
    assert len({r["stage"] for r in rows if "stage" in r}) > 1
