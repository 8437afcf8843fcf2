"""What `norm-plugin autoload on` copies beside the .pth that imports it, in every Python process where a flag is set.

It waits for SGLang's layers and registers norm_plugin there. It imports nothing: the process may be anybody's.
"""

from __future__ import annotations

import sys

#: The first packages of SGLang that any norm is imported through.
WAITED_FOR = ("sglang.srt.layers", "sglang.kernels.ops")


class Waiting:
    """A finder that finds nothing, and leaves when SGLang comes."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname in WAITED_FOR:
            sys.meta_path.remove(self)
            from norm_plugin.engines.sglang import register

            register()


if __name__ == "norm_plugin_autoload":
    sys.meta_path.insert(0, Waiting())
