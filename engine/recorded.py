"""A training step as one CUDA graph, so that a GPU does not wait for Python's launches."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from engine.distributed import num_processes
from utils import first_line, warn

WARM_UPS = 3  # calls of a shape before it is recorded: buffers are made and algorithms chosen


class Recorded:
    """A function that a GPU runs as one CUDA graph, from the fourth call with the same shapes on.

    A step launches a thousand kernels of a few microseconds each, and Python needs longer to launch
    one than the GPU to run it. A graph repeats the kernels with the addresses and numbers of its
    recording. So whatever changes from call to call must be a tensor: an argument, or one that
    stays where it is and is written to. On other devices and under torchrun the function is just
    called (pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

    Args:
        function: takes tensors and numbers, and returns tensors.

    Attributes:
        enabled: False to just call the function from now on, as after a recording that failed.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self._calls = Counter()  # by shape
        self._graphs = {}
        # The graphs share their memory, since they run one after the other. It is not shared with
        # other functions: PyTorch refuses memory all of whose graphs were deleted.
        self._memory = None
        self.enabled = True

    def __call__(self, *given: object) -> tuple[Tensor, ...]:
        """The results of the function."""
        if not self.enabled or not can_record(given[0].device):
            return self.function(*given)
        shapes = tuple(getattr(value, "shape", value) for value in given)
        if shapes not in self._graphs:
            self._calls[shapes] += 1
            if self._calls[shapes] <= WARM_UPS:
                return self.function(*given)
            try:
                self._graphs[shapes] = self._record(given)
            except RuntimeError as error:
                # Ending a recording that has failed raises an error of its own.
                cause = first_line(error.__context__ or error)
                warn(f"cuda graph: {cause}; going on without, kernel by kernel")
                self.enabled = False
        if not self.enabled:  # here, where the error no longer keeps the half-made graph
            return self.function(*given)
        graph, held, results = self._graphs[shapes]
        for kept, value in zip(held, given, strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(value)
        graph.replay()
        return tuple(result.clone() for result in results)  # the next replay writes over them

    def _record(self, given: tuple[object, ...]) -> tuple:
        """Record a call: its graph, the arguments it reads, the results it writes. None is run."""
        held = [value.clone() if isinstance(value, Tensor) else value for value in given]
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # The outer block returns to this stream even if the recording fails.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._memory),
        ):
            results = self.function(*held)
        return graph, held, results


def can_record(device: torch.device) -> bool:
    """True on a CUDA device, if one process trains alone."""
    return device.type == "cuda" and num_processes() == 1
