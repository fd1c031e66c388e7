"""Plug-ins: folders of secateur that add options, criteria and recoveries without being named in the pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module

PLUGINS = ("secateur.paper.plugin",)
"""Modules that define a `PLUGIN`."""


@dataclass(frozen=True)
class Plugin:
    """Additions of one folder. It is imported before torch, so heavy modules are given by name."""

    options: type
    """Dataclass whose fields become options of `prune`; its properties may override properties of `Options`."""
    helps: Mapping[str, str] = field(default_factory=dict)
    """Sentences to append to the help texts of existing options, by option name."""
    preselections: tuple[str, ...] = ()
    """Criteria that select heads to remove first, used alone or as `name+X` before another criterion X."""
    recoveries: Mapping[str, str] = field(default_factory=dict)
    """Modules of additional recoveries, by name; see `secateur.fit.recovery`."""


@cache
def plugins() -> tuple[Plugin, ...]:
    """Return all plug-ins."""
    return tuple(import_module(name).PLUGIN for name in PLUGINS)


def recovery_modules() -> Mapping[str, str]:
    """Return the modules of the recoveries that plug-ins add, by name."""
    return {name: module for plugin in plugins() for name, module in plugin.recoveries.items()}


def preselections() -> tuple[str, ...]:
    """Return the names of the criteria that select heads to remove first."""
    return tuple(name for plugin in plugins() for name in plugin.preselections)
