"""The switch between an operator's reference implementation (plain torch, in `ops`) and its fast ones.

`@accelerated` registers a function of tensors with torch as `torch.ops.fleetflow.NAME`, with shapes and gradients, so
that `torch.compile` keeps it as one node. Its versions are functions of the same name: for the CPU in the module of this
folder that is called like the one of `ops` (`ops/warp.py: warp` -> `ops/kernels/warp.py: warp`), for CUDA in
`ops/triton`; every other device, and a GPU for which Triton cannot be used, runs the reference implementation.
`NAME_gradients` beside each version is its gradient.

Whatever is exported or traced (`torch.export`, `torch.onnx.export`, `torch.jit.trace`) sees the reference
implementation, which consists of operators that every runtime knows. `with reference():` asks for it.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.jit import is_tracing as is_traced  # pyright: ignore[reportPrivateImportUsage]

_reference = ContextVar("fleetflow_reference", default=False)


def _answered_while_compiling(function: Callable) -> Callable:
    """Returns the function, which `torch.compile` will call once instead of looking inside.

    That is `torch.compiler.assume_constant_result`, which however imports the compiler: 2 s for those who have no use
    for it.
    """
    function._dynamo_marked_constant = True
    return function


@contextmanager
def reference() -> Iterator[None]:
    """Runs the block with the reference implementation of every operator (slow, exact); nests, and is thread-local."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


@_answered_while_compiling
def is_reference() -> bool:
    """Returns True inside `with reference():`, and while a model is exported or traced.

    What `torch.compile` makes keeps the answer it was made with.
    """
    return _reference.get() or torch.compiler.is_exporting() or is_traced()


def is_captured() -> bool:
    """Returns True while a model is compiled, exported or traced: then no value of a tensor may be looked at."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or is_traced()


def accelerated(definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers `definition`, a function of tensors and numbers that returns a tensor [N, C, H, W].

    Returns:
        The function that calls the registered operator, or the definition where `is_reference()`. The result has the
        dtype that the definition gives it, and is channels-last in memory.
    """
    name = definition.__name__
    tensors = sum(p.annotation is Tensor for p in inspect.signature(definition).parameters.values())  # they come first
    plain, plain_gradients = by_definition(definition, tensors)
    schema = torch.library.infer_schema(definition, mutates_args=())
    registered = _registered(name, schema, plain, definition)
    backward_schema = "(Tensor gradient, " + schema[1:].replace("-> Tensor", "-> Tensor[]")
    backward = _registered(f"{name}_gradients", backward_schema, plain_gradients, definition)

    def remember(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.others = inputs[tensors:]

    def gradients(ctx, gradient: Tensor) -> tuple:
        return *backward(gradient, *ctx.saved_tensors, *ctx.others), *(None for _ in ctx.others)

    qualified = f"fleetflow::{name}"
    torch.library.register_fake(qualified, lambda *given: _empty(definition(*given)), lib=_library)
    torch.library.register_fake(
        f"{qualified}_gradients", lambda _, *given: [_empty(each) for each in given[:tensors]], lib=_library
    )
    torch.library.register_autograd(qualified, gradients, setup_context=remember, lib=_library)

    @functools.wraps(definition)
    def operator(*arguments, **keywords):
        return (definition if is_reference() else registered)(*arguments, **keywords)

    return operator


def by_definition(definition: Callable[..., Tensor], tensors: int) -> tuple[Callable, Callable]:
    """Returns what devices without a fast version run: the definition, and its gradients by autograd.

    Args:
        tensors: how many tensors come first among its arguments.
    """

    def plain(*arguments) -> Tensor:
        return definition(*arguments)

    def plain_gradients(gradient: Tensor, *arguments) -> list[Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in arguments[:tensors]]
        with torch.enable_grad():
            value = definition(*inputs, *arguments[tensors:])
        return list(torch.autograd.grad(value, inputs, gradient))

    return plain, plain_gradients


# Not `torch.library.custom_op`, whose first call imports the compiler: 2 s.
_library = torch.library.Library("fleetflow", "FRAGMENT")


def _registered(name: str, schema: str, plain: Callable, definition: Callable):
    """Returns the operator of that name, which runs `plain` or the fast version of a device, channels-last."""
    _library.define(name + schema)
    _library.impl(name, _finished(plain), "CompositeExplicitAutograd")
    for device in ("cpu", "cuda"):
        _library.impl(name, _finished(_version(definition, device, name, plain)), device.upper())
    return getattr(torch.ops.fleetflow, name).default


def _finished(function: Callable) -> Callable:
    """The function with its results channels-last, as the shape functions say."""

    def finished(*arguments):
        result = function(*arguments)
        return _laid_out(result) if isinstance(result, Tensor) else [_laid_out(part) for part in result]

    return finished


def _laid_out(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last)


def _empty(value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.channels_last)


def _version(definition: Callable, device: str, name: str, plain: Callable) -> Callable:
    """Returns the fast version of `name` on the device, which is looked for when it is first called."""

    @functools.cache
    def find() -> Callable:
        module = _twin(definition, device)
        return getattr(module, name, plain) if module is not None else plain

    def run(*arguments):
        if not torch.is_autocast_enabled(device):
            return find()(*arguments)
        with torch.autocast(device, enabled=False):  # the dtype of the result must not depend on it
            return find()(*arguments)

    return run


def _twin(definition: Callable, device: str):
    """Returns the module that holds the fast versions of a definition for a device; None where there is none."""
    folder = "triton" if device == "cuda" else "kernels"
    module = definition.__module__.replace(".ops.", f".ops.{folder}.")
    if find_spec(module) is None:
        return None
    if device == "cuda" and not importlib.import_module("fleetflow.ops.triton").usable():
        return None
    return importlib.import_module(module)


def switched(definition: Callable) -> Callable:
    """Returns `definition`, replaced by its fast version at every call outside `is_reference()`.

    For functions of a value that no operator of torch can take, a pyramid of correlations that remembers what was read
    from it. Their versions for CUDA consist of registered operators; `torch.compile` sees those, and on other devices
    the definition.
    """
    name = definition.__name__
    versions: dict[bool, Callable] = {}  # for CUDA tensors (True) and for others, as far as there were any

    @_answered_while_compiling
    def find(gpu: bool) -> None:
        if gpu not in versions:
            twin = getattr(_twin(definition, "cuda"), name, None) if gpu else None
            versions[gpu] = twin or getattr(_twin(definition, "cpu"), name)

    @functools.wraps(definition)
    def operator(*arguments, **keywords):
        first = arguments[0] if arguments else next(iter(keywords.values()))
        gpu = (first[0] if isinstance(first, tuple) else first).is_cuda
        if is_reference() or (torch.compiler.is_compiling() and not gpu):
            return definition(*arguments, **keywords)
        find(gpu)
        return versions[gpu](*arguments, **keywords)

    return operator


def differentiable(forward: Callable[..., Tensor], gradients: Callable[..., list[Tensor]]) -> Callable[..., Tensor]:
    """Returns one version of an operator of two tensors with its gradients, to be compared with others of it."""

    class Version(torch.autograd.Function):
        @staticmethod
        def forward(ctx, first: Tensor, second: Tensor, *others):
            ctx.save_for_backward(first, second)
            ctx.others = others
            return forward(first, second, *others)

        @staticmethod
        def backward(ctx, gradient: Tensor):
            return *gradients(gradient, *ctx.saved_tensors, *ctx.others), *(None for _ in ctx.others)

    return Version.apply
