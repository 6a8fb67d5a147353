"""Which stages and blocks of a network are looked at."""

from collections.abc import Sequence

from models.groupmixformer import GroupMixFormer
from utils.errors import UserError


def choose_blocks(
    network: GroupMixFormer, stages: Sequence[int] | None, blocks: Sequence[str]
) -> list[tuple[int, int]]:
    """(stage, block) of each block that is asked for.

    Args:
        network: The network.
        stages: Their numbers from 0, all if None.
        blocks: Numbers from 0, 'last' or 'all', for each of the stages.

    Raises:
        UserError: If there is no such stage or block.
    """
    chosen = []
    for stage in range(len(network.stages)) if stages is None else stages:
        check_stage(network, stage)
        depth = len(network.stages[stage].blocks)
        for text in blocks:
            if text == "all":
                chosen += [(stage, block) for block in range(depth)]
            elif text == "last":
                chosen.append((stage, depth - 1))
            elif text.isdecimal() and int(text) < depth:
                chosen.append((stage, int(text)))
            else:
                raise UserError(
                    f"--block {text}: stage {stage} has blocks 0 to {depth - 1}: name one of them, 'last' or 'all'"
                )
    return list(dict.fromkeys(chosen))


def check_stage(network: GroupMixFormer, stage: int) -> None:
    """Refuses a stage that the network has not.

    Raises:
        UserError: If there is no stage of that number.
    """
    if not 0 <= stage < len(network.stages):
        raise UserError(f"--stage {stage}: the network has stages 0 to {len(network.stages) - 1}: name one of them")
