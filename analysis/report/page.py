# SPDX-License-Identifier: Apache-2.0
"""The page about one run, or about several runs that are compared. A section without content is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from analysis.report.charts import Series, legend, line_chart
from analysis.report.classes import calibrations, class_results, confusions, mistakes
from analysis.report.html import Element, details, document, el, figure, picture, table
from analysis.report.runs import Points, Run, StoredPicture
from analysis.report.style import STYLE
from config import SCHEMA

KINDS = {'train': 'training', 'val': 'validation', 'val_ema': 'validation of the EMA'}
_FIRST = 6  # charts that are visible at first
_SMALL = 400  # pixels; smaller pictures are enlarged
_UNCOMPARED = ('BASE', 'SAVE', 'TAG', 'MODEL.RESUME')  # keys that differ between any two runs

Content = list[Element]


class Section(NamedTuple):
    """A section of the page: its anchor, its title, and the function that returns its content for some runs."""

    name: str
    title: str
    content: Callable[[Sequence[Run]], Content]


def render(runs: Sequence[Run]) -> str:
    """Return the HTML page about the runs."""
    title = f'Run {runs[0].name}' if len(runs) == 1 else f'Comparison of {len(runs)} runs'
    built = [(section, section.content(runs)) for section in SECTIONS]
    shown = [(section, content) for section, content in built if content]
    links = el('nav', [el('a', section.title, href=f'#{section.name}') for section, _ in shown])
    parts = [el('section', el('h2', section.title), content, id=section.name) for section, content in shown]
    return document(title, STYLE, [el('main', el('h1', title), subtitle(runs), links, notes(runs), parts)])


def subtitle(runs: Sequence[Run]) -> Element:
    """Return the model, task and data set of each run in one line."""
    return el('p', [el('span', text, el('br')) for text in map(_in_words, runs) if text], class_='muted')


def _in_words(run: Run) -> str:
    if run.config is None:
        return ''
    config = run.config
    words = (
        f'{config.MODEL.NAME} (MODEL.TYPE {config.MODEL.TYPE}), TRAIN.TASK {config.TRAIN.TASK}, {config.DATA.DATASET}'
    )
    return f'{run.name}: {words}'


def notes(runs: Sequence[Run]) -> Element | None:
    """Return the sentences about missing and damaged files; None: there are none."""
    sentences = [el('li', note) for run in runs for note in run.notes]
    return el('section', el('h2', 'Notes'), el('ul', sentences), class_='notes', id='notes') if sentences else None


# ---------------------------------------------------------------------------------------------------- results
class Result(NamedTuple):
    """Last and best value of a metric of the validations of a run, with their epochs."""

    last: tuple[float, float]
    best: tuple[float, float]


def results_of(run: Run) -> dict[tuple[str, str], Result]:
    """Return the results by metric and kind of row; a loss is best where it is smallest."""
    found = {}
    for name, kinds in run.metrics().items():
        for kind, points in kinds.items():
            if kind != 'train' and name not in ('lr', 'images_per_second'):
                best = min if name.endswith('loss') else max
                found[name, kind] = Result(points[-1], best(points, key=lambda point: point[1]))
    return found


def main_metric(run: Run) -> tuple[str, str, Result] | None:
    """Return name, kind and result of the first metric that is no loss, else of the loss; None: there is none."""
    results = results_of(run)
    names = sorted(results, key=lambda key: (key[0].endswith('loss'), key[1] == 'val_ema'))
    return (*names[0], results[names[0]]) if names else None


def result_content(runs: Sequence[Run]) -> Content:
    """Return cards about a single run, and a table of the validations of all runs."""
    results = {run.name: results_of(run) for run in runs}
    keys = list(dict.fromkeys(key for found in results.values() for key in found))
    rows = [[_metric_title(*key), *(_result_cell(results[run.name].get(key)) for run in runs)] for key in keys]
    effort = [[name, *cells] for name, cells in _efforts(runs) if any(cells)]
    if not rows and not effort:
        return []
    return [*_cards(runs), table(['', *(run.name for run in runs)], rows + effort)]


def _metric_title(name: str, kind: str) -> str:
    return f'{name} (EMA)' if kind == 'val_ema' else name


def _result_cell(result: Result | None) -> str:
    if result is None:
        return ''
    (epoch, last), (best_epoch, best) = result
    if epoch == 0:  # an evaluation without training
        return f'{last:.4f}'
    return f'{last:.4f} (best: {best:.4f}, epoch {best_epoch:g})'


def _cards(runs: Sequence[Run]) -> Content:
    """Return the most important numbers of a single run."""
    if len(runs) > 1:
        return []
    (run,) = runs
    metric = main_metric(run)
    values = {f'best {_metric_title(*metric[:2])}': f'{metric[2].best[1]:.4f}'} if metric else {}
    values.update({name: cells[0] for name, cells in _efforts(runs) if cells[0]})
    return [el('dl', [el('div', el('dt', name), el('dd', value)) for name, value in values.items()], class_='cards')]


def _efforts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return epochs, time and speed of the training of each run."""
    trained = [run.rows.get('train', []) for run in runs]
    totals = [[sum(_value(row, name) for row in rows) for rows in trained] for name in ('seconds', 'images')]
    speeds = [f'{images / seconds:.0f}' if seconds and images else '' for seconds, images in zip(*totals)]
    return [
        ('epochs', [f'{rows[-1]["epoch"]:g}' if rows else '' for rows in trained]),
        ('training time', [duration(seconds) if seconds else '' for seconds in totals[0]]),
        ('images per second', speeds),
    ]


def _value(row: Mapping, name: str) -> float:
    value = row.get(name)
    return value if isinstance(value, (int, float)) else 0.0


def duration(seconds: float) -> str:
    """Return '2 h 05 min', '3 min 20 s' or '12 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02d} min'
    return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'


# ---------------------------------------------------------------------------------------------------- curves
def curve_content(runs: Sequence[Run]) -> Content:
    """Return a chart per metric, with the curves of all runs."""
    axis = 'step' if any(map(_validates_within_epochs, runs)) else 'epoch'
    found = [run.metrics(axis) for run in runs]
    names = list(dict.fromkeys(name for metrics in found for name in metrics if name != 'lr'))
    names.sort(
        key=lambda name: (name == 'images_per_second', not any('val' in metrics.get(name, ()) for metrics in found))
    )
    charts, kinds = [], {}
    for name in names:
        curves = [
            Series(_series_name(runs, run, kind), points, *_look(runs, place, kind))
            for place, (run, metrics) in enumerate(zip(runs, found))
            for kind, points in metrics.get(name, {}).items()
            if kind in KINDS and (name != 'images_per_second' or kind == 'train')
        ]
        kinds.update(dict.fromkeys(kind for metrics in found for kind in metrics.get(name, ()) if kind in KINDS))
        if curves:
            charts.append(figure(line_chart(name, curves, axis), name))
    return [_curve_legend(runs, [kind for kind in KINDS if kind in kinds]), *_grid(charts)] if charts else []


def _validates_within_epochs(run: Run) -> bool:
    epochs = [row['epoch'] for row in run.rows.get('val', [])]
    return len(set(epochs)) < len(epochs)


def _look(runs: Sequence[Run], place: int, kind: str) -> tuple[int, int]:
    """Return color and dash pattern: of a single run the color shows the kind, else the color shows the run."""
    number = list(KINDS).index(kind)
    return (number, 0) if len(runs) == 1 else (place, (1, 0, 2)[number])


def _series_name(runs: Sequence[Run], run: Run, kind: str) -> str:
    return KINDS[kind] if len(runs) == 1 else f'{run.name}, {KINDS[kind]}'


def _curve_legend(runs: Sequence[Run], kinds: Sequence[str]) -> Element:
    if len(runs) == 1:
        return legend([(KINDS[kind], *_look(runs, 0, kind)) for kind in kinds])
    styles = [(KINDS[kind], 6, _look(runs, 0, kind)[1]) for kind in kinds]
    return legend([*run_entries(runs), *styles])


def run_entries(runs: Sequence[Run]) -> list[tuple[str, int, int]]:
    """Return the entries of a legend of the runs."""
    return [(run.name, place, 0) for place, run in enumerate(runs)]


def _grid(charts: Content) -> Content:
    first, others = charts[:_FIRST], charts[_FIRST:]
    more = [details(f'{len(others)} more', el('div', others, class_='charts'))] if others else []
    return [el('div', first, class_='charts'), *more]


def schedule_content(runs: Sequence[Run]) -> Content:
    """Return charts of the learning rate, of the scheduled values of the model, and of the gradient norm."""
    found = [scheduled(run) for run in runs]
    names = list(dict.fromkeys(name for curves in found for name in curves))
    names.sort(key=lambda name: (name != 'lr', name == 'grad_norm'))
    charts = []
    for name in names:
        curves = [
            Series(run.name, curves[name], place)
            for place, (run, curves) in enumerate(zip(runs, found))
            if name in curves
        ]
        charts.append(
            figure(
                line_chart(name, curves, marked=False),
                {'lr': 'learning rate', 'grad_norm': 'gradient norm'}.get(name, name),
            )
        )
    entries = [legend(run_entries(runs))] if len(runs) > 1 and charts else []
    return entries + _grid(charts) if charts else []


def scheduled(run: Run) -> dict[str, Points]:
    """Return the curves of the log lines that metrics.jsonl does not have, and the learning rate."""
    metrics = run.metrics()
    curves = {name: points for name, points in run.steps.items() if name not in metrics}
    rates = run.steps.get('lr') or metrics.get('lr', {}).get('train')
    if rates and max(value for _, value in rates) < 1e-4:  # log lines have six decimals
        rates = metrics.get('lr', {}).get('train')
    return {**({'lr': rates} if rates else {}), **curves}


# ---------------------------------------------------------------------------------------------------- configuration
def configuration_content(runs: Sequence[Run]) -> Content:
    """Return the values that differ between runs, and the configuration of each run with the sources of its values."""
    content: Content = []
    readable = [run for run in runs if run.settings]
    if len(readable) > 1:
        rows = _differences(readable)
        heading = el('h3', f'{len(rows)} values differ' if rows else 'All values are equal')
        content += [heading, table(['key', *(run.name for run in readable)], rows, 'keys')] if rows else [heading]
    for run in readable:
        content += _settings(run, len(runs) > 1)
    return content


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    columns = [{setting.key: setting.value for setting in run.settings} for run in runs]
    keys = (key for key in SCHEMA.keys if key not in _UNCOMPARED)
    rows = ([key, *(column.get(key, '') for column in columns)] for key in keys)
    return [row for row in rows if len(set(row[1:])) > 1]


def _settings(run: Run, closed: bool) -> Content:
    head = ['key', 'value', 'source']
    rows = [(setting.key, setting.value, setting.source) for setting in run.settings]
    changed = [row for row, setting in zip(rows, run.settings) if not setting.default or setting.source != 'default']
    parts = [el('p', _source_text(run), class_='muted'), table(head, changed, 'keys')]
    parts.append(details(f'All {len(rows)} keys', table(head, rows, 'keys')))
    return [details(f'Configuration of {run.name}', *parts)] if closed else parts


def _source_text(run: Run) -> str:
    if run.info:
        return 'Values other than the defaults, and where each was set.'
    return 'Values other than the defaults. This run recorded no sources: the lines are those of its config.yaml.'


# ---------------------------------------------------------------------------------------------------- pictures
def picture_content(runs: Sequence[Run]) -> Content:
    """Return the pictures of each run's folder."""
    content: Content = []
    for run in runs:
        pictures = [_stored(stored) for stored in run.pictures]
        heads = [el('h3', run.name)] if len(runs) > 1 else []
        content += [*heads, el('div', pictures, class_='pictures')] if pictures else []
    return content


def _stored(stored: StoredPicture) -> Element:
    """Return a picture with its name. Small ones are enlarged, so that pixels stay sharp."""
    title, image = ', '.join(filter(None, [stored.name, stored.when])), stored.image
    factor = max(1, _SMALL // max(image.size))
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    return figure(picture(image, title), title)


# ---------------------------------------------------------------------------------------------------- environment
def environment_content(runs: Sequence[Run]) -> Content:
    """Return versions, hardware and commands of each run that recorded them."""
    recorded = [run for run in runs if run.info]
    if not recorded:
        return []
    names = list(dict.fromkeys(name for run in recorded for name in run.info['environment']))
    rows = [[str(name), *(str(run.info['environment'].get(name, '')) for run in recorded)] for name in names]
    commands = [[run.name, [el('div', el('code', str(text))) for text in run.info['commands']]] for run in recorded]
    return [table(['', *(run.name for run in recorded)], rows), table(['run', 'commands'], commands)]


SECTIONS = (
    Section('results', 'Results', result_content),
    Section('curves', 'Training curves', curve_content),
    Section('schedules', 'Learning rate and schedules', schedule_content),
    Section('classes', 'Results by class', class_results),
    Section('confusion', 'Confusion matrix', confusions),
    Section('calibration', 'Calibration', calibrations),
    Section('mistakes', 'Most confident mistakes', mistakes),
    Section('pictures', 'Pictures', picture_content),
    Section('configuration', 'Configuration', configuration_content),
    Section('environment', 'Environment', environment_content),
)
