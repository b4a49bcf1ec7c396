# SPDX-License-Identifier: Apache-2.0
"""Export to and inference with Paddle inference programs, which run without the Python code of the model.

`PREFIX.json` holds the program, `PREFIX.pdiparams` its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Union

import numpy as np
import paddle
from paddle import inference, nn
from paddle.static import InputSpec

from utils.environment import cpu_flags, has_bfloat16, kept_openmp_threads
from utils.formats.program_files import check_parameters, check_program

PROGRAM, WEIGHTS = '.json', '.pdiparams'
PREPROCESS = '.preprocess.json'  # preprocessing of the images, written by tools/export.py
INPUT_NAME = 'x'
PRECISIONS = ('fp32', 'bf16', 'int8')
GPU_POOL_MB = 256  # initial size of the memory pool, which grows
NOTHING: Mapping[str, np.ndarray] = MappingProxyType({})
Outputs = Union[np.ndarray, tuple]


def save_program(
    model: nn.Layer, image_shape: Sequence[int], prefix: str, more: Mapping[str, np.ndarray] = NOTHING
) -> None:
    """Export a model in evaluation mode as a program with the float32 input `x` [any batch, *image_shape].

    The model stays in evaluation mode.

    Args:
        more: examples of further inputs by name, in the order of the arguments of `forward`; dtypes and shapes are used.
    """
    model.eval()
    specs = [InputSpec([None, *image_shape], 'float32', name=INPUT_NAME)]
    specs += [InputSpec([None, *array.shape[1:]], str(array.dtype), name=name) for name, array in more.items()]
    static = paddle.jit.to_static(model, input_spec=specs, full_graph=True)
    try:
        paddle.jit.save(static, prefix)
    finally:
        model.forward.rollback()  # to_static replaced the forward method of the model by the program


def check_files(prefix: str) -> None:
    """Check program and weights before Paddle loads them. Raises OSError or ValueError, see `utils.formats.program_files`."""
    if not paddle.get_flags('FLAGS_enable_pir_api')['FLAGS_enable_pir_api']:
        raise ValueError(
            'FLAGS_enable_pir_api=0 makes Paddle read programs of earlier versions, which can run code; unset this variable'
        )
    check_program(prefix + PROGRAM)
    check_parameters(prefix + WEIGHTS)


class Predictor:
    """Run a program of `save_program` on the GPU if there is one, else on the CPU with oneDNN.

    Args:
        prefix: path of the program without its suffix.
        precision: 'fp32', or 'bf16': bfloat16 for the operators that have bfloat16 kernels.
    """

    def __init__(self, prefix: str, precision: str = 'fp32'):
        check_files(prefix)
        config = inference.Config(prefix + PROGRAM, prefix + WEIGHTS)
        device, _, number = paddle.device.get_device().partition(':')
        if device == 'gpu':
            kind = inference.PrecisionType.Bfloat16 if precision == 'bf16' else inference.PrecisionType.Float32
            config.enable_use_gpu(GPU_POOL_MB, int(number), kind)
        else:
            config.disable_gpu()
            config.set_cpu_math_library_num_threads(cpu_threads())
            config.enable_mkldnn()
            if precision == 'bf16':
                config.enable_mkldnn_bfloat16()
                # Paddle 3.3: this pass splits bfloat16 tensors but declares float32, so that MS-MLP and ToMe fail.
                config.delete_pass('cpu_special_ops_bf16_pass')
        config.switch_ir_optim(True)
        config.enable_new_executor(True)
        config.enable_new_ir(True)  # oneDNN passes need it
        config.enable_memory_optim()
        config.disable_glog_info()
        self._predictor = inference.create_predictor(config)
        names = self._predictor.get_output_names()
        self._outputs = [self._predictor.get_output_handle(name) for name in names]

    def __call__(self, images: np.ndarray, **more: np.ndarray) -> Outputs:
        """Normalized images [B, C, H, W] float32 and further inputs by name -> logits [B, K] float32, or several outputs."""
        for name, array in {INPUT_NAME: images, **more}.items():
            handle = self._predictor.get_input_handle(name)
            handle.reshape(array.shape)
            handle.copy_from_cpu(np.ascontiguousarray(array))
        with kept_openmp_threads():  # Paddle leaves one: layers would be half as fast afterwards
            self._predictor.run()
        outputs = tuple(handle.copy_to_cpu() for handle in self._outputs)
        return outputs if len(outputs) > 1 else outputs[0]


def cpu_threads() -> int:
    """Return the number of CPU threads per operator."""
    return paddle.get_flags('FLAGS_paddle_num_threads')['FLAGS_paddle_num_threads']


def emulates_bfloat16() -> bool:
    """Return whether the CPU emulates bfloat16, which is about a hundred times slower than float32.

    Only x86 processors under Linux are checked; for all others the result is False.
    """
    return paddle.device.get_device() == 'cpu' and bool(cpu_flags()) and not has_bfloat16()
