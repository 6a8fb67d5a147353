"""Export a trained network to ONNX, torch.export, AOTInductor, or a folder for timm and the Hugging Face hub.

Usage:
    python tools/export.py --checkpoint best.pth --form onnx --output best.onnx
    python tools/export.py --checkpoint best.pth --form onnx --precision int8 --output best-int8.onnx --data-path D
    python tools/export.py --checkpoint best.pth --form torch-export --precision bf16 --output best.pt2
    python tools/export.py --checkpoint best.pth --form aoti --output best-compiled.pt2
    python tools/export.py --checkpoint best.pth --form timm --output best-timm

Files take normalised float32 images [batch, channels, height, width] of any number and size from 32 x 32 up, and give
float32 logits. They tell about themselves what it takes to make such images, and the classes. Each is loaded again and
compared with the network on three sizes; one that answers otherwise is removed. --data-path scores both on D/val.

int8 (onnx) rounds the matrices of linear layers. bf16 (torch-export, aoti) is weights and arithmetic, which CPUs run
too. AOTInductor compiles for the machine that it runs on. timm's folder has the network as it is, not fused, as timm
knows its tensors by their names.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.exporting.checking import TOLERANCES, Run, check_answers
from tools.exporting.draft import draft_of
from tools.exporting.forms import FORMS, check_request
from tools.exporting.scoring import print_scores, validation_data
from utils.cli import Parser, run
from utils.errors import UserError
from utils.trained import Trained, add_trained_arguments, trained_from


def parse() -> argparse.Namespace:
    """The checked command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    add_trained_arguments(parser)
    parser.add_argument("--form", required=True, choices=FORMS, help="what to write")
    parser.add_argument("--output", required=True, type=Path, metavar="PATH", help="the file, or timm's folder")
    parser.add_argument("--no-fuse", action="store_true", help="leave the network as it is (models/fuse.py); timm's is")
    parser.add_argument("--precision", choices=TOLERANCES, default="fp32", help="of weights (default fp32)")
    parser.add_argument("--data-path", metavar="D", help="score the network and the file on D/val")
    parser.add_argument("--license", metavar="NAME", help="of the weights, for timm's model card")
    arguments = parser.parse_args()
    check_request(arguments.form, arguments.output, arguments.precision)
    if arguments.license and arguments.form != "timm":
        raise UserError(f"--license is for timm's model card, which --form {arguments.form} has none of: leave it out")
    return arguments


def main() -> None:
    """Parses, writes, checks, scores."""
    arguments = parse()
    trained = trained_from(arguments)
    network = trained.network
    data = validation_data(trained, arguments.data_path) if arguments.data_path else None
    fused = FORMS[arguments.form].can_fuse and not arguments.no_fuse
    with draft_of(arguments.output) as draft:
        exported = write(arguments, trained, fused, draft)
        say("checking")
        worst = check_answers(
            exported, network, network.in_chans, trained.config.DATA.IMG_SIZE, TOLERANCES[arguments.precision]
        )
        size = bytes_of(draft)
        if data:
            held = sum(tensor.nbytes for tensor in network.state_dict().values())
            print_scores({"the network": (network, held), arguments.output.name: (exported, size)}, data)
    print(
        f"{arguments.output}: {size / 2**20:.2f} MiB, {arguments.form}, {arguments.precision}, "
        f"{'fused' if fused else 'not fused'}, logits within {worst:.1e} of the largest one on three sizes"
    )


def write(arguments: argparse.Namespace, trained: Trained, fused: bool, draft: Path) -> Run:
    """Writes a form, and opens what was written by its own runtime.

    Raises:
        UserError: If it cannot be made.
    """
    # Each form is imported where it is asked for: onnx need not be there for the others.
    if arguments.form == "timm":
        from tools.exporting.timm_folder import open_folder, write_folder

        write_folder(trained, draft, arguments.license)
        return open_folder(draft)
    from tools.exporting.capture import capture
    from tools.exporting.deployed import deploy
    from tools.exporting.information import information

    for_inductor = arguments.form == "aoti"
    say("tracing")
    program = capture(deploy(trained.network, fused, arguments.precision), trained.network.in_chans, for_inductor)
    told = information(trained, fused, arguments.precision)
    say("compiling, which takes minutes" if for_inductor else "writing")
    if arguments.form == "onnx":
        from tools.exporting.onnx_file import open_onnx, quantize, write_onnx

        if arguments.precision == "int8":
            whole = draft.with_name("whole.onnx")
            write_onnx(program, whole, told)
            say(f"{quantize(whole, draft, told)} matrices rounded to 8 bits")
        else:
            write_onnx(program, draft, told)
        return open_onnx(draft)
    from tools.exporting.torch_file import open_compiled, open_program, write_compiled, write_program

    if for_inductor:
        write_compiled(program, draft, told)
        return open_compiled(draft)
    write_program(program, draft, told)
    return open_program(draft)


def say(line: str) -> None:
    """Tells on standard error what is done."""
    print(line, file=sys.stderr)


def bytes_of(path: Path) -> int:
    """Size of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


if __name__ == "__main__":
    run(main)
