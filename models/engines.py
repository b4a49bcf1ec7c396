# SPDX-License-Identifier: Apache-2.0
"""Inference engines, chosen by ENGINE: the layers of a model, its Paddle program, or its ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
from paddle import Tensor, nn

from models.exported import Outputs, Predictor, emulates_bfloat16, save_program
from models.onnx_files import OnnxRuntime, OpenVino, convert_program, quantize_weights
from utils.errors import UserError
from utils.temporary import temporary_folder

LAYERS = 'dygraph'
ENGINES = (LAYERS, 'paddle', 'onnxruntime', 'openvino')
Engine = Callable[..., Outputs]  # normalized images [B, C, H, W] float32 -> the outputs of the model


def check_engine(engine: str, precision: str = 'fp32') -> None:
    """Raise UserError if an engine does not run in a precision on this machine."""
    if precision == 'fp32':
        return
    if precision == 'int8':
        if engine != 'onnxruntime':
            raise UserError(
                f'-engine {engine} does not run in int8 (ENGINE_PRECISION or -precision), which needs -engine onnxruntime.'
            )
        return
    if engine not in ('paddle', 'openvino'):
        raise UserError(
            f'-engine {engine} runs in fp32; bf16 (ENGINE_PRECISION or -precision) needs -engine paddle or openvino.'
        )
    if emulates_bfloat16():
        raise UserError(
            'this processor has no instructions for bfloat16 (avx512_bf16, amx_bf16): leave -precision and ENGINE_PRECISION out.'
        )


def write_engine_file(engine: str, model: nn.Layer, image_shape: Sequence[int], prefix: str) -> str:
    """Export a model to the file that an engine reads, and return what `open_engine` takes.

    Args:
        prefix: path of the files without suffix.
    """
    save_program(model, image_shape, prefix)
    return prefix if engine == 'paddle' else convert_program(prefix)


def open_engine(engine: str, source: str, precision: str = 'fp32') -> Engine:
    """Return an engine for a file of `write_engine_file`. For int8, the quantized file is written next to it."""
    if engine == 'onnxruntime':
        return OnnxRuntime(quantize_weights(source) if precision == 'int8' else source)
    return {'paddle': Predictor, 'openvino': OpenVino}[engine](source, precision)


class EngineModel(nn.Layer):
    """A model whose forward pass is computed by an engine; its attributes are those of the model.

    Args:
        model: its layers, with the weights to use.
        engine: one of ENGINES, apart from `dygraph`.
        image_shape: (C, H, W).
        precision: of the engine.
    """

    def __init__(self, model: nn.Layer, engine: str, image_shape: Sequence[int], precision: str = 'fp32'):
        super().__init__()
        with temporary_folder('engine') as folder:
            source = write_engine_file(engine, model, image_shape, f'{folder}/model')
            self._engine = open_engine(engine, source, precision)
        object.__setattr__(self, '_model', model)  # no sublayer: nothing is to be trained or saved here
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> the output of the model."""
        return paddle.to_tensor(self._engine(images.numpy()))

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, '_model'), name)
