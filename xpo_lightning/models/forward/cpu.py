"""Speeds up steps on a CPU: keeps memory, limits threads, and multiplies matrices with the faster library."""

import ctypes
import functools
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names and numbers of glibc's malloc.h
_CACHES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"  # oneDNN's, and PyTorch's own of the same
_MADV_HUGEPAGE, _HUGE = 14, 2**21  # of Linux's mman.h, and the size of a huge page

PRODUCTS_KEPT = 128
"""Most shapes of products for which oneDNN keeps the code that it has generated, 0.6 MB each, in place of 1,024."""


@functools.cache
def keep_memory() -> bool:
    """Have glibc keep freed memory in the process, and take memory from the system in huge pages.

    Otherwise each allocation of a vocabulary-sized tensor maps its memory anew, page by page, which takes longer than
    the arithmetic on it. Have oneDNN keep less of the code that it generates, too, unless the user has said how much.

    Returns:
        Whether the C library accepted these settings; False for any other than glibc.
    """
    for name in _CACHES:
        os.environ.setdefault(name, str(PRODUCTS_KEPT))  # They are read when the first matrices are multiplied.
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        return False
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Allocate a block and free it untouched: the heap has grown by it, and its pages will be huge when used.
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    block = libc.malloc(size)
    if block:
        start = -(-block // _HUGE) * _HUGE
        libc.madvise(start, (block + size - start) // _HUGE * _HUGE, _MADV_HUGEPAGE)
        libc.free(block)
    return True


def give_memory_back() -> None:
    """Give memory that has been freed back to the system, though `keep_memory` keeps what is freed later."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(ctypes.c_size_t(0))


def threads_allowed(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many threads are worth running: a container's CPU quota may be less than its machine's cores.

    Args:
        quota: The control group's file: microseconds of CPU time per period, or `max`, and the period.
    """
    threads = torch.get_num_threads()
    try:
        time, period = quota.read_text().split()
        return threads if time == "max" else max(1, min(threads, round(int(time) / int(period))))
    except (OSError, ValueError):
        return threads


def limit_threads() -> None:
    """Limit torch to `threads_allowed` threads, unless the user has set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_allowed())


@functools.cache
def prefers_onednn() -> bool:
    """Tell whether oneDNN multiplies float32 matrices faster here than MKL, torch's own choice.

    On AMD's processors MKL leaves AVX-512 unused, which halves its rate.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def reads_bfloat16(tensor: Tensor) -> bool:
    """Tell whether a CPU multiplies this tensor, such as keys, by few rows in bfloat16 as fast as it reads it.

    Measured on AMD's processors alone, which have instructions for bfloat16 wherever they have AVX-512.
    """
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and prefers_onednn()


def speed_up_linears(*models: nn.Module) -> None:
    """Let the linear layers of models multiply with oneDNN where that is the faster library.

    Results change by the order of summation alone. Weights, names and everything else stay as they are.
    """
    if prefers_onednn():
        for module in chain.from_iterable(model.modules() for model in models):
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear


class OneDNNLinear(nn.Linear):
    """A linear layer that multiplies float32 matrices with oneDNN on the CPU, and is `nn.Linear` elsewhere."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """See `nn.Linear`."""
        if takes_onednn(input, self.weight):
            if not torch.is_grad_enabled():
                return _onednn(input, self.weight, self.bias)
            product: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return product
        return super().forward(input)


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Tell whether oneDNN is the faster library for this product: of float32 matrices, on a CPU, without autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0  # oneDNN cannot multiply no rows.
        and not torch.is_autocast_enabled("cpu")
        and prefers_onednn()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply as `torch.nn.functional.linear` does, without gradient, with the faster library.

    Args:
        x: (..., I)
        weight: (O, I), contiguous or transposed.
        bias: (O,)

    Returns:
        x @ weight.T + bias. (..., O)
    """
    if takes_onednn(x, weight):
        return _onednn(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def products_summed(left: Tensor, right: Tensor) -> Tensor:
    """Sum the outer products of rows, as for a weight's gradient, with the faster library.

    Args:
        left: (N, O)
        right: (N, I)

    Returns:
        left.T @ right, in whichever memory order is the faster. (O, I)
    """
    if not takes_onednn(left, right):
        return left.t() @ right
    # oneDNN is fast if the output has at least as many columns as rows.
    return _onednn(right.t(), left.t()).t() if left.shape[1] > right.shape[1] else _onednn(left.t(), right.t())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        product = _onednn(x.reshape(-1, x.shape[-1]), weight, bias)
        # Autograd forbids in-place changes, which some models make (`clamp_`), to a view that a custom function
        # returns. So reshape as `torch.nn.functional.linear` does: nothing else holds `product`, and autograd sees no
        # view.
        return torch.ops.aten._unsafe_view(product, [*x.shape[:-1], weight.shape[0]])  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad
        grad = grads[0].reshape(-1, weight.shape[0])
        rows = x.reshape(-1, weight.shape[1])
        return (
            _onednn(grad, weight.t()).view(x.shape) if wants_input else None,
            products_summed(grad, rows) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )
