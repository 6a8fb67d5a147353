"""Look inside a trained network: attention, class-activation maps, effective receptive fields.

Usage:
    python tools/visualize.py attention --checkpoint output/digits/seed0/best.pth image.png --output attention.png
    python tools/visualize.py attention --checkpoint C image.png --token 0.3 0.6 --stage 2 3 --block all --output a.pdf
    python tools/visualize.py cam --checkpoint C one.png two.png --class tench --output cam.png
    python tools/visualize.py receptive-field --checkpoint C D/val --images 200 --untrained --output field.png

attention: how much of each token's value a chosen token takes, in every head. cam: where the evidence for a class lies
(Grad-CAM). receptive-field: which pixels the middle unit of each stage answers to, on average over images. Figures are
PNG, PDF or SVG by their names' endings. Stages, blocks and heads are numbered from 0, as the network's modules are.
Each of the three has flags of its own: `attention --help` tells them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.visualizing.attention import add_attention_arguments, draw_attention
from tools.visualizing.class_activation import add_cam_arguments, draw_cam
from tools.visualizing.figures import add_figure_arguments, check_figure
from tools.visualizing.inputs import add_size_argument
from tools.visualizing.receptive_field import add_receptive_field_arguments, draw_receptive_field
from utils.cli import Parser, run
from utils.dist import choose_device
from utils.trained import add_trained_arguments, trained_from


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: If it is wrong.
    """
    parser = Parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="attention | cam | receptive-field")
    for name, add_arguments, draw, text in (
        ("attention", add_attention_arguments, draw_attention, "how much of each token's value a chosen token takes"),
        ("cam", add_cam_arguments, draw_cam, "where the evidence for a class lies (Grad-CAM)"),
        (
            "receptive-field",
            add_receptive_field_arguments,
            draw_receptive_field,
            "which pixels the middle unit of each stage answers to",
        ),
    ):
        kind = kinds.add_parser(name, help=text, description=text)
        add_trained_arguments(kind)
        add_arguments(kind)
        add_size_argument(kind)
        add_figure_arguments(kind)
        kind.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
        kind.set_defaults(draw=draw)
    arguments = parser.parse_args()
    check_figure(arguments.output)
    return arguments


def main() -> None:
    """Parses, reads the network, draws, prints the numbers."""
    arguments = parse()
    device = choose_device(arguments.device)
    trained = trained_from(arguments)
    trained.network.to(device)
    print("\n".join(arguments.draw(trained, arguments, device)))


if __name__ == "__main__":
    run(main)
