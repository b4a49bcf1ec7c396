# SPDX-License-Identifier: Apache-2.0
"""Models as files that run without their Python code: Paddle's inference programs.

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

PROGRAM, WEIGHTS = '.json', '.pdiparams'
PREPROCESS = '.preprocess.json'  # what to do to an image before, written by tools/export.py
INPUT_NAME = 'x'
PRECISIONS = ('fp32', 'bf16')
GPU_POOL_MB = 256  # what a predictor takes at first; it grows
NOTHING: Mapping[str, np.ndarray] = MappingProxyType({})
Outputs = Union[np.ndarray, tuple]


def save_program(
    model: nn.Layer, image_shape: Sequence[int], prefix: str, more: Mapping[str, np.ndarray] = NOTHING
) -> None:
    """Writes the evaluation of a model as a program of the float32 input `x` [any batch, *image_shape].

    The model is left in evaluation mode.

    Args:
        more: further inputs by name, in the order of the arguments of `forward`; their types and shapes count.
    """
    model.eval()
    specs = [InputSpec([None, *image_shape], 'float32', name=INPUT_NAME)]
    specs += [InputSpec([None, *array.shape[1:]], str(array.dtype), name=name) for name, array in more.items()]
    static = paddle.jit.to_static(model, input_spec=specs, full_graph=True)
    try:
        paddle.jit.save(static, prefix)
    finally:
        model.forward.rollback()  # to_static put the program in the place of the model's own forward


class Predictor:
    """Runs a program that `save_program` wrote: on the GPU when there is one, else on the CPU with oneDNN.

    Args:
        prefix: path of the program without its suffix.
        precision: 'fp32', or 'bf16' for bfloat16 where the device has kernels for it.
    """

    def __init__(self, prefix: str, precision: str = 'fp32'):
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
                # Paddle 3.3: it splits tensors in bfloat16 and declares them float32, so that programs fail (MS-MLP, ToMe).
                config.delete_pass('cpu_special_ops_bf16_pass')
        config.switch_ir_optim(True)
        config.enable_new_executor(True)
        config.enable_new_ir(True)  # without it the oneDNN passes are not applied
        config.enable_memory_optim()
        config.disable_glog_info()
        self._predictor = inference.create_predictor(config)
        names = self._predictor.get_output_names()
        self._outputs = [self._predictor.get_output_handle(name) for name in names]

    def __call__(self, images: np.ndarray, **more: np.ndarray) -> Outputs:
        """Normalized images [B, C, H, W] float32, and further inputs by name -> logits [B, K] float32, or several outputs."""
        for name, array in {INPUT_NAME: images, **more}.items():
            handle = self._predictor.get_input_handle(name)
            handle.reshape(array.shape)
            handle.copy_from_cpu(np.ascontiguousarray(array))
        self._predictor.run()
        outputs = tuple(handle.copy_to_cpu() for handle in self._outputs)
        return outputs if len(outputs) > 1 else outputs[0]


def cpu_threads() -> int:
    """Threads of one operation on the CPU."""
    return paddle.get_flags('FLAGS_paddle_num_threads')['FLAGS_paddle_num_threads']


def emulates_bfloat16() -> bool:
    """Whether bfloat16 is computed without instructions for it, a hundred times slower than float32.

    Known of x86 processors under Linux; others are taken at their word.
    """
    if paddle.device.get_device() != 'cpu':
        return False
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            flags = next((line.split() for line in file if line.startswith('flags')), None)
    except OSError:
        return False
    return flags is not None and not {'avx512_bf16', 'amx_bf16'} & set(flags)
