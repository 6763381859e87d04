"""What puts channels in another order, done by weights: runtimes move channels one number after the other.

A convolution that reads BGR, or a channel shuffle, reads what was there before with its weights in the other order. What
reads a shuffle in groups cannot; where products are cheap (bfloat16 and int8), a 1x1 convolution moves its channels.
"""

from typing import Any

import torch
from torch.export import ExportedProgram

aten = torch.ops.aten
CAT, CONVOLUTION = aten.cat.default, aten.conv2d.default
FLIP, SHUFFLE, PERMUTE = aten.flip.default, aten.channel_shuffle.default, aten.permute.default


def order_by_weights(program: ExportedProgram, *, products: bool) -> None:
    """Changes a program of `graph.trace` in place; it computes what it did.

    Args:
        program: with operators as they are traced.
        products: also move channels by 1x1 convolutions where no weights can take the order.
    """
    graph: Any = program.graph
    shuffles = graph.find_nodes(op="call_function", target=SHUFFLE)
    for node in graph.find_nodes(op="call_function", target=CAT):
        _behind(node)
    for node in graph.find_nodes(op="call_function", target=CONVOLUTION):
        while _turned(node):
            pass
    for node in shuffles if products else ():
        if node.users:
            _as_product(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _behind(cat: Any) -> None:
    """Lets what changes all parts of a batch alike come behind their concatenation, once."""
    while _axis(cat) == 0:
        parts = cat.args[0]
        first = parts[0]
        if any((part.target, part.args[1:]) != (first.target, first.args[1:]) or len(part.users) > 1 for part in parts):
            return
        if not (first.target is PERMUTE and first.args[1][0] == 0 or first.target is FLIP and 0 not in first.args[1]):
            return
        with cat.graph.inserting_after(cat):
            change = cat.graph.call_function(first.target, (cat, first.args[1]))
        change.meta = dict(cat.meta)
        cat.replace_all_uses_with(change)
        change.args = (cat, first.args[1])
        cat.args = ([part.args[0] for part in parts],)
        cat.meta["val"] = torch.cat([part.args[0].meta["val"] for part in parts])
        for part in dict.fromkeys(parts):
            cat.graph.erase_node(part)


def _axis(cat: Any) -> int:
    return cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)


def _turned(convolution: Any) -> bool:
    """Lets a convolution read what comes before a flip or a shuffle; False where it reads none, or in groups."""
    source, weights, *rest = convolution.args
    grouped = len(rest) > 4 and rest[4] != 1
    if grouped or source.target not in (FLIP, SHUFFLE) or source.target is FLIP and source.args[1] != [1]:
        return False
    back = [1] if source.target is FLIP else weights.meta["val"].shape[1] // source.args[1]
    with convolution.graph.inserting_before(convolution):
        turned = convolution.graph.call_function(source.target, (weights, back))
    turned.meta = dict(weights.meta)
    convolution.args = (source.args[0], turned, *rest)
    return True


def _as_product(shuffle: Any) -> None:
    """A shuffle as a 1x1 convolution, whose weights are ones and zeros."""
    graph, channels = shuffle.graph, shuffle.meta["val"].shape[1]
    with graph.inserting_before(shuffle):
        ones = graph.call_function(aten.eye.default, (channels,))
        ones = graph.call_function(aten.view.default, (ones, [channels, channels, 1, 1]))
        weights = graph.call_function(SHUFFLE, (ones, channels // shuffle.args[1]))
        moved = graph.call_function(CONVOLUTION, (shuffle.args[0], weights))
    moved.meta = dict(shuffle.meta)
    shuffle.replace_all_uses_with(moved)
