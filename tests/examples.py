"""On how many examples a property is tried: few in the suite; NGCORE_EXAMPLES=20 tries twenty times as many."""

import os

from hypothesis import settings

FACTOR = int(os.environ.get("NGCORE_EXAMPLES", "1"))


def examples(count: int) -> settings:
    return settings(max_examples=count * FACTOR, deadline=None)
