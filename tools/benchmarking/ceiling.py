"""What the machine can do at best: a large matrix product in each precision, and a large copy."""

from collections.abc import Callable

import torch

COPY = "copy"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns
_COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes, far more than a cache holds

Ceilings = dict[str, tuple[Callable[[], object], float]]  # a step and its work, by name


def ceilings(precisions: set[str], device: torch.device) -> Ceilings:
    """Steps that reach the machine's ceilings, to be timed as all others are.

    Args:
        precisions: Of the matrix products.
        device: Where to compute.

    Returns:
        For each precision, and for 'copy', a step and its work: FLOPs (two for a multiply-add), or bytes read and
        written.
    """
    steps: Ceilings = {}
    size = _MATRIX[device.type]
    for precision in sorted(precisions):
        # Random numbers: zeros take less power, and are multiplied faster than real data.
        left, right, out = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(3))
        steps[precision] = (lambda left=left, right=right, out=out: torch.mm(left, right, out=out), 2.0 * size**3)
    source = torch.randn(_COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    steps[COPY] = (lambda: target.copy_(source), 2.0 * _COPIED[device.type])
    return steps
