"""What a run trains for: the parts in which tasks differ, to classify, to segment, to detect."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.build import EvalData, TrainData
from utils.dist import World
from utils.metrics import Sums
from utils.precision import Precision


@dataclass(frozen=True)
class Task:
    """Builds what differs between tasks; the rest of a run is the same for all.

    Attributes:
        measures: As in `utils.metrics.TaskScore`.
        open_data: (configuration, this process) -> data to train and to validate on, which fit each other.
        build_network: (configuration, training data) -> network with fresh weights and an attribute `num_classes`.
        load_to_start: (network, weights, their source): loads weights to start from -> what of them does not fit.
        build_loss: Configuration -> loss of what the network answers in training, and targets.
        build_finish: (configuration, device) -> what makes the network's input of training images.
        build_sums: (validation data, device) -> what adds up the score.
        build_batch_transform: (configuration, network, precision) -> what is done to a batch's images and targets, or
            None.
        build_predictor: (configuration, network) -> what answers for the network in evaluation.
        compile: Has torch.compile take the network, in place; None where there is no TRAIN.COMPILE to ask for it.
        one_size: Whether all images to train on are of one size.
    """

    measures: Mapping[str, str]
    open_data: Callable[[CfgNode, World], tuple[TrainData, EvalData]]
    build_network: Callable[[CfgNode, TrainData], nn.Module]
    load_to_start: Callable[[nn.Module, Mapping[str, Tensor], str], list[str]]
    build_loss: Callable[[CfgNode], nn.Module]
    build_finish: Callable[[CfgNode, torch.device], Callable[[Any], Any]]
    build_sums: Callable[[EvalData, torch.device], Sums]
    build_batch_transform: Callable[[CfgNode, nn.Module, Precision], Callable[[Any, Any], tuple[Any, Any]] | None] = (
        lambda _config, _network, _precision: None
    )
    build_predictor: Callable[[CfgNode, nn.Module], nn.Module] = lambda _config, network: network
    compile: Callable[[nn.Module], None] | None = None
    one_size: bool = True
