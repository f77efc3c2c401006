"""A run with something about it changed: what ablations and rows of tables have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def changed(config: Any, **changes: Any) -> Any:
    """A run's config with some of its fields changed, or some of its schedule's; what is neither is an option of its
    model."""
    fields = {name: value for name, value in changes.items() if hasattr(config, name)}
    scheduled = {name: value for name, value in changes.items() if hasattr(config.schedule, name)}
    options = {name: value for name, value in changes.items() if name not in fields | scheduled}
    if scheduled:
        fields["schedule"] = replace(config.schedule, **scheduled)
    if options:
        fields["options"] = tuple((dict(config.options) | options).items())
    return replace(config, **fields)
