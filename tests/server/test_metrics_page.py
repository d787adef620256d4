"""docs/metrics.md lists what the server has: every metric with its type and labels, and none besides."""

import re
from pathlib import Path

from support.metrics import exercised, labels_by_name

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(hotswap_\w+)` \| (\w+) \|([^|]*)\|[^|]+\|$", re.MULTILINE)


def test_the_page_and_the_registry_agree():
    documented = {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in ROW.findall(PAGE.read_text())
    }
    assert documented == labels_by_name(exercised())
