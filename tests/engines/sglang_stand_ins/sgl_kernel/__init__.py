"""TESTS ONLY. In the place of SGLang's sgl_kernel, of which PyPI has no build for CPUs.

It has the names that SGLang 0.5.23 imports from it on a CPU. Those of speculative decoding raise when they are called;
those of Mamba and the gated delta rule are in plain PyTorch in `mamba.py`. It does not have `convert_weight_packed`, so
SGLang sees a CPU without AMX and its norms are its own PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from . import mamba as mamba

__version__ = "0.0.0+test.stand.in"


def _only_imported(name: str) -> Callable[..., NoReturn]:
    def raises(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} belongs to speculative decoding; this stand-in does not have it.")

    return raises


assign_draft_cache_locs_contiguous_cpu = _only_imported("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _only_imported("assign_extend_cache_locs_cpu")
assign_req_to_token_pool_cpu = _only_imported("assign_req_to_token_pool_cpu")
build_draft_decode_metadata_cpu = _only_imported("build_draft_decode_metadata_cpu")
build_tree_kernel_efficient_cpu = _only_imported("build_tree_kernel_efficient_cpu")
copy_all_layer_kv_cache_cpu = _only_imported("copy_all_layer_kv_cache_cpu")
fill_accept_out_cache_loc_cpu = _only_imported("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _only_imported("fill_bonus_tokens_cpu")
rotate_input_ids_cpu = _only_imported("rotate_input_ids_cpu")
verify_tree_greedy_cpu = _only_imported("verify_tree_greedy_cpu")
