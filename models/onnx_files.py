# SPDX-License-Identifier: Apache-2.0
"""ONNX files: conversion of inference programs, and inference with ONNX Runtime and OpenVINO. Packages: requirements-deploy.txt."""

from __future__ import annotations

import contextlib
import importlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType

import numpy as np

from models.exported import INPUT_NAME, PROGRAM, WEIGHTS, Outputs, check_files, cpu_threads
from utils.errors import UserError
from utils.text import NAME, printable

ONNX = '.onnx'
OPSET = 17  # version of the ONNX operators
# paddle2onnx may end its process, and with it what is in the buffer of C's stdout: 2 is _IONBF. Polygraphy, its optimizer, fails
# on some models, and would install packages; engines optimize the graph themselves.
_CONVERT = """
import contextlib, ctypes, sys
with contextlib.suppress(ValueError):
    libc = ctypes.CDLL(None)
    libc.setvbuf(ctypes.c_void_p.in_dll(libc, 'stdout'), None, 2, 0)
import paddle2onnx
program, weights, target, opset = sys.argv[1:]
paddle2onnx.export(program, weights, target, opset_version=int(opset), optimize_tool='None')
"""


def optional_package(name: str) -> ModuleType:
    """Import a package of requirements-deploy.txt. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'{name} cannot be imported ({error}): pip install -r requirements-deploy.txt.') from None


def convert_program(prefix: str) -> str:
    """Convert the program `prefix` of `models.exported.save_program` to the ONNX file PREFIX.onnx; return its path.

    A process of its own converts it, since paddle2onnx ends the process on operators that it does not know.

    Raises:
        UserError: paddle2onnx is not installed, or does not know an operator of the program.
    """
    optional_package('onnx')
    check_files(prefix)
    target = prefix + ONNX
    command = [sys.executable, '-W', 'ignore', '-c', _CONVERT, prefix + PROGRAM, prefix + WEIGHTS, target, str(OPSET)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace', check=False
    )
    if done.returncode:
        if "No module named 'paddle2onnx'" in done.stderr:
            raise UserError('paddle2onnx is not installed: pip install -r requirements-deploy.txt.')
        raise UserError(f'paddle2onnx cannot convert this model to ONNX: {_reason(done)}')
    return target


def _reason(done: subprocess.CompletedProcess) -> str:
    """Return why a conversion failed: the first error that it printed, else its last line, else its exit status."""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith('[ERROR]')]
    if not lines:
        return f'it ended with status {done.returncode}.'
    text = (errors or lines[-1:])[0].replace('[ERROR]', '').replace('[Paddle2ONNX]', '')
    return printable(text.strip(), NAME)


def quantize_weights(path: str) -> str:
    """Quantize the linear layers of an ONNX file to int8; return the path of the new file, PREFIX.int8.onnx.

    Weights have one scale per output channel. Activations get theirs in each run, so that no images are needed here.

    Raises:
        UserError: ONNX Runtime or onnx is not installed.
    """
    optional_package('onnx')
    quantization = optional_package('onnxruntime.quantization')
    target = f'{path.removesuffix(ONNX)}.int8{ONNX}'
    with _silent(), tempfile.TemporaryDirectory() as folder:
        folded = f'{folder}/folded{ONNX}'  # weights become constants, which the quantizer looks for
        quantization.quant_pre_process(path, folded, skip_symbolic_shape=True)
        quantization.quantize_dynamic(
            folded,
            target,
            op_types_to_quantize=['MatMul', 'Gemm'],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={'MatMulConstBOnly': True},
        )
    return target


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress notes of the quantizer, a line for each operator, in this block."""
    runtime, before = optional_package('onnxruntime'), logging.root.manager.disable
    logging.disable(logging.WARNING)
    runtime.set_default_logger_severity(4)
    try:
        yield
    finally:
        logging.disable(before)
        runtime.set_default_logger_severity(2)


class OnnxRuntime:
    """Run an ONNX file with ONNX Runtime on the CPU: float32, and int8 where the file has it.

    Args:
        path: the ONNX file.

    Raises:
        UserError: ONNX Runtime is not installed, or refuses the file.
    """

    def __init__(self, path: str):
        runtime = optional_package('onnxruntime')
        options = runtime.SessionOptions()
        options.intra_op_num_threads = cpu_threads()
        options.log_severity_level = 4  # errors are raised
        try:
            self._session = runtime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        except Exception as error:  # its exceptions have no common class
            raise UserError(f'ONNX Runtime does not run the converted model: {printable(error, NAME)}') from None

    def __call__(self, images: np.ndarray, **more: np.ndarray) -> Outputs:
        """See `models.exported.Predictor`."""
        outputs = tuple(self._session.run(None, {INPUT_NAME: images, **more}))
        return outputs if len(outputs) > 1 else outputs[0]


class OpenVino:
    """Run an ONNX file with OpenVINO on the CPU.

    Args:
        path: the ONNX file.
        precision: 'fp32', or 'bf16': bfloat16 for the operators that have bfloat16 kernels.

    Raises:
        UserError: OpenVINO is not installed, or refuses the file.
    """

    def __init__(self, path: str, precision: str = 'fp32'):
        settings = {
            'INFERENCE_PRECISION_HINT': 'bf16' if precision == 'bf16' else 'f32',
            'INFERENCE_NUM_THREADS': cpu_threads(),
            'PERFORMANCE_HINT': 'LATENCY',
        }
        openvino = optional_package('openvino')
        try:
            self._compiled = openvino.Core().compile_model(path, 'CPU', settings)
        except RuntimeError as error:
            raise UserError(f'OpenVINO does not run the converted model: {printable(error, NAME)}') from None
        self._request = self._compiled.create_infer_request()

    def __call__(self, images: np.ndarray, **more: np.ndarray) -> Outputs:
        """See `models.exported.Predictor`."""
        found = self._request.infer({INPUT_NAME: np.ascontiguousarray(images), **more})
        outputs = tuple(found[output].copy() for output in self._compiled.outputs)
        return outputs if len(outputs) > 1 else outputs[0]
