"""The forms that a network is exported to, and what is asked of each before any long work."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from utils.cli import check_new
from utils.errors import UserError, listing


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes:
        ending: Of the file's name; '' for a folder.
        precisions: What it can be written in.
        can_fuse: Whether the network rewritten for inference can be written.
        packages: What has to be installed for it.
        refusal: Why not in the other precisions, and what to use.
    """

    ending: str
    precisions: tuple[str, ...]
    can_fuse: bool
    packages: tuple[str, ...]
    refusal: str


_TRACER = "torch.fx.experimental.dynamic_spec"  # newer than what the rest of the code asks of torch
FORMS = {
    "onnx": Form(
        ".onnx",
        ("fp32", "int8"),
        True,
        (_TRACER, "onnx", "onnxscript", "onnxruntime"),
        "onnxruntime has no bf16 convolution for CPUs: use int8, or --form torch-export",
    ),
    "torch-export": Form(".pt2", ("fp32", "bf16"), True, (_TRACER,), "int8 is made by onnxruntime: use --form onnx"),
    "aoti": Form(".pt2", ("fp32", "bf16"), True, (_TRACER,), "int8 is made by onnxruntime: use --form onnx"),
    "timm": Form("", ("fp32",), False, (), "timm loads fp32 weights: leave --precision out"),
}


def check_request(name: str, output: Path, precision: str) -> None:
    """Refuses what cannot be written.

    Args:
        name: The form's.
        output: The file or folder to write.
        precision: Of what is written.

    Raises:
        UserError: If the place is taken, is in no folder or has the wrong ending, the form has no such precision, or
            something that it needs is not installed.
    """
    form = FORMS[name]
    if precision not in form.precisions:
        raise UserError(f"--form {name} is not written in {precision}: {form.refusal}")
    check_new(output, "--output", form.ending)
    if missing := [package for package in form.packages if importlib.util.find_spec(package) is None]:
        raise UserError(
            f"--form {name} needs {listing(missing)}, not installed: pip install -r requirements-downstream.txt"
        )
    if name == "aoti" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("--form aoti needs a C++ compiler: install g++, or name one by the variable CXX")
