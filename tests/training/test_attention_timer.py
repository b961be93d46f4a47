from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from scatterbrain.training.attention_timer import AttentionTimer, TimedAttention, now

PAUSE = 0.03


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(PAUSE)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * PAUSE)
        return gradient


class SlowAttention(nn.Module):
    def forward(self, query, key, value, is_causal):
        return _Sleep.apply(query + key + value)


def test_the_timer_counts_the_attention_forward_and_backward_and_nothing_else():
    timer = AttentionTimer()
    x = torch.randn(1, 1, 4, 2, requires_grad=True)
    before = _Sleep.apply(x)
    output = TimedAttention(SlowAttention(), timer)(before, before, before, is_causal=True)
    assert PAUSE <= timer.seconds < 2 * PAUSE
    _Sleep.apply(output).sum().backward()
    assert 3 * PAUSE <= timer.seconds < 5 * PAUSE


def test_the_timed_module_changes_neither_output_nor_gradient():
    query, key, value = torch.randn(3, 1, 1, 4, 2).unbind()
    query.requires_grad_()
    timed = TimedAttention(SlowAttention(), AttentionTimer())(query, key, value, is_causal=True)
    timed.sum().backward()
    assert torch.equal(timed, query + key + value) and torch.equal(query.grad, torch.ones_like(query))


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(PAUSE))
    started = time.perf_counter()
    assert now(torch.device("cuda")) - started >= PAUSE
    started = time.perf_counter()
    assert now(torch.device("cpu")) - started < PAUSE
