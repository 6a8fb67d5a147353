"""Which images stay together, and which side of a split each of those groups goes to.

scikit-learn's StratifiedGroupKFold is close to this, but it is no requirement of the product, it has no hold-out form,
and where a class has few groups it may leave a fold without any.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from utils.errors import UserError, listing
from utils.seeding import number_for


def join(keys: Iterable[Iterable[Hashable]]) -> list[int]:
    """Joins items that share a key, directly or by way of others.

    Args:
        keys: Of each item.

    Returns:
        For each item the number of the first item of its group.
    """
    leaders: list[int] = []
    first: dict[Hashable, int] = {}

    def leader(item: int) -> int:
        while leaders[item] != item:
            leaders[item] = item = leaders[leaders[item]]
        return item

    for item, of_item in enumerate(keys):
        leaders.append(item)
        for key in of_item:
            one, other = sorted((leader(item), leader(first.setdefault(key, item))))
            leaders[other] = one
    return [leader(item) for item in range(len(leaders))]


def deal(
    names: Sequence[str],
    classes: Sequence[str],
    groups: Sequence[int],
    shares: Sequence[float],
    seed: int,
) -> list[int]:
    """Deals whole groups out to sides, so that each side has its share of every class as nearly as may be.

    The largest groups go first, each to the side that lacks most of its classes. It depends on nothing but the
    arguments, so that the order in which a file system lists the images does not matter.

    Args:
        names: Of the images.
        classes: Of the images.
        groups: Of the images: equal numbers stay together.
        shares: Of the sides; they add up to 1.
        seed: Another one deals otherwise.

    Returns:
        The side of each image.

    Raises:
        UserError: If a class has fewer groups than there are sides, or cannot have images on all sides.
    """
    numbers = {name: number for number, name in enumerate(sorted(set(classes)))}
    members: dict[int, list[int]] = {}
    for image, group in enumerate(groups):
        members.setdefault(group, []).append(image)
    counts = {group: Counter(numbers[classes[image]] for image in images) for group, images in members.items()}
    groups_left = np.zeros(len(numbers), int)
    for count in counts.values():
        groups_left[list(count)] += 1
    few = [name for name, number in numbers.items() if groups_left[number] < len(shares)]
    if few:
        raise UserError(
            f"classes with fewer than {len(shares)} images or groups of images ({listing(few)}): "
            f"{'split into fewer folds, or ' if len(shares) > 2 else ''}add images"
        )

    order = {
        group: number_for(seed, f"split {min(names[image] for image in images)}") for group, images in members.items()
    }
    wanted = np.outer(shares, np.bincount([numbers[name] for name in classes]))  # [sides, classes], and so are these
    has = np.zeros_like(wanted)
    sides = [0] * len(names)
    for group in sorted(members, key=lambda group: (-len(members[group]), min(counts[group]), order[group])):
        columns, count = list(counts[group]), np.array(list(counts[group].values()))
        without = has[:, columns] == 0
        must = (without & (groups_left[columns] <= without.sum(0))).any(1)  # every group that is left is needed there
        lacks = (wanted - has)[:, columns] @ (count / wanted[:, columns].sum(0))
        in_all = (wanted - has).sum(1)
        side = max(range(len(shares)), key=lambda side: (must[side], round(lacks[side], 9), round(in_all[side], 9)))
        has[side, columns] += count
        groups_left[columns] -= 1
        for image in members[group]:
            sides[image] = side
    missing = [name for name, number in numbers.items() if (has[:, number] == 0).any()]
    if missing:
        raise UserError(
            f"groups span classes so that some would have no images on one side ({listing(missing)}): "
            "split into fewer folds, or by another --group-by"
        )
    return sides
