"""Plug-ins: folders of secateur that add options, criteria and recoveries, which the pipeline does not know by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module

PLUGINS = ("secateur.paper.plugin",)
"""Modules that hold a `PLUGIN`."""


@dataclass(frozen=True)
class Plugin:
    """What a folder adds. It is read before torch is loaded: heavy modules are named and imported on use."""

    options: type
    """Dataclass whose fields become options of `prune`; its properties may override those of `Options`."""
    helps: Mapping[str, str] = field(default_factory=dict)
    """Sentences that follow the help of options that are there already, by name."""
    preselections: tuple[str, ...] = ()
    """Criteria that find heads which leave first, alone or as `name+X` in front of another criterion."""
    recoveries: Mapping[str, str] = field(default_factory=dict)
    """Modules of recoveries by name; see `secateur.fit.recovery`."""


@cache
def plugins() -> tuple[Plugin, ...]:
    """Return all plug-ins."""
    return tuple(import_module(name).PLUGIN for name in PLUGINS)


def recovery_modules() -> Mapping[str, str]:
    """Return the modules of all recoveries that plug-ins add, by name."""
    return {name: module for plugin in plugins() for name, module in plugin.recoveries.items()}


def preselections() -> tuple[str, ...]:
    """Return the names of all criteria that find heads which leave first."""
    return tuple(name for plugin in plugins() for name in plugin.preselections)
