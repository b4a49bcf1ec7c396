# SPDX-License-Identifier: Apache-2.0
"""UPerNet (https://arxiv.org/abs/1807.10221) on feature maps of four blocks of a Vision Transformer.

With the pyramid, relative positions and LayerScale it is the model of MAE (https://arxiv.org/abs/2111.06377), TinyMIM
(https://arxiv.org/abs/2301.01296) and "MLP Can Be A Good Transformer Learner" (https://arxiv.org/abs/2404.05657). With
the multi-level neck or no neck it is that of mmsegmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

from paddle import Tensor

from models.layers import tokens_to_maps
from models.options import dense_options
from models.registry import register_model
from models.segmentation.base import Segmentor
from models.segmentation.heads import LEVELS, FCNHead, UPerHead
from models.segmentation.necks import MultiLevelNeck, Pyramid
from models.weights.segmentation import UPerNetWeights
from utils.errors import UserError

_NECKS = {'pyramid': Pyramid, 'mln': lambda dim: MultiLevelNeck(dim, dim), 'none': lambda dim: None}


class UPerNet(Segmentor):
    """UPerNet with an FCN auxiliary head, which only training uses.

    Weight decay follows the recipe that each neck was published with. With the pyramid it applies to all tensors of two
    or more dimensions, including class token and position embedding. With the other necks it applies to all parameters
    except these two.

    Args:
        num_classes: K.
        out_indices: blocks with output feature maps, fine to coarse, from 0.
        neck: 'pyramid': `Pyramid`; 'mln': `MultiLevelNeck`; 'none': no neck.
        channels: channels of the head; None: those of the backbone.
        last_norm: apply the last LayerNorm of the backbone to the last map.
        aux_channels: channels of the auxiliary head; 0: no auxiliary head.
        head_drop_rate: channel dropout before the classifiers.
        encoder: further arguments of `VisionTransformer`.
    """

    weight_rules = UPerNetWeights()

    def __init__(
        self,
        num_classes: int = 1000,
        out_indices: Sequence[int] = (3, 5, 7, 11),
        neck: str = 'pyramid',
        channels: int | None = 768,
        last_norm: bool = False,
        aux_channels: int = 256,
        head_drop_rate: float = 0.0,
        **encoder,
    ):
        super().__init__(num_classes, final_norm=last_norm, **encoder)
        self.out_indices, self.last_norm = tuple(out_indices), last_norm
        self._check(neck)
        dim = self.embed_dim
        self.neck = _NECKS[neck](dim)
        self.decode_head = UPerHead(dim, channels or dim, num_classes, head_drop_rate)
        self.aux_level = 2 if neck == 'pyramid' else 3
        if aux_channels:
            self.auxiliary_head = FCNHead(dim, aux_channels, num_classes, head_drop_rate)
        self.decays_all = neck != 'pyramid'
        if self.neck is not None:
            self.stride = self.patch_size / 4

    def _check(self, neck: str) -> None:
        if neck not in _NECKS:
            raise UserError(f"there is no neck '{neck}' (MODEL.UPERNET.NECK); choose from {', '.join(_NECKS)}.")
        wanted = self.out_indices
        if len(wanted) != LEVELS or list(wanted) != sorted(wanted) or not 0 <= wanted[0] <= wanted[-1] < self.depth:
            raise UserError(
                f'MODEL.UPERNET.OUT_INDICES is {wanted}, but must be {LEVELS} blocks in ascending order of the blocks 0 to '
                f'{self.depth - 1}.'
            )
        if self.last_norm and wanted[-1] != self.depth - 1:
            raise UserError(
                f'MODEL.UPERNET.LAST_NORM needs the last block, {self.depth - 1}, in MODEL.UPERNET.OUT_INDICES.'
            )

    # ------------------------------------------------------------------------------------------------ forward
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Normalized images [B, in_chans, H, W], sides divisible by the patch size -> logits.

        Returns:
            Logits [B, K, H / stride, W / stride]. In training with an auxiliary head, a pair of them and its logits.
        """
        maps = self.forward_features(x)
        logits = self.forward_head(maps)
        if not self.training or self.auxiliary_head is None:
            return logits
        return logits, self.auxiliary_head(maps[self.aux_level])

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images -> the four input maps of the heads."""
        maps = self.backbone_maps(x)
        return maps if self.neck is None else self.neck(maps)

    def backbone_maps(self, x: Tensor) -> list[Tensor]:
        """Images -> the outputs of `out_indices`, [B, C, H / patch_size, W / patch_size]."""
        results = self.backbone.forward_intermediates(x, self.out_indices, ('maps',))
        maps = [results.blocks[index].maps for index in self.out_indices]
        if self.last_norm:
            maps[-1] = tokens_to_maps(results.features, results.state.grid, self.backbone.num_prefix)
        return maps

    def forward_head(self, x: Sequence[Tensor]) -> Tensor:
        """Maps of `forward_features` -> logits of the decoder."""
        return self.decode_head(x)

    def no_weight_decay(self) -> set[str]:
        """Return no names with the pyramid; class token and position embedding with the other necks."""
        return {'backbone.cls_token', 'backbone.pos_embed'} if self.decays_all else set()

    @property
    def has_unused_parameters(self) -> bool:
        """See `Classifier`: blocks after the last output block get no gradients."""
        return self.out_indices[-1] < self.depth - 1


@register_model('upernet')
def build_upernet(config) -> UPerNet:
    """Build UPerNet from a configuration."""
    model, upernet = config.MODEL, config.MODEL.UPERNET
    return UPerNet(
        num_classes=model.NUM_CLASSES,
        out_indices=upernet.OUT_INDICES,
        neck=upernet.NECK,
        channels=upernet.CHANNELS,
        last_norm=upernet.LAST_NORM,
        aux_channels=upernet.AUX_CHANNELS,
        head_drop_rate=model.HEAD_DROPOUT,
        **dense_options(config),
    )
