# SPDX-License-Identifier: Apache-2.0
"""Pre-norm block of the Vision Transformer (https://arxiv.org/abs/2010.11929) with a token mixer and token reducers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paddle import Tensor, nn
from paddle.nn import initializer

from models.layers.attention import CLASS_ROW, AttentionMaps
from models.layers.basic import LayerNorm
from models.layers.drop_path import DropPath
from models.layers.init import scale_
from models.layers.intermediates import Recorder, tokens_to_maps
from models.layers.mlp import Mlp, hidden_channels
from models.layers.tokens import TokenReducer, TokenState
from utils.errors import UserError

NORM_EPS = 1e-6


class Block(nn.Layer):
    """Pre-norm Transformer block: mix the tokens, reduce their number, then an MLP on each.

    Args:
        dim: channels C.
        mixer: token mixer with the signature of `Attention`; None: the block doubles its input instead.
        reducers: token reducers between mixer and MLP, run in order.
        mlp_ratio: hidden channels of the MLP / C.
        drop_rate: dropout of the MLP.
        drop_path_rate: stochastic depth of both branches.
        layer_scale: initial LayerScale value of both branches (CaiT); None: no LayerScale.
        hidden_dropout: see `Mlp`.
        norm_eps: epsilon of both LayerNorms.

    Attributes:
        attn_weight: λ, see `set_attn_weight`.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Layer | None,
        reducers: Sequence[TokenReducer] = (),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        hidden_dropout: bool = True,
        norm_eps: float = NORM_EPS,
    ):
        super().__init__()
        check_reducers(mixer, reducers)
        self.norm1 = self.attn = self.gamma_1 = self.gamma_2 = None
        if mixer is not None:
            self.norm1 = LayerNorm(dim, epsilon=norm_eps)
            self.attn = mixer
        self.norm2 = LayerNorm(dim, epsilon=norm_eps)
        self.mlp = Mlp(dim, hidden_channels(dim, mlp_ratio), drop_rate, hidden_dropout)
        self.drop_path = DropPath(drop_path_rate)
        if layer_scale is not None:
            if mixer is not None:
                self.gamma_1 = self.create_parameter([dim], default_initializer=initializer.Constant(layer_scale))
            self.gamma_2 = self.create_parameter([dim], default_initializer=initializer.Constant(layer_scale))
        self.reducers = nn.LayerList(reducers)
        self.set_attn_weight(0.0 if mixer is None else 1.0)

    def set_attn_weight(self, weight: float, identity: float | None = None) -> None:
        """Set λ: the following passes compute identity * x + weight * attention(x) (arXiv 2404.05657).

        With weight 0 the block skips attention and the token reducers.

        Args:
            weight: λ.
            identity: factor of the input; None: 2 - weight.
        """
        self.attn_weight = weight
        self.identity_weight = 2.0 - weight if identity is None else identity

    def forward(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """[B, N, C] -> [B, N', C] and the input state of the next block."""
        want = state.want.get(len(state.counts))
        before, record = state, Recorder(want or ())
        if record.wants('block_input'):
            record.keep('block_input', (x, before._replace(want={}, recorded=())))
        if self.attn_weight:
            x, state = self._mix(x, state, record)
            hidden = self.norm2(x)
        else:
            x = self.identity_weight * x
            hidden = record.keep('inputs', self.norm2(x))
        hidden = record.keep('mlp_out', self.mlp(hidden))
        x = x + self.drop_path(_scaled(hidden, self.gamma_2))
        state = state._replace(counts=(*state.counts, state.num_body), keys=None, class_attention=None)
        if want is not None:
            state = state._replace(recorded=(*state.recorded, _finish(record, x, before, state)))
        return x, state

    def _mix(self, x: Tensor, state: TokenState, record: Recorder) -> tuple[Tensor, TokenState]:
        selects = any(reducer.needs_class_attention(state) for reducer in self.reducers)
        mixed, maps = self.attn(
            record.keep('inputs', self.norm1(x)),
            need_maps=record.wants('attn_logits', 'attn') or (CLASS_ROW if selects else False),
            need_keys=any('keys' in reducer.needs for reducer in self.reducers),
            key_bias=self._key_bias(state),
            bias=state.bias,
            grid=state.grid,
        )
        record.keep('attn_logits', maps.logits)
        record.keep('attn', maps.weights)
        mixed = self.drop_path(_scaled(record.keep('attn_out', mixed), self.gamma_1))
        x = x + mixed if self.attn_weight == 1 else self.identity_weight * x + self.attn_weight * mixed
        return self._reduce(x, maps, state, selects)

    def _key_bias(self, state: TokenState) -> Tensor | None:
        """Return the first reducer's bias of the attention logits per key, [B, 1, 1, N]; None: no reducer has one."""
        biases = [reducer.key_bias(state) for reducer in self.reducers]
        return next((bias for bias in biases if bias is not None), None)

    def _reduce(self, x: Tensor, maps: AttentionMaps, state: TokenState, selects: bool) -> tuple[Tensor, TokenState]:
        attention = maps.weights[:, :, 0].mean(1) if selects else None
        state = state._replace(keys=maps.keys, class_attention=attention)
        for reducer in self.reducers:
            if reducer.acts(state):
                x, state = reducer(x, state)
        return x, state


def check_reducers(mixer: nn.Layer | None, reducers: Sequence[TokenReducer]) -> None:
    """Raise UserError if a reducer needs intermediate results that the mixer does not compute."""
    for reducer in reducers:
        missing = sorted(set(reducer.needs) - set(getattr(mixer, 'offers', ())))
        if reducer.reduces and missing:
            raise UserError(
                f'{type(reducer).__name__} needs the {missing[0]} of attention, which {type(mixer).__name__} '
                '(MODEL.TRANS.MIXER) does not compute; remove one of the two.'
            )


def rescale_branches(blocks: Iterable[Block]) -> None:
    """Divide the last layer of each branch in block i (from 1) by sqrt(2 i), the initialization of BEiT."""
    for number, block in enumerate(blocks, 1):
        if block.attn is not None:
            scale_(_last_linear(block.attn).weight, (2.0 * number) ** -0.5)
        scale_(block.mlp.fc2.weight, (2.0 * number) ** -0.5)


def _last_linear(mixer: nn.Layer) -> nn.Linear:
    if not hasattr(mixer, 'proj'):
        raise UserError(
            f'MODEL.TRANS.RESCALED_INIT needs a last layer `proj` in each mixer; {type(mixer).__name__} has none.'
        )
    return mixer.proj


def _finish(record: Recorder, x: Tensor, before: TokenState, state: TokenState):
    """Return the recorded results, with the output `x` of the block and the token states before and after it."""
    record.keep('tokens', x)
    if record.wants('maps'):
        record.keep('maps', tokens_to_maps(x, state.grid, state.num_prefix))
    if record.wants('source'):
        record.values['source'] = state.source if state.is_reduced else None
        # EViT with one fused token does not change the number of tokens.
        fewer = state.num_body < before.num_body
        record.values['reduced'] = fewer or len(state.indices) > len(before.indices)
    return record.result()


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else branch * gamma
