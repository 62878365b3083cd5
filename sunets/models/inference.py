"""Faster inference with what PyTorch brings along: folded BatchNorm, channels_last, bfloat16, torch.compile."""

from __future__ import annotations

import copy
import operator
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sunets.models.sunet import check_input

TIMED_ROUNDS = 5
"""Rounds in which the compiled and the eager network are timed in turn."""
COMPILED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of the compiled network's logits, relative to the largest logit."""


class InferenceModel(nn.Module):
    """A network made ready for inference by `optimize_for_inference`.

    Maps images (B,C,H,W) of any size and type to float32 logits without a gradient. The compiled code is for the shape
    of the example; other shapes take the eager network, so that none of them starts a compilation.
    """

    report: dict[str, Any]
    """What was done: folded_norms, remaining_norms, compiled, reason (why not compiled), eager_ms, compiled_ms."""

    def __init__(self, eager: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.eager = eager
        self.dtype = dtype
        self.report = {}
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._shape: torch.Size | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B,num_classes,H,W) or (B,num_classes), float32."""
        # The same modes as while compiling, whatever the caller's: others would compile again.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.to(self.dtype, memory_format=torch.channels_last)
            network = self._compiled if self._compiled is not None and x.shape == self._shape else self.eager
            return network(x).float()


def optimize_for_inference(
    model: nn.Module,
    example_input: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    compile: bool | Literal["auto"] = "auto",
) -> InferenceModel:
    """A copy of a network that computes the same logits in less time.

    BatchNorm directly behind a convolution that nothing else reads is folded into it; pre-activated norms behind a sum
    or a concatenation stay. Weights and activations are channels_last. torch.compile with frozen weights fuses the rest
    and lays the weights out for the processor; it takes half a minute and a C++ compiler.

    Args:
        model: network; stays as it is.
        example_input: images (B,C,H,W) of the shape that is to be fast, on the network's device.
        dtype: float32 (the same logits to 1e-4), or bfloat16, in which convolutions compute while norms keep float32.
        compile: False; True; or auto: where it works, gives the same logits, and measures faster on the example.

    Returns:
        The network in evaluation mode; its `report` says what was done.

    Raises:
        ValueError: a dtype other than these, or compile=True where compiling fails or changes the logits.
    """
    if dtype not in COMPILED_TOLERANCE:
        raise ValueError(f"dtype: float32 or bfloat16, not {str(dtype).removeprefix('torch.')}")
    network, folded = fold_norms(model)
    for module in network.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    optimized = InferenceModel(network.to(memory_format=torch.channels_last), dtype).eval()
    remaining = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    optimized.report = {"folded_norms": folded, "remaining_norms": remaining, "compiled": False, "reason": None}
    if compile is False:
        optimized.report["reason"] = "not asked for"
        return optimized
    reason = _compile(optimized, example_input, keep_slower=compile is True)
    if compile is True and reason is not None:
        raise ValueError(f"compile=True: {reason}; pass compile='auto' to go on without")
    optimized.report["reason"] = reason
    return optimized


class _Tracer(fx.Tracer):
    """Follows the networks of this package, whose input check would need real sizes."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(check_input,))


def fold_norms(model: nn.Module) -> tuple[nn.Module, int]:
    """An evaluation copy of a network, BatchNorm folded into the convolutions in front, and how many were.

    A network whose code torch.fx cannot follow is copied as it is.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        with torch.no_grad():  # memory-efficient blocks take their plain path
            graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError):
        return model, 0
    uses = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def called(node: Any) -> nn.Module | None:
        once = isinstance(node, fx.Node) and node.op == "call_module" and uses[node.target] == 1
        return model.get_submodule(node.target) if once else None

    folded = 0
    for node in list(graph.nodes):
        norm = called(node)
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        source = node.args[0]
        # Cutting rows and columns off commutes with what a norm does to a channel.
        while _cuts_only(source) and len(_readers(source)) == 1:
            source = source.args[0]
        conv = called(source)
        if not isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) or len(_readers(source)) > 1:
            continue
        fused = fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, nn.ConvTranspose2d))
        parent, _, name = source.target.rpartition(".")
        setattr(model.get_submodule(parent), name, fused)
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
        folded += 1
    return fx.GraphModule(model, graph), folded


def _readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that use the values of a tensor, not its shape alone."""
    return [user for user in node.users if not (user.target is getattr and user.args[1] == "shape")]


def _cuts_only(node: Any) -> bool:
    """Whether a node takes a part of the rows and columns, and all images and channels."""
    if not (isinstance(node, fx.Node) and node.target is operator.getitem and isinstance(node.args[1], tuple)):
        return False
    return node.args[1][:2] == (slice(None), slice(None)) and all(isinstance(i, slice) for i in node.args[1])


def _compile(optimized: InferenceModel, example: Tensor, *, keep_slower: bool) -> str | None:
    """Compile for the example's shape; returns why the eager network stays in use, or None.

    The logits are checked: torch 2.14's freezing folds a norm behind a transposed convolution along the wrong axis.
    `fold_norms` leaves no such norm in a SUNet; in a network that it cannot follow one may remain.
    """
    from torch._inductor import config as inductor

    dtype, eager = optimized.dtype, optimized.eager
    expected = optimized(example)
    optimized._shape = example.shape
    try:
        with warnings.catch_warnings(), inductor.patch(freezing=True):
            warnings.simplefilter("ignore")
            compiled: Any = torch.compile(eager)
            optimized._compiled = compiled.__call__  # the bound method: not a submodule a second time
            difference = (optimized(example) - expected).abs().max() / expected.abs().max()
    except Exception as error:  # a missing compiler, an operator it does not know: each has a class of its own
        optimized._compiled = None
        return f"torch.compile failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if not difference <= COMPILED_TOLERANCE[dtype]:
        optimized._compiled = None
        return f"the compiled network's logits differ by {difference:.1g} of the largest"
    fast = optimized._compiled
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(TIMED_ROUNDS):
        for network, values in zip((None, fast), times, strict=True):
            optimized._compiled = network
            start = time.perf_counter()
            optimized(example).sum().item()  # waits for a GPU
            values.append(1e3 * (time.perf_counter() - start))
    eager_ms, compiled_ms = (statistics.median(values) for values in times)
    optimized.report |= {"eager_ms": eager_ms, "compiled_ms": compiled_ms}
    if compiled_ms >= eager_ms and not keep_slower:
        optimized._compiled = None
        return f"eager is as fast ({eager_ms:.1f} ms, compiled {compiled_ms:.1f} ms)"
    optimized.report["compiled"] = True
    return None
