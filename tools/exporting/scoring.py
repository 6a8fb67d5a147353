"""The accuracy of a network and of what it was exported to, over the same images."""

import torch
from torch import Tensor, nn

from data.build import EvalData, build_eval_data
from tools.exporting.checking import Run
from utils.console import markdown_row, markdown_table
from utils.dist import World
from utils.precision import Precision
from utils.scoring import score_timed
from utils.trained import Trained


class Runtime(nn.Module):
    """An exported file in the place of a network."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        return self._run(images)


def _alone() -> World:
    """This process, with no other, on the CPU."""
    return World(0, 1, torch.device("cpu"))


def validation_data(trained: Trained, data_path: str) -> EvalData:
    """The validation images of a folder, prepared as the network's configuration says.

    Raises:
        UserError: If the folder is missing, or has classes that the network does not know.
    """
    config = trained.config.clone()
    config.DATA.DATA_PATH = data_path
    return build_eval_data(config, _alone(), trained.classes, trained.network.num_classes)


def print_scores(runs: dict[str, tuple[Run, int]], data: EvalData) -> None:
    """Prints a table of accuracies, one line for each.

    Args:
        runs: By name: what runs it, and how many bytes it has.
        data: The images.
    """
    print(markdown_table([["", "MiB", "Acc@1", "Acc@5", "loss", "images/s"]]))
    for name, (run, size) in runs.items():
        score, speed = score_timed(Runtime(run), data, _alone(), Precision("fp32", "cpu"))
        mib = size / 2**20
        numbers = [f"{mib:.2f}", f"{score.acc1:.3f}", f"{score.acc5:.3f}", f"{score.loss:.4f}", f"{speed:.1f}"]
        print(markdown_row([name, *numbers]))
