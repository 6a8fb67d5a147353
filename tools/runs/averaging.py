"""Averages of the weights of networks: which checkpoints can be averaged, and the uniform and the greedy recipe.

Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time,
Wortsman et al., 2022, arXiv:2203.05482.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from models.groupmixformer import checkpoint_filter_fn
from utils import checkpoint
from utils.config import changes_answers, flatten, lookup
from utils.errors import UserError, listing
from utils.metrics import Score, describe
from utils.trained import saved_config, weights_name


@dataclass(frozen=True)
class Ingredient:
    """A checkpoint to average, without its weights.

    Attributes:
        path: Its file.
        name: Which of its weights: 'model' or 'ema'.
        shapes: The shape of each tensor, under our names.
        digest: Of the weights.
        config: What it was trained with, or None where it does not tell.
        classes: Class names by number, or None.
    """

    path: Path
    name: str
    shapes: dict[str, list[int]]
    digest: str
    config: CfgNode | None
    classes: list[str] | None

    def weights(self) -> Mapping[str, Tensor]:
        """Its weights under our names, which are read from its file each time."""
        return checkpoint_filter_fn(checkpoint.load(self.path)[self.name])


@dataclass(frozen=True)
class Mean:
    """The mean of the weights of networks, added up in double precision.

    Integers, such as the counters of batch norms, are the first network's.

    Attributes:
        first: The first network's weights.
        sums: The sums of all floating-point tensors.
        count: Number of networks.
    """

    first: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    count: int

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> "Mean":
        """The mean of one network."""
        sums = {name: tensor.double() for name, tensor in weights.items() if tensor.is_floating_point()}
        return cls(weights, sums, 1)

    def plus(self, weights: Mapping[str, Tensor]) -> "Mean":
        """The mean of one more network."""
        return Mean(self.first, {name: total + weights[name] for name, total in self.sums.items()}, self.count + 1)

    def weights(self) -> dict[str, Tensor]:
        """The mean, each tensor of its first type."""
        means = {name: (total / self.count).to(self.first[name].dtype) for name, total in self.sums.items()}
        return {name: means.get(name, tensor) for name, tensor in self.first.items()}


def look_at(path: Path, weights: str) -> Ingredient:
    """Looks into a checkpoint.

    Args:
        path: Its file.
        weights: 'model', 'ema', or 'auto' for the one that its best epoch was chosen by.

    Raises:
        UserError: If it is none, or its weights are no numbers.
    """
    state = checkpoint.load_for_task(path, "classification")
    name = weights_name(state, path, weights)
    tensors = checkpoint_filter_fn(state[name])
    if strange := [str(key) for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path} holds no weights under {listing(strange)}: name another file")
    if broken := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(f"{path} holds values that are no numbers under {listing(broken)}: leave it out")
    return Ingredient(
        path,
        name,
        shapes={key: list(value.shape) for key, value in tensors.items()},
        digest=checkpoint.digest(tensors),
        config=saved_config(state, path) if isinstance(state.get("config"), str) else None,
        classes=state.get("classes") or None,
    )


def look(paths: Sequence[Path], weights: str, with_configs: bool) -> list[Ingredient]:
    """Looks into all checkpoints; the same weights under another name are told of and passed over.

    Args:
        paths: Their files.
        weights: As in `look_at`.
        with_configs: Whether their configurations must agree.

    Raises:
        UserError: If they are not of one network, or all hold the same weights.
    """
    found: dict[str, Ingredient] = {}
    for path in tqdm(paths, "reading", unit=" checkpoints", leave=False, disable=None):
        new = look_at(path, weights)
        for old in found.values():
            check_same_network(old, new)
            if with_configs:
                check_same_settings(old, new)
        if new.digest in found:
            tqdm.write(f"{path} holds the same weights as {found[new.digest].path}: they count once")
        found.setdefault(new.digest, new)
    if len(found) == 1:
        raise UserError("all checkpoints hold the same weights: name others to average")
    return list(found.values())


def check_same_network(one: Ingredient, other: Ingredient) -> None:
    """Refuses two checkpoints of different networks.

    Raises:
        UserError: Naming the tensors or classes that differ.
    """
    if lacking := [name for name in one.shapes if name not in other.shapes]:
        raise UserError(f"{other.path} lacks {listing(lacking)}, which {one.path} has: leave one of them out")
    if extra := [name for name in other.shapes if name not in one.shapes]:
        raise UserError(f"{other.path} has {listing(extra)}, which {one.path} lacks: leave one of them out")
    misshapen = [
        f"{name} is {other.shapes[name]} and not {shape}"
        for name, shape in one.shapes.items()
        if other.shapes[name] != shape
    ]
    if misshapen:
        raise UserError(f"{other.path} does not fit {one.path}: {listing(misshapen)}: leave one of them out")
    if one.classes and other.classes and one.classes != other.classes:
        names = [f"{new} for {old}" for old, new in zip(one.classes, other.classes, strict=False) if old != new]
        raise UserError(f"{other.path} has other classes than {one.path} ({listing(names)}): leave one of them out")


def check_same_settings(one: Ingredient, other: Ingredient) -> None:
    """Refuses two checkpoints whose networks compute otherwise with the same tensors, or take other images.

    Raises:
        UserError: Naming the key that differs.
    """
    if one.config is None or other.config is None:
        return
    for key, old in flatten(one.config):
        new = lookup(other.config, key)
        if changes_answers(key) and old != new:
            raise UserError(
                f"{other.path} has {key} {new} and {one.path} {old}: leave one of them out, or name the configuration "
                "of the average with --cfg"
            )


def uniform(found: Sequence[Ingredient]) -> Mean:
    """The mean of all checkpoints."""
    mean = None
    for one in tqdm(found, "averaging", unit=" checkpoints", leave=False, disable=None):
        weights = one.weights()
        mean = mean.plus(weights) if mean else Mean.of(weights)
    return mean


def greedy(
    found: Sequence[Ingredient], score: Callable[[Mapping[str, Tensor]], Score]
) -> tuple[Mean, list[Ingredient], Score]:
    """The mean of the checkpoints that do not lower its accuracy, tried in the order of their own, the best first.

    Says what each step gave.

    Args:
        found: The checkpoints.
        score: Scores weights.

    Returns:
        The mean, what it is of, and its score.
    """
    scores = []
    for one in found:
        scores.append(score(one.weights()))
        print(f"{one.path}: {describe(scores[-1])}", flush=True)
    ranked = sorted(zip(found, scores, strict=True), key=lambda pair: -pair[1].correct1)  # ties in the order given
    best, reached = ranked[0]
    mean, taken = Mean.of(best.weights()), [best]
    print(f"begin with {best.path}")
    for one, _ in ranked[1:]:
        tried = mean.plus(one.weights())
        with_it = score(tried.weights())
        is_taken = with_it.correct1 >= reached.correct1
        print(f"with {one.path}: {describe(with_it)}, {'taken' if is_taken else 'left out'}", flush=True)
        if is_taken:
            mean, reached = tried, with_it
            taken.append(one)
    return mean, taken, reached
