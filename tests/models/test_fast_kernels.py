"""The vocabulary head, attention and linear layers of the fast path, against those of torch."""

import ctypes
import platform
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xpo_lightning.models.forward import cpu as cpu_module
from xpo_lightning.models.forward import lm_head as head_module
from xpo_lightning.models.forward.cpu import (
    OneDNNLinear,
    keep_memory,
    limit_threads,
    prefers_onednn,
    speed_up_linears,
    threads_allowed,
)
from xpo_lightning.models.forward.cpu_attention import attention, fast_attention, for_any_shape
from xpo_lightning.models.forward.lm_head import head_logps

CPU = torch.device("cpu")


# ---- the vocabulary head ----


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("chunk", "kept"), [(2**23, 2**26), (90, 2**26), (90, 200)], ids=["whole", "chunks", "again"])
def test_head_logps_and_gradients_equal_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, bias: bool, frozen: bool, chunk: int, kept: int
):
    monkeypatch.setattr(head_module, "CHUNK", {"cpu": chunk})
    monkeypatch.setattr(head_module, "KEPT", kept)
    head = nn.Linear(6, 30, bias=bias).requires_grad_(not frozen)
    hidden, targets = torch.randn(11, 6, requires_grad=True), torch.randint(30, (11,))
    upstream = torch.randn(11)
    ours = head_logps(hidden, head, targets)
    naive = head(hidden).log_softmax(-1)[range(11), targets]
    torch.testing.assert_close(ours, naive)
    inputs = [hidden, *(() if frozen else head.parameters())]
    for one, other in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(naive, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_logits_far_from_0_neither_overflow_nor_lose_a_token():
    """log softmax of (1000, 0) is (0, -1000); of (-1000, -1000) it is -log 2 twice."""
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = torch.tensor([[1000.0, -1000.0], [0.0, -1000.0]])
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    logps = head_logps(hidden, head, torch.tensor([0, 1, 1]))
    assert logps.tolist() == pytest.approx([0.0, -1000.0, -0.693147], abs=1e-6)


# ---- attention and linear layers on a CPU ----


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("heads", [2, 6], ids=["as_many_key_heads", "grouped"])
def test_attention_equals_torchs_own(masked: bool, heads: int):
    """200 queries are four blocks. In bfloat16 against float32: 3 decimals are all that the type holds."""
    query, key = torch.randn(2, heads, 200, 8), torch.randn(2, 2, 200, 8)
    value = torch.randn(2, 2, 200, 8)
    tensors = [tensor.bfloat16().requires_grad_() for tensor in (query, key, value)]
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    mask = torch.rand(2, 1, 200, 200) < 0.7 if masked else None
    ours = attention(*tensors, mask, 0.3)
    theirs = nn.functional.scaled_dot_product_attention(
        *exact, attn_mask=mask, is_causal=not masked, scale=0.3, enable_gqa=True
    )
    upstream = torch.randn_like(theirs)
    torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.02)
    for one, other in zip(
        torch.autograd.grad(ours, tensors, upstream.bfloat16()),
        torch.autograd.grad(theirs, exact, upstream),
        strict=True,
    ):
        assert (one.float() - other).norm() < 0.01 * other.norm()


def test_a_query_that_sees_nothing_does_not_spoil_the_others():
    query = key = value = torch.randn(1, 1, 4, 8).bfloat16()
    mask = torch.tensor([[False] * 4, [True, False, False, False], [True] * 4, [True] * 4])[None, None]
    out = attention(query, key, value, mask, 1.0)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0, 0, 1], value[0, 0, 0])


def test_somebody_elses_attention_is_left_in_its_place():
    theirs = lambda *_, **__: None  # noqa: E731
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with fast_attention(CPU), fast_attention(CPU):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not own
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    try:
        with fast_attention(CPU):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own


@pytest.mark.skipif(not prefers_onednn(), reason="this processor multiplies float32 matrices with MKL")
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 9), (9, 5)])
def test_onednn_linear_equals_torchs(inputs: int, outputs: int):
    plain = nn.Linear(inputs, outputs)
    swapped = nn.Sequential(nn.Linear(inputs, outputs))
    swapped[0].load_state_dict(plain.state_dict())
    speed_up_linears(swapped)
    assert type(swapped[0]) is OneDNNLinear
    x = torch.randn(2, 7, inputs, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    upstream = torch.randn(2, 7, outputs)
    plain(x).backward(upstream)
    swapped(y).backward(upstream)
    torch.testing.assert_close(swapped(y), plain(x))
    for one, other in (
        (y.grad, x.grad),
        (swapped[0].weight.grad, plain.weight.grad),
        (swapped[0].bias.grad, plain.bias.grad),
    ):
        torch.testing.assert_close(one, other)


def test_freed_memory_stays_with_glibc():
    assert keep_memory() == (platform.libc_ver()[0] == "glibc")
    blocks = [torch.zeros(2**22) for _ in range(4)]
    del blocks
    assert torch.zeros(2**22).sum() == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not count its heap")
def test_code_of_products_that_are_not_repeated_is_not_kept():
    """oneDNN keeps 0.6 MB for each shape of a product, of 1,024 shapes by default: here 350 MB of 600."""
    code = """
        import ctypes, torch
        from xpo_lightning.models.forward.cpu import keep_memory
        keep_memory()

        class Heap(ctypes.Structure):
            names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
            _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = Heap
        weight = torch.ones(64, 64, dtype=torch.bfloat16)
        before = libc.mallinfo2().uordblks
        for rows in range(1, 601):
            torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
        print((libc.mallinfo2().uordblks - before) / 1e6)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(result.stdout) < 250


@pytest.mark.parametrize("set_by_user", [False, True])
def test_threads_are_limited_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch, set_by_user: bool):
    asked: list[int] = []
    monkeypatch.setattr(cpu_module, "threads_allowed", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
    limit_threads()
    assert asked == ([] if set_by_user else [3])


@pytest.mark.parametrize(
    ("text", "threads"), [("max 100000", None), ("150000 100000", 2), ("20000 100000", 1), ("nonsense", None)]
)
def test_threads_stay_within_the_containers_share(tmp_path: Any, text: str, threads: int | None):
    file = tmp_path / "cpu.max"
    file.write_text(text)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert threads_allowed(file) == (threads or 4)
        assert threads_allowed(tmp_path / "missing") == 4
    finally:
        torch.set_num_threads(before)


def test_attention_that_plans_for_each_shape_is_left_out_and_comes_back():
    device, before = torch.device("cuda"), torch.backends.cuda.cudnn_sdp_enabled()
    for was in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(was)
        with for_any_shape(device):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() is was
    torch.backends.cuda.enable_cudnn_sdp(before)
