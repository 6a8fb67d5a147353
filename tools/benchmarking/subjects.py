"""What is measured: one network in one form, doing one kind of step."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.benchmarking.networks import LITERAL, PLAIN, RECOMPUTED, compile_network, forms_of, in_form
from utils.precision import Precision

_BATCHES = 3  # distinct ones, so that no cache holds the images from step to step


@dataclass(frozen=True)
class Subject:
    """One line of the results.

    Attributes:
        network: Its name.
        form: 'plain', 'literal', 'fused' or 'recomputed'.
        mode: 'infer' or 'train'.
        precision: 'fp32', 'bf16' or 'fp16'.
        compiled: Whether torch.compile is used.
        batch_size: Images of a step.
    """

    network: str
    form: str
    mode: str
    precision: str
    compiled: bool
    batch_size: int

    @property
    def label(self) -> str:
        """Network and form, as tables and charts name them."""
        words = [self.form] if self.form != PLAIN else []
        return " ".join([self.network, *words, *(["compiled"] if self.compiled else [])])

    def __str__(self) -> str:
        return f"{self.label}, {self.mode}, {self.precision}, batch {self.batch_size}"


def plan(
    networks: Mapping[str, nn.Module],
    modes: Sequence[str],
    precisions: Sequence[str],
    batch_sizes: Sequence[int],
    compiled: bool,
    fused: bool,
    recomputed: bool,
) -> list[Subject]:
    """All subjects of a run, each once, in the order of the tables.

    Args:
        networks: The networks by name.
        modes: 'infer' and 'train', or one of them.
        precisions: Of 'fp32', 'bf16' and 'fp16'.
        batch_sizes: Images of a step.
        compiled: Whether all but the literal form, which is a baseline, and the recomputed one, which does not fit, are
            measured with torch.compile too.
        fused: Whether ours is measured in its fused form too.
        recomputed: Whether ours is trained with activations that are recomputed, too.
    """
    subjects = [
        Subject(name, form, mode, precision, with_compile, batch_size)
        for mode, precision, batch_size in itertools.product(modes, precisions, batch_sizes)
        for name, network in networks.items()
        for form in forms_of(network, fused, recomputed, mode)
        for with_compile in ((False, True) if compiled and form not in (LITERAL, RECOMPUTED) else (False,))
    ]
    return list(dict.fromkeys(subjects))


class Step:
    """A subject at work: each call is one step on the next of a few batches.

    Networks and images are channels_last, but for the literal form, whose images are [B, C, H, W] in memory as
    published. A training step is cross-entropy, its gradients and an update of AdamW.

    Args:
        subject: What is measured.
        network: Its network in plain form; it is copied.
        size: Height and width of the images.
        device: Where to compute.
    """

    def __init__(self, subject: Subject, network: nn.Module, size: int, device: torch.device) -> None:
        literal = subject.form == LITERAL
        layout = torch.contiguous_format if literal else torch.channels_last
        generator = torch.Generator().manual_seed(0)
        shape = (subject.batch_size, 3, size, size)
        self._batches = itertools.cycle(
            [torch.randn(shape, generator=generator).to(device, memory_format=layout) for _ in range(_BATCHES)]
        )
        self._training = subject.mode == "train"
        self._precision = Precision(subject.precision, device.type)
        network = in_form(network, subject.form).train(self._training).to(device, memory_format=layout)
        if self._training:
            self._optimizer = torch.optim.AdamW(network.parameters(), fused=True)
            self._scaler = self._precision.grad_scaler()
            self._targets = torch.arange(subject.batch_size, device=device) % 2
        # Inductor folds constant weights ("freezing") in a whole network only.
        frozen = not self._training and device.type == "cpu"
        self._network = compile_network(network, whole=frozen) if subject.compiled else network

    def __call__(self) -> None:
        """Takes the step."""
        images = next(self._batches)
        if self._training:
            self._update(images)
        else:
            with torch.no_grad(), self._precision.autocast():
                self._network(images)

    def _update(self, images: Tensor) -> None:
        with self._precision.autocast():
            loss = F.cross_entropy(self._network(images), self._targets)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()  # last, so that nobody's gradients are held while others are measured
