"""Says in the log that an engine was changed twice: by a source patch, and by the adapter that runs on top of it."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from norm_plugin.engines.installed_hooks import InstalledHooks
from norm_plugin.patching import PatchError, catalog
from norm_plugin.patching.work import stands

log = logging.getLogger("norm_plugin")

HOOK = "source patch "


def note(hooks: InstalledHooks, engine: str) -> None:
    """Add the patches that the engine's files contain to its hooks, whoever applied them, so that the log names them.

    The adapter's hooks run before the patched code, which runs only what they leave to the engine.
    """
    spec = importlib.util.find_spec(engine)
    folders = [Path(place).parent for place in (spec.submodule_search_locations or [])] if spec else []
    try:
        for patch in catalog.patches():
            if patch.engine == engine and any(stands(folder, patch) for folder in folders):
                hooks.live[HOOK + patch.name] = next(iter(patch.files))
    except (OSError, PatchError, ValueError) as error:  # the adapter works all the same
        log.warning("norm_plugin cannot tell whether %s is patched in source: %s", engine, error)


def warn(hooks: InstalledHooks) -> None:
    """Log a warning for each source patch below the hooks."""
    for hook, file in hooks.live.items():
        if hook.startswith(HOOK):
            log.warning(
                "norm_plugin: %s has %s in its source (%s) while the plugin is on: the plugin's hooks come first, and "
                "what they leave to the engine meets the patch. Turn the plugin off, or run norm-plugin patch revert.",
                hooks.engine, hook.removeprefix(HOOK), file,
            )  # fmt: skip
