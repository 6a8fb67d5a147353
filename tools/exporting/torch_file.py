"""torch.export's own file, and AOTInductor's package of compiled code."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from tools.exporting.checking import Run
from utils.errors import UserError, reason

INFORMATION = "information.json"


def write_program(program: ExportedProgram, path: Path, information: dict[str, str]) -> None:
    """Writes a captured network, and what it tells about itself as an extra file."""
    torch.export.save(program, path, extra_files={INFORMATION: json.dumps(information, indent=2)})


def open_program(path: Path) -> Run:
    """Reads a captured network back."""
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:  # the module itself refuses to be set to evaluation, which it is in for good
        return module(images)

    return run


def write_compiled(program: ExportedProgram, path: Path, information: dict[str, str]) -> None:
    """Compiles a captured network for this machine's CPU.

    Raises:
        UserError: If it does not compile.
    """
    settings = {"aot_inductor.metadata": information}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except Exception as error:  # of the compiler's many passes, and of the C++ compiler
        raise UserError(f"AOTInductor cannot compile the network ({reason(error)}): use --form torch-export") from None


def open_compiled(path: Path) -> Run:
    """Loads compiled code, which asks for images that lie as [B, C, H, W] in memory, and does not look.

    Their strides must say so too, which those of grey images need not after `contiguous`: hence the copy.
    """
    package = torch._inductor.aoti_load_package(str(path))

    def run(images: Tensor) -> Tensor:
        return package(images.clone(memory_format=torch.contiguous_format))

    return run
