"""Convert a checkpoint between our names and the published ones, and between .pth and .safetensors.

Usage:
    python tools/convert_checkpoint.py groupmixformer_small.pth small.safetensors
    python tools/convert_checkpoint.py output/digits/default/best.pth digits.pth --to published

The weights alone are written, as {"model": weights} in a .pth file. Every tensor of the input must be one that a
GroupMixFormer has; nothing is dropped.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safetensors.torch
from torch import Tensor

from models.groupmixformer import checkpoint_filter_fn
from models.published import is_ours, to_published
from utils import checkpoint
from utils.cli import Parser, add_weights_choice, check_new, run
from utils.errors import UserError, listing
from utils.trained import weights_name


def main() -> None:
    """Parses, converts, writes."""
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="a .pth or .safetensors file, of either naming")
    parser.add_argument("target", type=Path, help="the .pth or .safetensors file to write; none that exists")
    parser.add_argument("--to", choices=["ours", "published"], default="ours", help="names to write (default ours)")
    add_weights_choice(parser)
    arguments = parser.parse_args()
    check_new(arguments.target, "target")
    state = checkpoint.load_for_task(arguments.source, "classification")
    name = weights_name(state, arguments.source, arguments.weights)
    weights = convert(state[name], arguments.to, str(arguments.source))
    write(weights, arguments.target)
    names = "our" if arguments.to == "ours" else "the published"
    of = " of the moving average" if name == "ema" else ""
    print(f"{arguments.target}: {len(weights)} tensors{of} under {names} names")


def convert(weights: Mapping[str, Tensor], names: str, source: str) -> dict[str, Tensor]:
    """Weights under 'ours' or 'published' names, whichever they have, each contiguous as safetensors needs it.

    Raises:
        UserError: If a tensor is not one of a GroupMixFormer.
    """
    ours = checkpoint_filter_fn(weights)
    foreign = [name for name in ours if not is_ours(name)]
    if foreign:
        raise UserError(f"{source} has {listing(foreign)}, which no GroupMixFormer has: name another file")
    contiguous = {name: tensor.contiguous() for name, tensor in ours.items()}
    return contiguous if names == "ours" else to_published(contiguous)


def write(weights: dict[str, Tensor], path: Path) -> None:
    """Writes weights in the form that the file's ending says.

    Raises:
        UserError: If the ending is another, or the file cannot be written.
    """
    if path.suffix == ".pth":
        checkpoint.save({"model": weights}, path)
    elif path.suffix == ".safetensors":
        # Not by save_file, whose files nobody else may read.
        checkpoint.write_beside(path, lambda beside: beside.write_bytes(safetensors.torch.save(weights)))
    else:
        raise UserError(f"{path}: end the name in .pth or .safetensors")


if __name__ == "__main__":
    run(main)
