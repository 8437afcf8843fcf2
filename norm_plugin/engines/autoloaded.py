"""`norm-plugin autoload on` copies this file beside a .pth, which imports it in every Python process that sets a flag.

It waits until SGLang's layers are imported, and registers norm_plugin then. It imports nothing before, because the
process may be any program. If norm_plugin was uninstalled, it says so in one line and does nothing else.
"""

from __future__ import annotations

import sys

#: The first packages of SGLang that any norm is imported through.
WAITED_FOR = ("sglang.srt.layers", "sglang.kernels.ops")


class Waiting:
    """A finder that finds nothing, and registers norm_plugin when SGLang is imported.

    It stays in the list of finders: Python iterates over the list at that moment, and would skip the next finder.
    """

    done = False

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if self.done or fullname not in WAITED_FOR:
            return
        self.done = True
        try:
            from norm_plugin.engines.sglang import register
        except ImportError as error:
            print(
                f"norm_plugin: a flag asks for it and it cannot be imported ({error}), so SGLang's own norms stay. "
                f"Install norm-plugin, or remove {__file__} and the .pth beside it.",
                file=sys.stderr,
            )
            return
        register()


if __name__ == "norm_plugin_autoload":
    sys.meta_path.insert(0, Waiting())
