"""Hidden states go through a model one decoder layer at a time, by the model's own forward.

The forward of the whole model runs, embeddings, masks and rotary tables included, with one real layer: the layers
before it stand aside and the last of them hands over the hidden states that the real one has to see; the layers after
it pass on what they get. So whatever runs the model (the instrumented pass, a loss) works on one layer as on all.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .activations import Activations, ActivationStore
from .masking import other_forward
from .offloading import layer_weights
from .quiet import quiet_model
from .sites import ModelSites
from .token_blocks import TokenBlocks
from .tracing import Enough

__all__ = ["HiddenStream", "layer_calls"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class HiddenStream:
    """The hidden states of some batches between two layers. Batches have to be run in the same order every time.

    Args:
        sites ([`ModelSites`]): the model.
        store ([`ActivationStore`], *optional*): whose memory the hidden states take.
    """

    def __init__(self, sites: ModelSites, store: ActivationStore | None = None) -> None:
        self.sites = sites
        self.hidden = Activations(store)
        self._passing = _Passing()

    @contextlib.contextmanager
    def at(self, number: int, takes: str = "output") -> Iterator[None]:
        """Only layer `number` is real while the context is open; past the last layer, only what follows the layers.

        Args:
            number (`int`): a layer, from 0 on, or the number of layers.
            takes (`str`, *optional*, defaults to `"output"`): what becomes the stream: the layer's `output`, its
                `input` (as if it were not there), or `nothing` new. All batches have to be run once for the first two.
        """
        reads, writes = itertools.count(), itertools.count()

        def stored(hidden: torch.Tensor) -> torch.Tensor:
            return self.hidden[next(reads) % len(self.hidden)].to(hidden.device)

        def keep(before: torch.Tensor, after: torch.Tensor) -> None:
            index = next(writes)
            if number == 0 and takes != "nothing":
                self.hidden.append(after if takes == "output" else before)
            elif takes == "output":
                self.hidden[index] = after

        with contextlib.ExitStack() as stack:
            for other, layer in enumerate(self.sites.layers):
                if other == number:
                    forward = self._passing.told(layer.forward, keep)
                else:
                    forward = self._passing.by(stored if other == number - 1 else _same)
                stack.enter_context(other_forward(layer, forward))
            yield

    def close(self) -> None:
        """Let go of the hidden states."""
        self.hidden.close()


class _Passing:
    """Forwards of layers that stand aside. They return what a real layer of the model does: hidden states, or a tuple
    that begins with them.
    """

    def __init__(self) -> None:
        self.rest: tuple[Any, ...] | None = None

    def told(self, forward: Callable[..., Any], sink: Callable[[torch.Tensor, torch.Tensor], None]) -> Any:
        def real(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.rest = output[1:] if isinstance(output, tuple) else None
            before = args[0] if args else kwargs["hidden_states"]
            sink(before, output[0] if isinstance(output, tuple) else output)
            return output

        return real

    def by(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
        def aside(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden = change(hidden_states)
            return hidden if self.rest is None else (hidden, *self.rest)

        return aside


def _same(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _ignore(before: torch.Tensor, after: torch.Tensor) -> None:
    return None


@torch.no_grad()
def layer_calls(sites: ModelSites, blocks: TokenBlocks, sink: Callable[[torch.Tensor], None]) -> tuple[Arguments, ...]:
    """Record what the decoder layers are called with, so that they can be run one by one. Windows must be unpadded.

    Args:
        sites ([`ModelSites`]): the model.
        blocks ([`TokenBlocks`]): windows.
        sink (`Callable`): gets the input of the first layer for each window, `[1, tokens, hidden]`.

    Returns:
        `tuple`: for every layer the positional and keyword arguments beside the hidden states, for a batch of one
        window.
    """
    arguments: dict[int, Arguments] = {}
    seen = itertools.count()
    passing = _Passing()

    def reads(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*args: Any, **kwargs: Any) -> Any:
            given = dict(kwargs)
            hidden = args[0] if args else given.pop("hidden_states")
            arguments.setdefault(number, (tuple(args[1:]), given))
            if number == 0:
                sink(hidden.detach())
                if next(seen):
                    raise Enough
            return forward(*args, **kwargs)

        return reading

    # The first layer is real once: it shows in which form layers return what they do.
    with quiet_model(sites.model), layer_weights(sites, 0), contextlib.ExitStack() as stack:
        for number, layer in enumerate(sites.layers):
            forward = passing.by(_same) if number else passing.told(layer.forward, _ignore)
            stack.enter_context(other_forward(layer, reads(number, forward)))
        for window in blocks.input_ids:
            with contextlib.suppress(Enough):
                sites.model.base_model(input_ids=window[None].to(sites.device), use_cache=False)
    return tuple(arguments[number] for number in range(len(sites.layers)))
