# SPDX-License-Identifier: Apache-2.0
"""Weight files: readers of all supported formats, which run no code of the file, and the writer of .pdparams."""

from utils.formats.paddle_files import write_pdparams
from utils.formats.readers import DETECTRON2, NPZ, OLD_TORCH, PADDLE, SAFETENSORS, TORCH, file_format, read_file

__all__ = [
    'DETECTRON2',
    'NPZ',
    'OLD_TORCH',
    'PADDLE',
    'SAFETENSORS',
    'TORCH',
    'file_format',
    'read_file',
    'write_pdparams',
]
