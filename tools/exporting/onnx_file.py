"""ONNX: writing, quantizing, and running by onnxruntime."""

from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor
from torch.export import ExportedProgram

from tools.exporting.checking import Run

_AXES = ("batch", "height", "width")
_QUANTIZED = ["MatMul"]  # onnxruntime has no fast 8-bit convolution whose scales are found as it runs


def write_onnx(program: ExportedProgram, path: Path, information: dict[str, str]) -> None:
    """Writes a captured network.

    Args:
        program: From `capture`.
        path: The file.
        information: Kept in the file's metadata.
    """
    written = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    model = written.model_proto
    _name_axes(model)
    onnx.helper.set_model_props(model, information)
    onnx.save(model, path)


def _name_axes(model: onnx.ModelProto) -> None:
    """Puts names in the place of torch's symbols; sizes inside follow from them and are left to the runtime."""
    dims = [dim for dim in model.graph.input[0].type.tensor_type.shape.dim if dim.dim_param]
    names = dict(zip([dim.dim_param for dim in dims], _AXES, strict=True))
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names[dim.dim_param]
    del model.graph.value_info[:]


def quantize(source: Path, target: Path, information: dict[str, str]) -> int:
    """Rounds the matrices of linear layers to 8 bits; their inputs are rounded as the file runs.

    Convolutions and the products of attention, which have no fixed matrix, stay in float32.

    Args:
        source: A float32 file.
        target: The file to write.
        information: Kept in its metadata.

    Returns:
        How many matrices there are.
    """
    prepared = target.with_name("prepared.onnx")
    quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
    quantize_dynamic(prepared, target, op_types_to_quantize=_QUANTIZED, per_channel=True, weight_type=QuantType.QInt8)
    model = onnx.load(target)
    onnx.helper.set_model_props(model, information)
    onnx.save(model, target)
    return sum(node.op_type == "MatMulInteger" for node in model.graph.node)


def open_onnx(path: Path) -> Run:
    """Opens a file to be run on the CPU, with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)

    return run
