# SPDX-License-Identifier: Apache-2.0
"""Flags of EViT, lambda ViT, MS-MLP, MAE-Lite and PaddleClas on the command line of the launchers.

A flag with the same meaning here is translated, and a line says how; a flag without one gets an error that names the way
here. docs/coming_from.md lists all of them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence

from utils.errors import UserError

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Own flags, which the codes of papers write with two dashes and with a dash inside.
_OWN_VALUES = (
    'cfg', 'dataset', 'data_path', 'output', 'tag', 'batch_size', 'batch_size_eval', 'image_size', 'num_classes', 'accum_iter',
    'num_workers', 'pretrained', 'resume', 'last_epoch', 'teacher_model_path', 'ngpus',
)  # fmt: skip
_OWN_SWITCHES = ('eval', 'amp', 'throughput')

# Flag with a value, dashes as underscores -> flag or key here.
_VALUES = {
    'input_size': '-image_size', 'output_dir': '-output', 'finetune': '-pretrained', 'ckpt': '-pretrained',
    'start_epoch': '-last_epoch', 'accumulation_steps': '-accum_iter', 'teacher_path': '-teacher_model_path', 'c': '-cfg',
    'epochs': 'TRAIN.NUM_EPOCHS', 'e': 'TRAIN.NUM_EPOCHS', 'lr': 'TRAIN.BASE_LR', 'min_lr': 'TRAIN.END_LR',
    'warmup_lr': 'TRAIN.WARMUP_START_LR', 'warmup_epochs': 'TRAIN.WARMUP_EPOCHS', 'weight_decay': 'TRAIN.WEIGHT_DECAY',
    'clip_grad': 'TRAIN.GRAD_CLIP', 'opt_eps': 'TRAIN.OPTIMIZER.EPS', 'momentum': 'TRAIN.OPTIMIZER.MOMENTUM',
    'drop': 'MODEL.DROPOUT', 'drop_path': 'MODEL.DROPPATH', 'seed': 'SEED', 'smoothing': 'TRAIN.SMOOTHING',
    'color_jitter': 'TRAIN.COLOR_JITTER', 'train_interpolation': 'DATA.INTERPOLATION', 'reprob': 'TRAIN.RANDOM_ERASE_PROB',
    'remode': 'TRAIN.RANDOM_ERASE_MODE', 'recount': 'TRAIN.RANDOM_ERASE_COUNT', 'mixup': 'TRAIN.MIXUP_ALPHA',
    'cutmix': 'TRAIN.CUTMIX_ALPHA', 'mixup_prob': 'TRAIN.MIXUP_PROB', 'mixup_switch_prob': 'TRAIN.MIXUP_SWITCH_PROB',
    'mixup_mode': 'TRAIN.MIXUP_MODE', 'model_ema_decay': 'TRAIN.MODEL_EMA_DECAY', 'cache_mode': 'DATA.CACHE',
    'distillation_type': 'TRAIN.DISTILLATION_TYPE', 'distillation_alpha': 'TRAIN.DISTILLATION_ALPHA',
    'distillation_tau': 'TRAIN.DISTILLATION_TAU', 'base_keep_rate': 'MODEL.EVIT.KEEP_RATE', 'drop_loc': 'MODEL.EVIT.DROP_LOC',
    'shrink_start_epoch': 'MODEL.EVIT.SHRINK_START_EPOCH', 'shrink_epochs': 'MODEL.EVIT.SHRINK_EPOCHS',
    'prune_layer': 'MODEL.LAMBDA.PRUNE_LAYERS', 'done_layer': 'MODEL.LAMBDA.DONE_LAYERS',
    'frozen_stages': 'MODEL.TRANS.FROZEN_STAGES',
}  # fmt: skip
# Flag without a value -> flag or key here, value.
_SWITCHES = {
    'fuse_token': ('MODEL.EVIT.FUSE_TOKEN', 'True'),
    'use_lmdb': ('-dataset', 'lmdb'),
    'zip': ('-dataset', 'zip'),
    'test_speed': ('-throughput', ''),
    'only_test_speed': ('-throughput', ''),
    'use_checkpoint': ('TRAIN.RECOMPUTE', 'True'),
    'no_model_ema': ('TRAIN.MODEL_EMA', 'False'),
    'repeated_aug': ('TRAIN.REPEATED_AUG', '3'),
    'no_repeated_aug': ('TRAIN.REPEATED_AUG', '0'),
    'resplit': ('TRAIN.RANDOM_ERASE_SPLIT', 'True'),
    'unscale_lr': ('TRAIN.LINEAR_SCALED_LR', 'None'),
}
_OPTIMIZERS = {'adamw': 'AdamW', 'sgd': 'SGD', 'lamb': 'Lamb'}
_DATA_SETS = {'IMNET': 'folder', 'CIFAR': 'cifar100', 'INAT': 'inaturalist2018'}
_LEVELS = {'O0': [], 'O1': [('-amp', '')], 'O2': [('-amp', ''), ('AMP_LEVEL', 'O2')]}
_YES, _NO = ('yes', 'true', 't', 'y', '1'), ('no', 'false', 'f', 'n', '0')

# Flags without effect here -> reason. True: the flag has a value.
_IGNORED = {
    'dist_eval': (False, 'evaluation is always distributed, and exact'),
    'local_rank': (True, 'main_multi_gpu.py starts the processes'),
    'world_size': (True, 'main_multi_gpu.py starts one process per GPU'),
    'dist_url': (True, 'main_multi_gpu.py starts the processes'),
    'dist_backend': (True, 'NCCL on GPUs, gloo on the CPU'),
    'device': (True, 'the device is a GPU if there is one'),
    'pin_mem': (False, 'the loader decides'),
    'no_pin_mem': (False, 'the loader decides'),
    'model_ema_force_cpu': (True, 'the EMA is on the device of the weights'),
    'model_ema_eval': (True, 'the EMA is always validated'),
    'mae_pretrain': (False, 'TRAIN.TASK mae, from the YAML file, decides'),
}
# Flags that need something else here -> what.
_ANSWERS = {
    'visualize_mask': 'run tools/visualize_tokens.py on the images',
    'n_visualization': 'name the images for tools/visualize_tokens.py',
    'exp_options': 'write -opts KEY VALUE ..., last; docs/coming_from.md lists the keys',
    'b': 'set -batch_size to the images per process: the total batch divided by the number of processes',
    'd': 'set the environment variable CUDA_VISIBLE_DEVICES=0,1,2,3',
    'f': 'name the recipe with -cfg=./configs/NAME.yaml; `python -m models` lists them',
    'o': 'write -opts KEY VALUE ..., last; docs/coming_from.md lists the keys',
    'no_eval': 'set the epochs between validations, -opts VALIDATE_FREQ N',
    'aa': 'set -opts TRAIN.RAND_AUGMENT True, which is rand-m9-mstd0.5-inc1, or TRAIN.AUTO_AUGMENT True',
    'sched': 'set -opts TRAIN.LR_SCHEDULER.NAME',
    'teacher_model': 'set -opts TRAIN.TEACHER_CFG to the YAML file of the teacher, or export it; docs/deit.md',
    'attn_only': 'set -opts MODEL.TRANS.FROZEN_STAGES; training of attention layers alone is not part of LeanViT',
    'bce_loss': 'leave it out: the loss is the cross-entropy of the mixed targets',
    'ThreeAugment': 'leave it out: LeanViT has RandAugment and AutoAugment',
    'src': 'leave it out: LeanViT has RandomResizedCrop',
    'cosub': 'leave it out: LeanViT has no cosub training',
    'deploy': 'leave it out: MobileOne is not part of LeanViT',
    'multi_scale_sampler_ddp': 'leave it out: MobileViT is not part of LeanViT',
}
# Keys of MS-MLP (Swin Transformer) after --opts -> keys here.
_KEYS = {
    'DATA.IMG_SIZE': 'DATA.IMAGE_SIZE', 'DATA.CACHE_MODE': 'DATA.CACHE', 'MODEL.DROP_RATE': 'MODEL.DROPOUT',
    'MODEL.DROP_PATH_RATE': 'MODEL.DROPPATH', 'MODEL.LABEL_SMOOTHING': 'TRAIN.SMOOTHING', 'TRAIN.EPOCHS': 'TRAIN.NUM_EPOCHS',
    'TRAIN.WARMUP_LR': 'TRAIN.WARMUP_START_LR', 'TRAIN.MIN_LR': 'TRAIN.END_LR', 'TRAIN.CLIP_GRAD': 'TRAIN.GRAD_CLIP',
    'TRAIN.USE_CHECKPOINT': 'TRAIN.RECOMPUTE', 'TRAIN.ACCUMULATION_STEPS': 'TRAIN.ACCUM_ITER',
    'AUG.COLOR_JITTER': 'TRAIN.COLOR_JITTER', 'AUG.REPROB': 'TRAIN.RANDOM_ERASE_PROB',
    'AUG.REMODE': 'TRAIN.RANDOM_ERASE_MODE', 'AUG.RECOUNT': 'TRAIN.RANDOM_ERASE_COUNT', 'AUG.MIXUP': 'TRAIN.MIXUP_ALPHA',
    'AUG.CUTMIX': 'TRAIN.CUTMIX_ALPHA', 'AUG.CUTMIX_MINMAX': 'TRAIN.CUTMIX_MINMAX', 'AUG.MIXUP_PROB': 'TRAIN.MIXUP_PROB',
    'AUG.MIXUP_SWITCH_PROB': 'TRAIN.MIXUP_SWITCH_PROB', 'AUG.MIXUP_MODE': 'TRAIN.MIXUP_MODE', 'PRINT_FREQ': 'REPORT_FREQ',
    'MODEL.MSMLP.IN_CHANS': 'DATA.IMAGE_CHANNELS',
}  # fmt: skip


Setting = tuple[str, str]  # flag or key here, and its value; '' for a flag without value


def translate(argv: Sequence[str], note: Callable[[str], None] | None = None) -> list[str]:
    """Return the command line with the flags of other codes replaced by ours; `-opts` comes last.

    Args:
        argv: arguments without the name of the program.
        note: called with a line for each translated flag; None: print to stderr, once for all processes.

    Raises:
        UserError: a flag of another code that has no equal here, or one without its value.
    """
    words, flags, opts, note = [*argv], [], [], note or _print
    while words:
        word = words.pop(0)
        if word == '-opts':
            opts += words
            break
        name, equals, value = word.lstrip('-').partition('=')
        name = name.replace('-', '_')
        if word == '--opts':
            opts += _take_opts(words)
        elif not _is_foreign(word, name):
            flags.append(word)
        else:
            settings = _settings(word.partition('=')[0], name, [value] if equals else words)
            for target, text in settings:
                (flags if target.startswith('-') else opts).extend([target, text] if text else [target])
            reason = _IGNORED.get(name, (False, 'it is the default'))[1]
            note(
                f'{word.partition("=")[0]} '
                + (f'is read as {_shown(settings)}' if settings else f'is ignored: {reason}')
            )
    return [*flags, *(['-opts', *opts] if opts else [])]


def _is_foreign(word: str, name: str) -> bool:
    """Return whether a word is a flag of another code: with two dashes, or with one and not one of ours."""
    if not re.match(r'--?[A-Za-z]', word):
        return False
    known = (*_VALUES, *_SWITCHES, *_IGNORED, *_ANSWERS, 'opt', 'data_set', 'model', 'amp_opt_level', 'model_ema')
    own = name in _OWN_VALUES or name in _OWN_SWITCHES
    return name in known or (own and not word.startswith(f'-{name}'))


def _settings(flag: str, name: str, words: list[str]) -> list[Setting]:
    """Return our settings for a flag, whose value is the first of `words`, from which it is removed."""
    if name in _ANSWERS:
        raise UserError(f'{flag} is not a flag of LeanViT: {_ANSWERS[name]}.')
    if name in _IGNORED:
        if _IGNORED[name][0]:
            _value(flag, words)
        return []
    if name in _OWN_SWITCHES:
        return [(f'-{name}', '')]
    if name in _SWITCHES:
        return [_SWITCHES[name]]
    if name == 'model_ema':  # EViT: no value; MS-MLP: yes or no
        has_value = bool(words) and words[0].lower() in (*_YES, *_NO)
        return [('TRAIN.MODEL_EMA', str(not has_value or words.pop(0).lower() in _YES))]
    value = _value(flag, words)
    if name in _OWN_VALUES:
        return [(f'-{name}', value)]
    if name in _VALUES:
        return [(_VALUES[name], value)]
    return _named(flag, name, value)


def _named(flag: str, name: str, value: str) -> list[Setting]:
    """Return our settings for a flag whose values have other names here."""
    if name == 'model':
        return [('-cfg', _recipe(flag, value))]
    key, table = {
        'opt': ('TRAIN.OPTIMIZER.NAME', _OPTIMIZERS),
        'data_set': ('-dataset', _DATA_SETS),
        'amp_opt_level': ('', _LEVELS),
    }[name]
    if value not in table:
        raise UserError(f'{flag} is {value!r}, but LeanViT has an equal only for {", ".join(table)}.')
    return [(key, table[value])] if key else table[value]


def _recipe(flag: str, name: str) -> str:
    """Return the recipe of a model name of timm, EViT or lambda ViT."""
    name = re.sub(r'_shrink(_base)?$', '_224' if '_224' not in name else '', name)
    path = os.path.join(_ROOT, 'configs', f'{name}.yaml')
    if not os.path.isfile(path):
        raise UserError(f'{flag} {name}: there is no such recipe; name one with -cfg, `python -m models` lists them.')
    return path


def _take_opts(words: list[str]) -> list[str]:
    """Remove the pairs of MS-MLP's --opts, which end at the next flag, and return them with our keys."""
    pairs = []
    while words and not re.match(r'--?[A-Za-z]', words[0]):
        pairs.append(words.pop(0))
    pairs[::2] = [_KEYS.get(key, key) for key in pairs[::2]]
    return pairs


def _value(flag: str, words: list[str]) -> str:
    if not words or re.match(r'--?[A-Za-z]', words[0]):
        hint = '; to continue the last run, write -resume=output/latest' if flag.strip('-') == 'resume' else ''
        raise UserError(f'{flag} needs a value{hint}.')
    return words.pop(0)


def _shown(settings: list[Setting]) -> str:
    texts = (f'{target}={text}' if target.startswith('-') and text else f'{target} {text}' for target, text in settings)
    return ' '.join(text if text.startswith('-') else f'-opts {text}' for text in texts).strip()


def _print(line: str) -> None:
    if 'PADDLE_TRAINER_ID' not in os.environ:  # not in the processes that main_multi_gpu.py starts
        print(line, file=sys.stderr, flush=True)
