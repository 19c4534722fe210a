"""The trainer's step on a CUDA device that is not there, over tensors without data; tests/fake_cuda.cpp must be preloaded.

Arguments: configurations, JSON objects of `CompiledDraft`'s arguments, "measure", and those of `measure`'s. Prints what
is returned for each. Operators count, not what they do inside.
"""

import json
import sys
import weakref
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

from peagle_train.core import flex
from peagle_train.core.compiled import CompiledDraft
from peagle_train.machine import GIB
from tools.gpu_parts import DRAFTER_8B, NARROW, Check, Stepper, planned_gib

WAITS = Counter[str]()
"""Of the host for the device, by operator."""
ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "device")
LIBRARY = torch.library.Library("aten", "IMPL")


class Stream:
    def synchronize(self) -> None:
        WAITS["synchronize"] += 1


def pretend() -> None:
    """Answer in the place of torch.cuda."""
    answers: dict[str, Any] = dict.fromkeys(("set_device", "set_rng_state", "_lazy_init"))
    answers |= {"is_available": True, "is_bf16_supported": True, "is_current_stream_capturing": False}
    answers |= {
        "current_stream": Stream(),
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_rng_state": torch.zeros(1),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.utils._triton.has_triton_package = lambda: False
    fake_tensor.init_gpu_context = lambda device: None
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[assignment, method-assign]
    if torch.version.cuda is None:
        # Autograd takes an operator apart where a build has no kernel of it. No fake tensor runs one.
        for name in ("_fused_rms_norm", "_fused_rms_norm_backward", "silu_backward"):
            LIBRARY.impl(name, lambda *_: NotImplemented, "CUDA")


class Meter(TorchDispatchMode):
    """Sees every operator. Those on the host's own tensors run with their values, outside of a FakeTensorMode."""

    supports_higher_order_operators = True  # flex attention's, in compiled passes

    def __init__(self) -> None:
        super().__init__()
        self.kernels = Counter[str]()
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    def reset(self) -> None:
        self.peak = self.now
        self.kernels.clear()
        WAITS.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        is_fake = any(isinstance(t, FakeTensor) for t in inputs)
        if isinstance(function, HigherOrderOperator):
            return function(*args, **kwargs)
        if not is_fake and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with fake_tensor.unset_fake_temporarily():
                return function(*args, **kwargs)
        output = function(*args, **kwargs)
        name = function._overloadpacket.__name__
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        copies = name in ("_to_copy", "copy_")  # elsewhere numbers on the host come along as they are
        devices = {t.device.type for t in [*inputs, *outputs] if t.is_cuda or t.dim() or copies}
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if "cuda" in devices and not is_view and name not in ALLOCATE:
            self.kernels[name] += 1
        is_copy = len(devices) > 1 and not kwargs.get("non_blocking") and not (name == "copy_" and args[2:3] == (True,))
        if (is_copy and name not in ALLOCATE) or name in ("_local_scalar_dense", "nonzero"):
            WAITS[name] += 1
        for tensor in outputs:
            if tensor.is_cuda:
                self.hold(tensor.untyped_storage())
        return output

    def hold(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.held:
            self.held[key] = -(-storage.nbytes() // 512) * 512  # as CUDA's allocator rounds
            self.now += self.held[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.held.pop(key)

    def flex(self, query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
        """In place of flex attention, which would be compiled: three kernels, and what Inductor's code for sm_90 makes."""
        kernels = self.kernels

        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                kernels["flex"] += 1
                B, H, Q, D = inputs[0].shape
                out = inputs[0].new_empty(B, Q, H, D).transpose(1, 2)
                log_sum_exp, _ = (inputs[0].new_empty(B, H, Q, dtype=torch.float32) for _ in range(2))
                ctx.save_for_backward(*inputs, out, log_sum_exp)
                return out

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Any:
                kernels["flex"] += 2
                *inputs, _, log_sum_exp = ctx.saved_tensors
                _ = torch.empty_like(log_sum_exp)  # the sums of out * gradient
                return tuple(map(torch.empty_like, inputs))

        return Attention.apply(query, key, value)


def measure(S: int, length: int = 8192, narrow: bool = False, **train: Any) -> dict[str, Any]:
    """A step's kernels, operators that wait for the device, and bytes: at most held and planned, and held between steps."""
    check, meter, shape = Check(), Meter(), NARROW if narrow else DRAFTER_8B
    flex.flex = meter.flex
    with FakeTensorMode(allow_non_fake_inputs=True), meter:
        stepper = Stepper(check, shape, length, S, **train)
        batch = stepper.batch()
        for parameter in stepper.trained:
            parameter.grad = torch.empty_like(parameter)
        stepper.update()  # makes the optimizer's states
        meter.reset()
        resident = meter.now
        stepper.step(*[batch] * stepper.recipe.train.gradient_accumulation_steps)
    planned = planned_gib(check, shape, stepper.recipe) * GIB
    found = {"peak": meter.peak, "planned": planned, "resident": resident}
    return {**found, "kernels": meter.kernels.total(), "waits": dict(WAITS)}


def compile_passes(length: int, S: int, layers: int = 1, **train: Any) -> Any:
    """Graphs made, and made again, by a step and an evaluation."""
    torch._dynamo.reset()
    call = CompiledDraft.__call__

    def without_meter(*arguments: Any, **named: Any) -> Any:
        with _pop_mode_temporarily():  # nothing is compiled inside of one
            return call(*arguments, **named)

    with FakeTensorMode(allow_non_fake_inputs=True), Meter(), patch.object(CompiledDraft, "__call__", without_meter):
        shape = {**DRAFTER_8B, "num_hidden_layers": layers}
        train = {"compile_backend": "eager", "loss_chunk_rows": 2**20, **train}  # chunks are unrolled
        stepper = Stepper(Check(), shape, length, S, compile=True, **train)
        batch = stepper.batch()
        plan = stepper.runner.plan(batch)
        stepper.accumulate(batch)
        with torch.no_grad():
            stepper.runner.run(batch, plan, None)
    graphs = stepper.runner.graphs
    return {**graphs, "recompiles": graphs.recompiles}


if __name__ == "__main__":
    pretend()
    function = compile_passes
    for argument in sys.argv[1:]:
        if argument == "measure":
            function = measure
        else:
            print(json.dumps(function(**json.loads(argument))), flush=True)
