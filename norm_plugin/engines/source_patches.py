"""A patched source under a running adapter: the engine was changed twice, which whoever reads its log should know."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from norm_plugin.engines.installed_hooks import InstalledHooks
from norm_plugin.patching import catalog
from norm_plugin.patching.errors import PatchError
from norm_plugin.patching.work import stands

log = logging.getLogger("norm_plugin")

HOOK = "source patch "


def note(hooks: InstalledHooks, engine: str) -> None:
    """Put the patches that stand in the engine's files into the hooks, whoever applied them, and so into its line.

    The adapter's hooks lie above what the patches change: they come first, and what they leave to the engine meets
    the patch.
    """
    spec = importlib.util.find_spec(engine)
    folders = [Path(place).parent for place in (spec.submodule_search_locations or [])] if spec else []
    try:
        for patch in catalog.patches():
            if patch.engine == engine and any(stands(folder, patch) for folder in folders):
                hooks.live[HOOK + patch.name] = next(iter(patch.files))
    except (OSError, PatchError, ValueError) as error:  # the adapter works without knowing this
        log.warning("norm_plugin cannot tell whether %s is patched in source: %s", engine, error)


def warn(hooks: InstalledHooks) -> None:
    """Say that both are on."""
    for hook, file in hooks.live.items():
        if hook.startswith(HOOK):
            log.warning(
                "norm_plugin: %s has %s in its source (%s) while the plugin is on: the plugin's hooks come first, and "
                "what they leave to the engine meets the patch. Turn the plugin off, or run norm-plugin patch revert.",
                hooks.engine, hook.removeprefix(HOOK), file,
            )  # fmt: skip
