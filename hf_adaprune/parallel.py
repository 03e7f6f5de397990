"""Several processes, as `accelerate launch` (or `torchrun`) starts them: they share calibration windows and trials.

Every process holds the whole model on its own device and walks the same way. Statistics are sums over windows, so each
process reads its share and one sum brings them together; of a search the first process proposes and every one measures
its share of the trials. All come back with the same statistics, journal and plan.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .errors import CalibrationError, ConfigError
from .recording import collect_statistics
from .sites import ModelSites
from .statistics import Needs, Statistics
from .token_blocks import TokenBlocks
from .workers import Alone

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["Processes", "collect_together", "processes"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHUNK = (
    2**24
)  # numbers that are summed at a time: 64 or 128 MiB beside a tensor that lies on another device or on disk


def processes() -> Alone:
    """All processes of this run: [`Processes`] under `accelerate launch` or `torchrun`, [`Alone`] otherwise.

    Nothing is initialised where there is one process. Where there are several, all of them have to get here.

    Raises:
        ConfigError: torch knows several processes and accelerate does not.
    """
    distributed = torch.distributed
    if not distributed.is_available():
        return Alone()
    count = distributed.get_world_size() if distributed.is_initialized() else _launched()
    if count == 1:
        return Alone()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    device = torch.accelerator.current_accelerator(check_available=True)
    state = PartialState(cpu=device is None or device.type == "mps" or parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes != count:
        raise ConfigError(
            f"there are {count} processes, and accelerate sees {state.num_processes}. Leave PartialState() to "
            "hf_adaprune, or call PartialState(cpu=True) where there is no GPU."
        )
    return Processes(state)


def _launched() -> int:
    """How many processes a launcher said there are."""
    names = ["WORLD_SIZE"] if "RANK" in os.environ else []
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        names += ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"]  # accelerate launches CPUs by MPI
    return max([1, *(int(os.environ.get(name, "1")) for name in names)])


class Processes(Alone):
    """The processes of a run; every method has to be called by all of them, in the same order.

    Args:
        state (`PartialState`): accelerate's, initialised.
    """

    def __init__(self, state: PartialState) -> None:
        self.count, self.rank = state.num_processes, state.process_index
        # Where sums meet: gloo takes them from memory, nccl and its like from the device of the process.
        self.device = torch.device("cpu") if torch.distributed.get_backend() in ("gloo", "mpi") else state.device

    def share(self, value: T) -> T:
        """The first process's value, on all."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value if self.rank == 0 else None])[0]

    def gather(self, values: list[T]) -> list[T]:
        """The values of all processes, in their order, on all."""
        from accelerate.utils import gather_object

        return list(gather_object(list(values)))

    def lead(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all; what it raises is raised on all."""
        made: Any = None
        failure: Exception | None = None
        if self.rank == 0:
            try:
                made = make()
            except Exception as error:
                failure = error
        made, said = self.share((made, _sendable(failure)))
        self._raise(failure, [said])
        return made

    def each(self, make: Callable[[], T]) -> T:
        """What this process makes; where one of them raises, all do, so that none waits for another forever."""
        made: Any = None
        failure: Exception | None = None
        try:
            made = make()
        except Exception as error:
            failure = error
        self._raise(failure, self.gather([_sendable(failure)]))
        return made

    def add_up(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over the processes, in place, on all; a part at a time, wherever it lies."""
        for part in tensor.view(-1).split(_CHUNK) if tensor.numel() else ():
            there = part.to(self.device)
            torch.distributed.all_reduce(there)
            if there is not part:
                part.copy_(there)

    def _raise(self, own: Exception | None, all_said: list[Exception | None]) -> None:
        if own is not None:
            raise own
        for rank, error in enumerate(all_said):
            if error is not None:
                logger.error("process %d of %d failed, so this one (%d) stops too.", rank, self.count, self.rank)
                raise error


def _sendable(error: Exception | None) -> Exception | None:
    """The error itself where it survives pickling; what it says where it does not."""
    try:
        # This process's own object, in memory only: what accelerate does to send it, tried before all have to wait.
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")


def collect_together(
    sites: ModelSites, blocks: TokenBlocks, needs: Needs, workers: Alone, **options: Any
) -> Statistics:
    """Statistics of calibration windows that the processes share; the same on all, and as one process finds them.

    On equal devices they are equal to the last bit (windows run in the batches of one process, Gram matrices are summed
    in float64), but for element-wise terms, whose sums hang on the order. Every process holds its own Gram matrices
    while they are summed, and keeps the sum: in memory `workers.count` times on one machine, and with
    `gram_place="disk"` in a folder each.

    Args:
        sites ([`ModelSites`]): the model, with equal weights on all processes.
        blocks ([`TokenBlocks`]): all windows, the same on all processes.
        needs ([`Needs`]): what to keep.
        workers ([`Alone`]): the processes.
        **options: see [`hf_adaprune.recording.collect_statistics`].

    Raises:
        CalibrationError: the processes brought different windows.
        StatisticsError: activations or gradients are not finite.
    """
    if len(set(workers.gather([blocks.digest]))) > 1:
        raise CalibrationError(
            "the processes read different calibration text. Give all of them the same files, seed and versions."
        )
    return collect_statistics(sites, blocks, needs, workers=workers, **options)
