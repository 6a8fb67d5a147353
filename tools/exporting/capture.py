"""A network as a graph in which batch, height and width are free."""

from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapeVar, TensorSpec

from tools.exporting.deployed import Deployed
from utils.errors import UserError, reason

SMALLEST = 32  # pixels of a side, for a network of stride 32
_EXAMPLE = (2, 64, 96)  # batch, height and width: no two alike, none 1, so that nothing is taken for granted


def capture(network: Deployed, in_chans: int, for_inductor: bool = False) -> ExportedProgram:
    """Traces a network by torch.export.

    Args:
        network: In evaluation mode.
        in_chans: Channels of its images.
        for_inductor: Whether inductor compiles the graph. It lays tensors out by whether a size is 1, so it is told
            that none is; its code is right for 1 too, and does not look.

    Raises:
        UserError: If torch cannot trace it.
    """
    batch, height, width = _EXAMPLE
    sizes: Any = {"images": dict.fromkeys((0, 2, 3), Dim.DYNAMIC)}
    if not for_inductor:
        sides = [ShapeVar(name, min=SMALLEST) for name in ("height", "width")]
        sizes = ParamsSpec({"images": TensorSpec([ShapeVar("batch", min=1), in_chans, *sides])})
    try:
        return torch.export.export(network, (torch.zeros(batch, in_chans, height, width),), dynamic_shapes=sizes)
    except Exception as error:  # torch's tracer documents no exceptions of its own
        raise UserError(f"torch.export cannot trace the network ({reason(error)}): use another --form") from None
