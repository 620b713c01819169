"""A step captured in a CUDA graph: its kernels are launched together, without Python between them."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 3


class Captured:
    """A function without arguments, whose tensors keep their addresses, as a CUDA graph.

    It is run ``WARM_UPS`` times and once more to be captured: state that it changes has to be set afterwards.
    """

    def __init__(self, run: Callable[[], Tensor]):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # libraries initialise at their first call, which no graph can capture
            for _ in range(WARM_UPS):
                run()
        here.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU: only what this one does is captured, or refused.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.out = run()
        except RuntimeError:
            torch.cuda.set_stream(here)  # torch ends a failed capture before it restores the stream
            raise

    def __call__(self) -> Tensor:
        """Run it once more; the result overwrites the last one."""
        self.graph.replay()
        return self.out
