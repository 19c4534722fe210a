"""The trainer's step on a CUDA device that is not there, over tensors without data; tests/fake_cuda.cpp must be preloaded.

Arguments: configurations, JSON objects of Train's keys and "S". Prints for each, as a JSON object: GiB that tensors held at
most and GiB planned, kernels, and operators that wait for the device. Operators count, not what they do inside.
"""

import json
import sys
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peagle_train.core import flex
from peagle_train.memory import GIB
from tools.gpu_parts import DRAFTER_8B, Check, Stepper, planned_gib

LENGTH = 8192
ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "device")
LIBRARY = torch.library.Library("aten", "IMPL")


def pretend() -> None:
    """Answer in the place of torch.cuda."""
    answers = {"is_available": True, "is_bf16_supported": True, "is_current_stream_capturing": False}
    answers |= {"current_device": 0, "set_device": None, "_lazy_init": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    fake_tensor.init_gpu_context = lambda device: None
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[assignment, method-assign]
    if torch.version.cuda is None:
        # Autograd takes an operator apart where a build has no kernel of it. No fake tensor runs one.
        for name in ("_fused_rms_norm", "_fused_rms_norm_backward", "silu_backward"):
            LIBRARY.impl(name, lambda *_: NotImplemented, "CUDA")


class FakeTensors(fake_tensor.FakeTensorMode):
    avoid_device_init = property(lambda self: True)


class Meter(TorchDispatchMode):
    """Sees every operator. Those on the host's own tensors run with their values, outside of `FakeTensors`."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.waits = Counter[str](), Counter[str]()
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    def reset(self) -> None:
        self.peak = self.now
        self.kernels.clear()
        self.waits.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        is_fake = any(isinstance(t, fake_tensor.FakeTensor) for t in inputs)
        if not is_fake and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with fake_tensor.unset_fake_temporarily():
                return function(*args, **kwargs)
        output = function(*args, **kwargs)
        name = function._overloadpacket.__name__
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        devices = {t.device.type for t in [*inputs, *outputs] if t.is_cuda or t.dim()}  # numbers come along as they are
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if "cuda" in devices and not is_view and name not in ALLOCATE:
            self.kernels[name] += 1
        is_copy = len(devices) > 1 and not kwargs.get("non_blocking") and not any(a is True for a in args)
        if is_copy or name in ("_local_scalar_dense", "nonzero"):
            self.waits[name] += 1
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
        """In place of flex attention, which would be compiled: what it allocates, and its three kernels."""
        kernels = self.kernels

        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                kernels["flex"] += 1
                B, H, Q, D = inputs[0].shape
                out = inputs[0].new_empty(B, Q, H, D).transpose(1, 2)
                log_sum_exp, _ = inputs[0].new_empty(2, B, H, Q, dtype=torch.float32)
                ctx.save_for_backward(*inputs, out, log_sum_exp)
                return out

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Any:
                kernels["flex"] += 2
                *inputs, _, log_sum_exp = ctx.saved_tensors
                _ = torch.empty_like(log_sum_exp)
                return tuple(map(torch.empty_like, inputs))

        return Attention.apply(query, key, value)


def measure(S: int, **train: Any) -> dict[str, Any]:
    check, meter = Check(), Meter()
    flex.flex = meter.flex
    with FakeTensors(allow_non_fake_inputs=True), meter:
        stepper = Stepper(check, DRAFTER_8B, LENGTH, S, **train)
        batch = stepper.batch()
        for parameter in stepper.trained:
            parameter.grad = torch.empty_like(parameter)
        stepper.update()  # makes the optimizer's states
        meter.reset()
        stepper.step(*[batch] * stepper.recipe.train.gradient_accumulation_steps)
    planned = planned_gib(check, DRAFTER_8B, stepper.recipe)
    kernels, waits = meter.kernels.total(), dict(meter.waits)
    return {"peak": meter.peak / GIB, "planned": planned, "kernels": kernels, "waits": waits}


if __name__ == "__main__":
    pretend()
    for configuration in sys.argv[1:]:
        print(json.dumps(measure(**json.loads(configuration))), flush=True)
