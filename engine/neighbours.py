# SPDX-License-Identifier: Apache-2.0
"""How good features are, without training anything on them: each validation image is classified by its neighbours.

The protocol is that of "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
https://arxiv.org/abs/1805.01978, section 3.4, as DINO evaluates by it, https://arxiv.org/abs/2104.14294.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F

import datasets
from datasets.batch import to_tensor
from datasets.subset import evenly_spaced
from engine.distributed import Context
from engine.evaluate import Interrupted, Measure
from utils.errors import UserError
from utils.runlog import progress

NEIGHBOURS = 20
TEMPERATURE = 0.07  # a neighbour's vote is exp(cosine similarity / this)
MAX_IMAGES = 100_000  # training images that are looked at, evenly spaced over the set
TITLES = {'knn_acc1': 'kNN Acc@1', 'knn_acc5': 'kNN Acc@5'}


class NeighbourProbe:
    """A measure that encodes training images before each evaluation, as an evaluation sees them.

    Every process encodes its share of them and then has the features of all. A class without a single vote is no answer,
    so with few classes the top five may be fewer.

    Args:
        config: the tree; DATA is read.
    """

    def __init__(self, config):
        self.config = config.clone()
        self.config.defrost()
        self.config.DATA.CACHE = 'no'  # memory for the images that are trained on
        self.config.MODEL.NUM_CLASSES = None  # the training images' own, which validation may have fewer of
        self.measure = Measure(TITLES, 'knn_acc1', begin=self._begin)
        self._dataset: datasets.Dataset | None = None

    def _begin(self, model: paddle.nn.Layer, context: Context, should_stop: Callable[[], bool]):
        """See `Measure.begin`."""
        if self._dataset is None:
            self._dataset = evenly_spaced(datasets.build_dataset(self.config, 'train'), MAX_IMAGES)
        bank, classes = self._bank(model, context, should_stop)
        num_classes = self._dataset.num_classes

        def sums(model, images: paddle.Tensor, labels: paddle.Tensor, _) -> paddle.Tensor:
            votes = vote(features_of(model, images), bank, classes, num_classes)
            most, answers = paddle.topk(votes, min(5, votes.shape[-1]), axis=-1)
            hits = paddle.logical_and(answers == labels.unsqueeze(-1), most > 0)
            return paddle.stack([hits[:, 0].sum(), hits.sum()]).astype('float64')

        return sums

    def _bank(self, model, context: Context, should_stop) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Features [N, C] and classes [N] of the training images, on every process alike."""
        data, size = self.config.DATA, len(self._dataset)
        places, features, stopped = [], [], False
        loader = datasets.build_dataloader(self.config, self._dataset, False, context.rank, context.world_size)
        with loader:
            for batch in progress(loader.epoch(0), loader.num_batches, 'training features', context.is_main):
                stopped = should_stop()
                if stopped:
                    break
                if len(batch.labels):
                    images, _ = to_tensor(batch, data.IMAGENET_MEAN, data.IMAGENET_STD)
                    features.append(features_of(model, images))
                    places.append(paddle.to_tensor(batch.indices))
        # whoever was stopped tells the others here, where all of them meet
        if context.sum(paddle.to_tensor([float(stopped)])).item():
            raise Interrupted
        bank, seen = paddle.zeros([size, model.embed_dim]), paddle.zeros([size])
        if places:
            mine = paddle.concat(places)
            bank = paddle.scatter(bank, mine, paddle.concat(features))
            seen = paddle.scatter(seen, mine, paddle.ones([len(mine)]))
        readable = paddle.nonzero(context.sum(seen)).flatten()  # a place is another process's where it is 0 here
        if len(readable) == 0:
            raise UserError(f'none of the training images of {self._dataset.source} could be read.')
        classes = paddle.to_tensor(self._dataset.labels)
        return context.sum(bank)[readable], classes[readable]


def features_of(model: paddle.nn.Layer, images: paddle.Tensor) -> paddle.Tensor:
    """What the classifier of a model sees of images [B, in_chans, H, W], in float32 and of length 1: [B, C]."""
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    return F.normalize(features.astype('float32'), axis=-1)


def vote(features: paddle.Tensor, bank: paddle.Tensor, classes: paddle.Tensor, num_classes: int) -> paddle.Tensor:
    """Votes of the nearest neighbours.

    Args:
        features: of the images to classify, [B, C], of length 1.
        bank: of the images that vote, [N, C], of length 1.
        classes: of the latter, [N] int64.
        num_classes: K.

    Returns:
        [B, K].
    """
    similarity = paddle.matmul(features, bank, transpose_y=True)
    similarity, nearest = paddle.topk(similarity, min(NEIGHBOURS, len(bank)), axis=-1)
    ballots = F.one_hot(paddle.gather(classes, nearest.flatten()), num_classes)
    weights = paddle.exp(similarity / TEMPERATURE).unsqueeze(-1)
    return (ballots.reshape([*nearest.shape, -1]) * weights).sum(1)
