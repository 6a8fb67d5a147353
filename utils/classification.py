"""The task of classifying images."""

from torch import nn
from yacs.config import CfgNode

from data.build import EvalData, TrainData, build_eval_data, build_mixup, build_train_data
from data.datasets import check_same_classes, count_classes
from data.finish import NormalizeAndErase
from models.build import build_model, compile_blocks, load_pretrained
from models.groupmixformer import GroupMixFormer
from utils.dist import World
from utils.distillation import DistillationLoss, Mix, build_teacher, check_teacher
from utils.metrics import Score, ScoreSums
from utils.optim import build_loss
from utils.precision import Precision
from utils.task import Task


def classification() -> Task:
    """To classify images."""
    return Task(
        measures=Score.measures,
        open_data=_open_data,
        build_network=lambda config, data: build_model(config, count_classes(config, data.classes)),
        load_to_start=load_pretrained,
        build_loss=_build_loss,
        build_finish=NormalizeAndErase,
        build_batch_transform=_build_batch_transform,
        build_sums=lambda _data, device: ScoreSums(device),
        compile=compile_blocks,
    )


def _open_data(config: CfgNode, world: World) -> tuple[TrainData, EvalData]:
    train_data = build_train_data(config, world)
    count_classes(config, train_data.classes)
    eval_data = build_eval_data(config, world, known=None, num_classes=None)
    check_same_classes(train_data.classes, eval_data.classes)
    if config.DISTILL.TEACHER:
        check_teacher(config, train_data.classes)
    return train_data, eval_data


def _build_loss(config: CfgNode) -> nn.Module:
    loss, distill = build_loss(config), config.DISTILL
    if not distill.TEACHER:
        return loss
    return DistillationLoss(loss, distill.ALPHA, distill.TEMPERATURE, hard=distill.KIND == "hard")


def _build_batch_transform(config: CfgNode, network: GroupMixFormer, precision: Precision) -> Mix | None:
    mixup = build_mixup(config, network.num_classes)
    if not config.DISTILL.TEACHER:
        return mixup
    return build_teacher(config, network.num_classes, mixup, precision, network.stem.conv1.weight.device)
