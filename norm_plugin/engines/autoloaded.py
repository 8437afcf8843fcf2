"""What `norm-plugin autoload on` copies beside the .pth that imports it, in every Python process where a flag asks.

It waits for SGLang's layers and registers norm_plugin there. It imports nothing: the process may be anybody's. It stays
behind when norm_plugin is uninstalled: then it says so in one line, once SGLang is imported, and does nothing.
"""

from __future__ import annotations

import sys

#: The first packages of SGLang that any norm is imported through.
WAITED_FOR = ("sglang.srt.layers", "sglang.kernels.ops")


class Waiting:
    """A finder that finds nothing, and does its one thing when SGLang comes.

    It stays where it is: Python walks through the list of finders at this moment, and would leave out the next one.
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
