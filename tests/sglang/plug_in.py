"""Loads the plug-in as SGLang does, whether or not the distribution with its entry point is installed."""

from importlib.metadata import EntryPoint, EntryPoints

import sglang.srt.plugins as plugins

GROUP = "sglang.srt.plugins"


def load():
    """By SGLang's own loader, which finds this entry point alone."""
    point = EntryPoint("ep_backend", "ep_backend_sglang:register", GROUP)
    original, plugins.entry_points = (
        plugins.entry_points,
        lambda group: EntryPoints([point]).select(group=group),
    )
    try:
        plugins._plugins_loaded = False
        plugins.load_plugins()
    finally:
        plugins.entry_points = original
