#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sweep attention removal, EViT and ToMe of a Vision Transformer: speed, MACs and accuracy on this device.

    python tools/plan.py -cfg configs/deit_small_patch16_224.yaml -output plan \
        -remove "none;0,2,4" -keep_rates 1,0.9,0.7 -r 0,8,13
    python tools/plan.py -cfg ... -output plan -keep_rates 1,0.9,0.7 -pretrained deit.pdparams -data_path /dataset/imagenet

Combinations on the Pareto frontier are written as YAML files. docs/plan.md explains the method.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import paddle
import yaml
from yacs.config import CfgNode

from config import config_file_of, get_config, merge_opts, update_config
from datasets import Images, build_dataloader
from datasets.batch import on_device
from engine import distributed
from engine.distributed import Context
from engine.throughput import Call, predictor_call, time_interleaved
from models import build_model
from models.exported import Predictor, cpu_threads, save_program
from models.profile import Profile, profile
from models.vision_transformer import VisionTransformer
from models.weights.load import load_pretrained
from tasks import build_task
from tools._output import add_output_folder
from tools._pareto import Point, draw, pareto_frontier
from utils.cli import run
from utils.environment import processor_name
from utils.errors import UserError
from utils.files import atomic_write, json_text
from utils.flags import flag_parser
from utils.runlog import progress
from utils.temporary import temporary_folder

WARMUP = 3
PROGRAMS_AT_ONCE = 4  # exported programs in memory beside the given one; each has its own weights
COLUMNS = '{:>2} {:<12} {:>9} {:>8} {:>8} {:>9} {:>6} {:>11} {:>7}'


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config, dataset = read_config(args)
    metric = Metric.of(config, known=dataset is not None)
    context = distributed.start()
    given, *others = combinations(args, config)
    candidates, left_out = build_all(config, given, others)
    info = environment(args, context)
    print(', '.join(f'{key} {value}' for key, value in info.items()))
    rate(candidates, measure(candidates, args, context), args.batch_size)
    if dataset is not None:
        evaluate_all(config, candidates, dataset, context)
    frontier = mark_frontier(candidates, metric)
    print_table(candidates, left_out, metric)
    write_results(args.folder, info, candidates, left_out, metric)
    for candidate in frontier:
        write_yaml(args, candidate, candidates[0], len(frontier), metric)
    with atomic_write(os.path.join(args.folder, 'pareto.png')) as file:
        points = [candidate.point(metric) for candidate in candidates]
        draw(file, points, config.MODEL.NAME, caption(info), metric.text)
    print(f"{len(frontier)} YAML files of the frontier, results.json and pareto.png are in '{args.folder}'")


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = (
        '-cfg', '-dataset', '-data_path', '-batch_size', '-image_size', '-num_classes', '-num_workers', '-pretrained',
    )  # fmt: skip
    parser = flag_parser('Sweep removed attention, EViT keep rates and ToMe of a Vision Transformer.', flags)
    add_output_folder(parser, 'without an earlier plan, for results, plot and YAML files', required=True)
    own = argparse.SUPPRESS  # default: the value in the configuration
    parser.add_argument('-remove', default=own, metavar='LISTS', help='blocks without attention: "none;0,2,4;0,2,4,6"')
    parser.add_argument('-keep_rates', default=own, metavar='RATES', help='keep rates of EViT: 1,0.9,0.7,0.5')
    parser.add_argument('-r', default=own, metavar='NUMBERS', help='tokens that ToMe merges per block: 0,8,13')
    parser.add_argument('-rounds', type=int, default=10, metavar='N', help='timed rounds; medians are reported')
    parser.add_argument(
        '-backend', choices=('dygraph', 'exported'), default='dygraph', help='layers, or inference program'
    )
    parser.set_defaults(batch_size=8)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError(f'-rounds is {args.rounds}, but must be at least 1.')
    if config_file_of(args) is None:
        raise UserError('-cfg is missing: give the YAML file of a Vision Transformer.')
    if 'pretrained' not in args and ('dataset' in args or 'data_path' in args):
        raise UserError(
            '-pretrained is missing: accuracies need weights; remove -dataset and -data_path to plan without them.'
        )
    if os.path.exists(os.path.join(args.folder, 'results.json')):
        raise UserError(f"-output '{args.folder}' holds an earlier plan; give another folder.")
    return args


def read_config(args: argparse.Namespace) -> tuple[CfgNode, Images | None]:
    """Return the configuration, and with weights the validation images."""
    config = update_config(get_config(), args)
    dataset = None
    if 'pretrained' in args:
        dataset = build_task(config).dataset('val')
    config.freeze()
    return config, dataset


def environment(args: argparse.Namespace, context: Context) -> dict:
    """Return the conditions of the measurement."""
    return {
        'paddle': paddle.__version__,
        'device': paddle.device.cuda.get_device_name() if context.on_gpu else processor_name(),
        'threads': cpu_threads(),
        'backend': args.backend,
        'batch_size': args.batch_size,
        'rounds': args.rounds,
    }


def caption(info: dict) -> str:
    """Describe the conditions of the measurement in one line."""
    return '{device}, {threads} threads, Paddle {paddle}, {backend}, batch {batch_size}, {rounds} rounds'.format(**info)


@dataclass(frozen=True)
class Metric:
    """Metric by which combinations are compared, besides speed.

    Attributes:
        name: metric that selects the best weights of the task; 'macs' if it is not evaluated.
        title: title of its column.
        text: axis label in the plot.
    """

    name: str
    title: str
    text: str

    @classmethod
    def of(cls, config: CfgNode, known: bool) -> Metric:
        """Return the metric of TRAIN.TASK; `known`: it is evaluated."""
        evaluator = build_task(config).evaluator()
        best = evaluator.best[0]
        title = 'top-1' if best == 'acc1' else evaluator.titles[best]
        return cls(best if known else 'macs', title, 'top-1 accuracy' if best == 'acc1' else title)


# ---------------------------------------------------------------------------------------------------- combinations
@dataclass(frozen=True)
class Combination:
    """A point of the sweep.

    Attributes:
        remove: blocks without attention.
        keep_rate: keep rate of EViT.
        r: tokens that ToMe merges per block; None: MODEL.TOME.SCHEDULE of the configuration.
    """

    remove: tuple[int, ...]
    keep_rate: float
    r: int | None

    def options(self) -> list:
        """Return the keys and values of this combination."""
        merging = [] if self.r is None else ['MODEL.TOME.R', self.r, 'MODEL.TOME.SCHEDULE', None]
        return [
            *['MODEL.LAMBDA.PRUNE_LAYERS', self.remove, 'MODEL.LAMBDA.DONE_LAYERS', ()],
            *['MODEL.LAMBDA.REMOVED', bool(self.remove), 'MODEL.EVIT.KEEP_RATE', self.keep_rate, *merging],
        ]

    def texts(self) -> tuple[str, str, str]:
        """Return the settings as in tables: ('0,2,4', '0.7', '8')."""
        removed = ','.join(map(str, self.remove)) or 'none'
        return removed, f'{self.keep_rate:g}', 'schedule' if self.r is None else str(self.r)

    def slug(self) -> str:
        """Return a file name such as 'removed-0-2-4_keep0.7_r8'."""
        return 'removed-{}_keep{}_r{}'.format(*self.texts()).replace(',', '-')


def combinations(args: argparse.Namespace, config: CfgNode) -> list[Combination]:
    """Return the given model, then the sweep."""
    removal, tome = config.MODEL.LAMBDA, config.MODEL.TOME
    removed = tuple(sorted({*removal.PRUNE_LAYERS, *removal.DONE_LAYERS}))
    given = Combination(removed, config.MODEL.EVIT.KEEP_RATE, tome.R if tome.SCHEDULE is None else None)
    lists, rates, numbers = [given.remove], [given.keep_rate], [given.r]
    if 'remove' in args:
        lists = [() if text.strip() == 'none' else removal_list(text) for text in args.remove.split(';')]
    if 'keep_rates' in args:
        rates = read_numbers('-keep_rates', args.keep_rates, float, lambda rate: 0 < rate <= 1, 'between 0 and 1')
    if 'r' in args:
        numbers = read_numbers('-r', args.r, int, lambda r: r >= 0, 'a whole number from 0')
    sweep = (Combination(remove, rate, r) for remove in lists for rate in rates for r in numbers)
    return list(dict.fromkeys([given, *sweep]))


def removal_list(text: str) -> tuple[int, ...]:
    """Parse a list of blocks: '2,0' -> (0, 2)."""
    return tuple(sorted(set(read_numbers('-remove', text, int, lambda layer: layer >= 0, "a block's number, or none"))))


def read_numbers(flag: str, text: str, kind: type, allowed, wanted: str) -> list:
    """Parse comma-separated numbers."""
    numbers = []
    for item in text.split(','):
        try:
            numbers.append(kind(item))
        except ValueError:
            numbers.append(None)
        if numbers[-1] is None or not allowed(numbers[-1]):
            raise UserError(f"{flag} has '{item.strip()}', but takes comma-separated numbers, each {wanted}.")
    return numbers


# ---------------------------------------------------------------------------------------------------- models
@dataclass
class Candidate:
    """A combination that can be built, and its results.

    Attributes:
        results: `images_per_second` and its quartiles, `latency_ms`, `ratio` to the given model; metrics of the task.
        number: number on the frontier, from 1, the slowest first; None: not on it.
    """

    combination: Combination
    config: CfgNode
    model: VisionTransformer
    cost: Profile
    results: dict = field(default_factory=dict)
    number: int | None = None

    def image_shape(self) -> list[int]:
        """Return [C, H, W]."""
        return build_task(self.config).image_shape()

    def row(self) -> dict:
        """Return the object for the JSON file."""
        return {
            **asdict(self.combination),
            'params': self.cost.params,
            'macs': self.cost.macs,
            'matching_macs': self.cost.matching,
            **self.results,
            'yaml': self.yaml_name() if self.number else None,
        }

    def point(self, metric: Metric) -> Point:
        """Return the candidate for the plot."""
        low, high = self.results['images_per_second_quartiles']
        speed = (low, self.results['images_per_second'], high)
        return Point(*self.combination.texts(), speed, self.cost.macs, self.results.get(metric.name), self.number)

    def yaml_name(self) -> str:
        """Return the name of the YAML file."""
        return f'{self.number:02d}_{self.combination.slug()}.yaml'


def build_all(
    config: CfgNode, given: Combination, others: Sequence[Combination]
) -> tuple[list[Candidate], list[tuple[Combination, str]]]:
    """Build the given model and all other combinations, with shared weights.

    Returns:
        The candidates, and the combinations that cannot be built, with the reason.

    Raises:
        UserError: the given model cannot be built, or is no Vision Transformer.
    """
    pool: dict[str, paddle.Tensor] = {}
    candidates, left_out = [build(config, given, pool, print)], []
    for combination in progress(others, len(others), 'building', shown=True):
        try:
            candidates.append(build(config, combination, pool, lambda line: None))
        except UserError as error:
            left_out.append((combination, str(error)))
    if others and len(candidates) == 1:
        raise UserError(f'no combination can be built; {" / ".join(left_out[0][0].texts())}: {left_out[0][1]}')
    return candidates, left_out


def build(config: CfgNode, combination: Combination, pool: dict[str, paddle.Tensor], log) -> Candidate:
    """Build a combination with the weights of `pool`, by name; add missing weights to `pool`."""
    config = config.clone()
    config.defrost()
    merge_opts(config, combination.options())
    config.freeze()
    model = build_model(config)
    encoder = getattr(model, 'backbone', model)
    if not isinstance(encoder, VisionTransformer):
        raise UserError(
            f'MODEL.TYPE is {config.MODEL.TYPE}; only a Vision Transformer (vit), and models with one as encoder, can be '
            'planned.'
        )
    share_weights(model, pool)
    if config.MODEL.PRETRAINED:
        load_pretrained(model, config.MODEL.PRETRAINED, log=log, replace_head=False)
    model.eval()
    candidate = Candidate(combination, config, model, cost=None)
    candidate.cost = profile(model, [1, *candidate.image_shape()])
    return candidate


def share_weights(model: paddle.nn.Layer, pool: dict[str, paddle.Tensor]) -> None:
    """Replace the model's parameters by those of `pool`, so that many models need the memory of one."""
    for prefix, layer in model.named_sublayers(include_self=True):
        for name, parameter in list(layer.named_parameters(include_sublayers=False)):
            setattr(layer, name, pool.setdefault(f'{prefix}.{name}', parameter))


# ---------------------------------------------------------------------------------------------------- measuring
def measure(candidates: Sequence[Candidate], args: argparse.Namespace, context: Context) -> np.ndarray:
    """Measure the seconds of a batch and of one image: [candidates, 2, rounds].

    Each round runs every model once. Exported programs are measured in groups, each with the first candidate, whose times
    correct for drift of the machine's speed since the first group.
    """
    size = len(candidates) if args.backend == 'dygraph' else PROGRAMS_AT_ONCE
    first, *rest = candidates
    groups = [rest[start : start + size] for start in range(0, len(rest), size)] or [[]]
    seconds: list[np.ndarray] = []
    for group in progress(groups, len(groups), 'measuring', shown=True):
        with temporary_folder('plan') as folder:
            calls = [call for each in layer_or_program_calls([first, *group], args, folder) for call in each]
            taken = np.array(time_interleaved(calls, context, args.rounds, WARMUP)).reshape([-1, 2, args.rounds])
            del calls  # before the programs of the next group are loaded
        if not seconds:
            seconds.append(taken[0])
        drift = np.median(seconds[0], 1) / np.median(taken[0], 1)
        seconds.extend(taken[1:] * drift[:, np.newaxis])
    return np.array(seconds)


def layer_or_program_calls(
    candidates: Sequence[Candidate], args: argparse.Namespace, folder: str
) -> Iterable[tuple[Call, Call]]:
    """Yield for each candidate a forward pass of a batch and one of a single image."""
    shape = candidates[0].image_shape()
    images = [paddle.randn([size, *shape]) for size in (args.batch_size, 1)]
    for index, candidate in enumerate(candidates):
        if args.backend == 'dygraph':
            yield tuple(layer_call(candidate.model, batch) for batch in images)
        else:
            prefix = os.path.join(folder, str(index))
            save_program(candidate.model, shape, prefix)
            predictor = Predictor(prefix)
            yield tuple(predictor_call(predictor, batch.shape) for batch in images)


def layer_call(model: paddle.nn.Layer, images: paddle.Tensor) -> Call:
    """Return a forward pass of `images`, which all candidates share."""

    def call() -> None:
        with paddle.no_grad():
            model(images)

    return call


def rate(candidates: Sequence[Candidate], seconds: np.ndarray, batch_size: int) -> None:
    """Add speeds and latencies to the candidates."""
    speeds = batch_size / np.quantile(seconds[:, 0], [0.5, 0.75, 0.25], axis=1)
    latencies = np.median(seconds[:, 1], axis=1)
    for index, candidate in enumerate(candidates):
        speed, low, high = speeds[:, index].tolist()
        candidate.results['images_per_second'] = speed
        candidate.results['images_per_second_quartiles'] = [low, high]
        candidate.results['ratio'] = speed / speeds[0, 0].item()
        candidate.results['latency_ms'] = latencies[index].item() * 1000


def evaluate_all(config: CfgNode, candidates: Sequence[Candidate], dataset: Images, context: Context) -> None:
    """Add the metrics to the candidates, in one pass over the images."""
    task, skipped = build_task(config), 0
    transform = task.transform(training=False)
    evaluators = [task.evaluator() for _ in candidates]
    for candidate, evaluator in zip(candidates, evaluators):
        candidate.model.eval()
        evaluator.reset(candidate.model, context, lambda: False)
    with paddle.no_grad(), build_dataloader(config, dataset, training=False, transform=transform) as loader:
        batches = on_device(loader.epoch(0, borrow=True), config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
        for batch in progress(batches, loader.num_batches, 'validation', shown=True):
            skipped += batch.skipped
            if len(batch):
                for candidate, evaluator in zip(candidates, evaluators):
                    evaluator.process(batch, task.infer(candidate.model, batch))
    if skipped == len(dataset):
        raise UserError(f'none of the images of {dataset.source} could be read.')
    print(f'{len(dataset) - skipped} images, {skipped} of them unreadable')
    for candidate, evaluator in zip(candidates, evaluators):
        candidate.results.update({name: value for name, value in evaluator.result().items() if name != 'loss'})


# ---------------------------------------------------------------------------------------------------- frontier
def mark_frontier(candidates: Sequence[Candidate], metric: Metric) -> list[Candidate]:
    """Number the candidates on the Pareto frontier of speed and `metric`, the slowest first."""
    points = [(candidate.row()[metric.name], candidate.results['images_per_second']) for candidate in candidates]
    frontier = [candidates[index] for index in pareto_frontier(points)]
    frontier.sort(key=lambda candidate: candidate.results['images_per_second'])
    for number, candidate in enumerate(frontier, start=1):
        candidate.number = number
    return frontier


# ---------------------------------------------------------------------------------------------------- output
def print_table(candidates: Sequence[Candidate], left_out: Sequence[tuple[Combination, str]], metric: Metric) -> None:
    titles = ('#', 'removed', 'keep rate', 'r', 'MACs G', 'images/s', 'ratio', 'latency ms', metric.title)
    print(COLUMNS.format(*titles))
    for candidate in candidates:
        results = candidate.results
        print(
            COLUMNS.format(
                candidate.number or '',
                *candidate.combination.texts(),
                f'{candidate.cost.macs / 1e9:.3f}',
                f'{results["images_per_second"]:.1f}',
                f'{results["ratio"]:.2f}',
                f'{results["latency_ms"]:.2f}',
                f'{100 * results[metric.name]:.2f}' if metric.name in results else '-',
            )
        )
    for combination, reason in left_out:
        print('left out: removed {}, keep rate {}, r {}: '.format(*combination.texts()) + reason)


def write_results(folder: str, info: dict, candidates, left_out, metric: Metric) -> None:
    """Write results.json."""
    content = {
        'environment': info,
        'frontier': ['images_per_second', metric.name],
        'points': [candidate.row() for candidate in candidates],
        'left_out': [{**asdict(combination), 'reason': reason} for combination, reason in left_out],
    }
    with atomic_write(os.path.join(folder, 'results.json'), 'w') as file:
        file.write(json_text(content, indent=2))


def write_yaml(args: argparse.Namespace, candidate: Candidate, given: Candidate, total: int, metric: Metric) -> None:
    """Write the YAML file of a point on the frontier, with its changes to the given configuration."""
    cfg, path = config_file_of(args), os.path.join(args.folder, candidate.yaml_name())
    changes = changed_keys(get_config(cfg), candidate.config)
    if changes:
        changes['MODEL.NAME'] = f'{given.config.MODEL.NAME}_{candidate.combination.slug()}'
    tree: dict = {'BASE': os.path.relpath(cfg, args.folder)}
    for key, value in changes.items():
        *groups, name = key.split('.')
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = list(value) if isinstance(value, tuple) else value
    results = candidate.results
    accuracy = ''
    if metric.name in results:
        accuracy = f'\n# {100 * results[metric.name]:.2f} % {metric.title} with the weights of the plan.'
    removal = (
        '\n# Training this file starts without attention in these blocks; with REMOVED: False their attention decays.'
    )
    with atomic_write(path, 'w') as file:
        file.write(
            f'# Point {candidate.number} of {total} on the frontier of {given.config.MODEL.NAME}.\n#\n'
            f'#   python main_multi_gpu.py -cfg={path}\n#\n'
            f'# {candidate.cost.params:,} parameters, {candidate.cost.macs:,} MACs. {results["images_per_second"]:.1f} '
            f'images/s at batch {args.batch_size}, {results["ratio"]:.2f} times those of the given model.'
            f'{accuracy}{removal if "MODEL.LAMBDA.REMOVED" in changes else ""}\n'
        )
        yaml.safe_dump(tree, file, sort_keys=False, default_flow_style=None)


def changed_keys(base: CfgNode, config: CfgNode) -> dict:
    """Return the keys of the model that differ from `base`, without weights and classes."""
    changes = {} if base.DATA.IMAGE_SIZE == config.DATA.IMAGE_SIZE else {'DATA.IMAGE_SIZE': config.DATA.IMAGE_SIZE}

    def compare(before: CfgNode, after: CfgNode, prefix: str) -> None:
        for name, value in after.items():
            if isinstance(value, CfgNode):
                compare(before[name], value, f'{prefix}{name}.')
            elif value != before[name]:
                changes[prefix + name] = value

    compare(base.MODEL, config.MODEL, 'MODEL.')
    for key in ('MODEL.NUM_CLASSES', 'MODEL.PRETRAINED', 'MODEL.RESUME'):
        changes.pop(key, None)
    return changes


if __name__ == '__main__':
    run(main)
