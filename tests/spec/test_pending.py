"""A pending all-reduce, touched in every way that a model could: what is seen is the sum, always.

The part of this rank is NaN here, and the sum is not: whoever sees a part would see NaN.
"""

import copy
import ctypes
import inspect
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from norm_plugin import functions
from norm_plugin.ranks.pending import Pending

SHAPE = (3, 8)


class Once:
    """A pending sum, how often it was reduced, and who wanted it."""

    def __init__(self, dtype=torch.float32, shape=SHAPE, in_place=True):
        dice = torch.Generator().manual_seed(0)
        self.sum = (0.1 + 0.8 * torch.rand(shape, generator=dice)).to(dtype)
        self.part = torch.full(shape, float("nan")).to(dtype)
        self.reduced, self.wanted, self.in_place = 0, [], in_place
        self.pending = Pending(self.part, self.reduce, self.wanted.append)

    def reduce(self, part):
        """As an all-reduce, in place or not."""
        self.reduced += 1
        return part.copy_(self.sum) if self.in_place else self.sum.clone()


def inplace(name, *args):
    def use(t):
        getattr(t, name)(*args)
        return t

    return use


def written_by_operator(t):
    t += 1
    t[0] = 5
    t[1, 2:4] *= 2
    return t


def through_a_file(t):
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file)


def through_memory(t):
    return list((ctypes.c_float * t.numel()).from_address(t.data_ptr()))


def into_out(t):
    torch.add(torch.ones(SHAPE), 1, out=t)
    return t


def in_another_thread(t):
    seen = []
    inference = torch.is_inference_mode_enabled()  # each thread has its own

    def use():
        with torch.inference_mode(inference):
            seen.append(t + 1)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return seen[0]


@torch.library.custom_op("pending_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("pending_test::double", mutates_args=("x",))
def double(x: Tensor) -> None:
    x.mul_(2)


def doubled(t):
    torch.ops.pending_test.double(t)
    return t


def without_torch_functions(t):
    with torch._C.DisableTorchFunctionSubclass():
        return t * 2


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


W = torch.eye(8) * 2

USES = {
    "add": lambda t: t + 1,
    "added to": lambda t: torch.ones(SHAPE) + t,
    "added into": lambda t: torch.zeros(SHAPE).add_(t),
    "copied into": lambda t: torch.zeros(SHAPE).copy_(t),
    "set item of another": lambda t: torch.zeros(2, *SHAPE).index_put_((torch.tensor(1),), t),
    "index": lambda t: t[1:, ::2],
    "mask": lambda t: t[t > 0.5],
    "indexed by": lambda t: torch.arange(9)[(9 * t).long()],
    "ellipsis": lambda t: t[..., :4],
    "iterate": lambda t: [row.sum() for row in t],
    "unpack": lambda t: [*t],
    "length": len,
    "contains": lambda t: 1.0 in t,
    "truth": lambda t: bool(t[0, 0] > 0),
    "item": lambda t: t.sum().item(),
    "item of one": lambda t: t[:1, :1].item(),
    "float": lambda t: float(t.max()),
    "repr": repr,
    "str": str,
    "format": lambda t: f"{t} {t.sum():.3f}",
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "asarray": lambda t: np.asarray(t),
    "numpy's function": lambda t: np.add(np.ones(SHAPE, np.float32), t.numpy()),
    "compare": lambda t: t == t,
    "equal": lambda t: torch.equal(t, t.clone()),
    "matmul": lambda t: t @ W,
    "linear": lambda t: torch.nn.functional.linear(t, W),
    "module": lambda t: torch.nn.LayerNorm(8)(t).detach(),
    "norm": lambda t: functions.rmsnorm(t, torch.ones(8)),
    "norm with a residual": lambda t: functions.add_rmsnorm(torch.ones(SHAPE), t, torch.ones(8)),
    "norm in place": lambda t: (functions.fused_add_rmsnorm(t, torch.ones(SHAPE), torch.ones(8)), t + 0)[1],
    "cat": lambda t: torch.cat([t, t]),
    "stack": lambda t: torch.stack((t, t)),
    "where": lambda t: torch.where(t > 0.5, t, 0),
    "einsum": lambda t: torch.einsum("ij,jk->ik", t, W),
    "split": lambda t: t.split(4, dim=-1),
    "chunk": lambda t: t.chunk(2),
    "view": lambda t: t.view(-1),
    "view of another dtype": lambda t: t.view(torch.int32),
    "view of its shape": lambda t: t.view(SHAPE) + 0,
    "reshape to its shape": lambda t: t.reshape(*SHAPE) + 0,
    "a view that is written": lambda t: (t.view(-1).mul_(2), t.clone())[1],
    "as_strided": lambda t: t.as_strided((2, 2), (8, 1)),
    "transpose": lambda t: t.T.contiguous(),
    "expand": lambda t: t.expand(2, *SHAPE),
    "contiguous": lambda t: t.contiguous(),
    "detach": lambda t: t.detach(),
    "data": lambda t: t.data,
    "to": lambda t: t.to(torch.bfloat16),
    "cpu": lambda t: t.cpu(),
    "clone": lambda t: t.clone(),
    "empty_like": lambda t: torch.empty_like(t).shape,
    "like": lambda t: torch.zeros_like(t),
    "new": lambda t: t.new_ones(3),
    "stride": lambda t: t.stride(),
    "strides": lambda t: t.is_contiguous(),
    "version": lambda t: t._version >= 0,
    "address": through_memory,
    "storage": lambda t: t.untyped_storage().nbytes(),
    "bytes of the storage": lambda t: bytes(t.untyped_storage()),
    "dlpack": lambda t: torch.from_dlpack(t),
    "numpy's dlpack": lambda t: np.from_dlpack(t),
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "save": through_a_file,
    "share": lambda t: t.share_memory_(),
    "in place": written_by_operator,
    "mul_": inplace("mul_", 2),
    "zero_": inplace("zero_"),
    "fill_": inplace("fill_", 3),
    "clamp_": inplace("clamp_", 0.2, 0.5),
    "copy_ to it": inplace("copy_", torch.ones(SHAPE)),
    "set item": inplace("__setitem__", 0, 7.0),
    "resize_": inplace("resize_", 2, 4),
    "set_": inplace("set_", torch.ones(2)),
    "out": into_out,
    "custom op": torch.ops.pending_test.twice,
    "custom op that writes": doubled,
    "aten": lambda t: torch.ops.aten.add.Tensor(t, 1),
    "without torch functions": without_torch_functions,
    "foreach": lambda t: torch._foreach_add([t, t.clone()], 1),
    "another thread": in_another_thread,
    "vmap": lambda t: torch.func.vmap(lambda row: row * 2)(t),
    "grad of func": lambda t: torch.func.grad(lambda x: (x * x).sum())(t),
    "jvp": lambda t: torch.func.jvp(lambda x: x * x, (t,), (torch.ones(SHAPE),)),
    "functional call": lambda t: torch.func.functional_call(torch.nn.Linear(8, 8, bias=False), {"weight": W}, t),
    "autograd": lambda t: torch.autograd.grad((t.requires_grad_() * 3).sum(), t)[0],
    "autograd function": Doubling.apply,
    "compile": lambda t: torch.compile(lambda x: x * 2 + 1, backend="eager")(t),
    "nested in arguments": lambda t: torch.block_diag(*[t, t]),
    "histogram": lambda t: torch.histc(t, 4),
    "random": lambda t: torch.bernoulli(t, generator=torch.Generator().manual_seed(1)),
    "twice": lambda t: (t + 1, t * 2),
}  # fmt: skip


def values(result):
    return [leaf.resolve_conj() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(result)]


def assert_same(ours, theirs):
    ours, theirs = values(ours), values(theirs)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one + 0, other + 0, rtol=0, atol=0)
        elif isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other


#: Inference mode records nothing.
RECORDED = {"grad of func", "jvp", "autograd", "version", "functional call"}


@pytest.mark.parametrize(
    ("name", "inference"), [(name, inference) for name in USES for inference in {False, name not in RECORDED}]
)
def test_every_use_sees_the_sum(name, inference):
    with torch.inference_mode(inference):
        once = Once(in_place=name != "jvp")  # torch forbids the other there, loudly
        theirs = USES[name](once.sum.clone())
        assert_same(USES[name](once.pending), theirs)
    assert once.reduced == 1
    assert len(once.wanted) == 1
    assert once.wanted[0]


#: Methods and attributes that need no argument, but whose answer is another one for each tensor or is drawn.
DRAWN = {
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_",
    "data_ptr", "const_data_ptr", "_cdata", "_python_dispatch", "storage",
    "_storage", "_typed_storage", "untyped_storage", "is_set_to", "multinomial", "rrelu",
    "rrelu_", "pin_memory", "cuda", "xpu", "mtia", "ipu", "hpu", "backward", "module_load",
}  # fmt: skip


def methods():
    for name in dir(Tensor):
        if (name.startswith("__") and name.endswith("__")) or name in DRAWN:
            continue
        yield name


@pytest.mark.parametrize("name", methods())
def test_every_attribute_and_method_without_arguments(name):
    once = Once()

    def use(t):
        found = getattr(t, name)
        return found() if callable(found) else found

    try:
        theirs = use(once.sum.clone())
    except Exception as error:  # it needs an argument, or another tensor
        with pytest.raises(type(error)):
            use(once.pending)
        assert not once.wanted or once.reduced == 1
        return
    ours = use(once.pending)
    assert once.reduced == once.pending.done
    if all(isinstance(leaf, (Tensor, int, float, str, torch.dtype)) for leaf in tree_leaves(theirs)):
        for one, other in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
            if isinstance(other, Tensor) and not other.is_sparse and other.layout is torch.strided:
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, check_stride=True)
            elif not isinstance(other, Tensor) and name != "_version":
                assert one == other


def test_the_shape_needs_no_sum():
    once = Once(torch.bfloat16)
    x = once.pending
    assert (x.shape, x.size(), x.size(-1), x.dim(), x.ndim, x.numel()) == (SHAPE, SHAPE, 8, 2, 2, 24)
    assert (x.dtype, x.device, x.is_cuda, isinstance(x, Tensor)) == (torch.bfloat16, torch.device("cpu"), False, True)
    assert x.view(SHAPE) is x.view(*SHAPE) is x.reshape(x.shape) is x
    assert (x.done, once.reduced, once.wanted) == (False, 0, [])


@pytest.mark.parametrize("change", ["t_", "resize_", "unsqueeze_", "set_"])
def test_the_shape_that_an_operation_in_place_gives_it(change):
    once = Once()
    like = once.sum.clone()
    arguments = {"resize_": (2, 4), "unsqueeze_": (0,)}.get(change, ())
    getattr(like, change)(*arguments)
    getattr(once.pending, change)(*arguments)
    assert once.pending.shape == like.shape
    assert torch.equal(once.pending + 0, like)


def test_memory_of_its_own():
    """Code that asks past torch finds no memory at all, least of all the part's."""
    with torch._C.DisableTorchFunctionSubclass():
        assert Once().pending.data_ptr() == 0


def test_what_is_dropped_is_never_reduced():
    once = Once()
    once.pending = None
    assert once.reduced == 0


def test_the_second_use_sees_what_the_first_wrote():
    once = Once()
    x = once.pending
    x.add_(1)
    x.view(-1)[0] = 9
    expected = once.sum + 1
    expected[0, 0] = 9
    assert torch.equal(x + 0, expected)
    assert once.reduced == 1


def test_a_norm_that_took_the_part_leaves_it_for_the_next_use():
    once = Once()
    before = once.part
    taken = once.pending.part  # what a norm reads
    assert taken is before
    assert torch.equal(once.pending + 0, once.sum)
    assert once.reduced == 1


def test_a_part_that_others_share_is_not_written():
    once = Once()
    once.pending.shared = True
    assert torch.equal(once.pending + 0, once.sum)
    assert once.part.isnan().all()


def test_many_threads_reduce_once():
    once = Once()
    barrier = threading.Barrier(8)
    seen = []

    def use():
        barrier.wait()
        seen.append(once.pending * 1)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert once.reduced == 1
    assert all(torch.equal(one, once.sum) for one in seen)


def test_two_that_are_pending_meet():
    one, other = Once(), Once()
    assert torch.equal(one.pending + other.pending, one.sum + other.sum)
    assert (one.reduced, other.reduced) == (1, 1)


def test_who_wanted_it():
    once = Once()
    once.pending.T  # noqa: B018
    other = Once()
    torch.ops.pending_test.twice(other.pending)
    assert (once.wanted, other.wanted) == (["torch.Tensor.T"], ["pending_test.twice"])


def test_an_error_of_the_all_reduce_is_the_users():
    def fails(part):
        raise RuntimeError("a rank has gone")

    x = Pending(torch.ones(SHAPE), fails, lambda by: None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a rank has gone"):
            x + 1


def test_no_name_hides_one_of_torchs():
    ours = {*vars(Pending), *inspect.get_annotations(Pending)}
    assert not [name for name in ours if hasattr(Tensor, name) and not name.startswith("__")]
