# SPDX-License-Identifier: Apache-2.0
"""HTML elements. Text and attributes are escaped by the serializer, so text of files cannot become markup."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Union
from xml.etree import ElementTree

from PIL import Image

from utils.text import printable

Element = ElementTree.Element
Child = Union[Element, str, int, float, None, Iterable['Child']]


def el(tag: str, *children: Child, **attributes: str | int | float | None) -> Element:
    """Return an element.

    Args:
        children: elements, texts, or lists of both; None is left out.
        attributes: `class_` is class, and `stroke_width` is stroke-width; None is left out.
    """
    values = ((name.rstrip('_').replace('_', '-'), value) for name, value in attributes.items())
    element = Element(tag, {name: printable(value, limit=1 << 28) for name, value in values if value is not None})
    _append(element, children)
    return element


def _append(element: Element, children: Iterable[Child]) -> None:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Element):
            element.append(child)
        elif isinstance(child, (str, int, float)):
            _append_text(element, printable(child))
        else:
            _append(element, child)


def _append_text(element: Element, text: str) -> None:
    if len(element):
        element[-1].tail = (element[-1].tail or '') + text
    else:
        element.text = (element.text or '') + text


def table(head: Sequence[Child], rows: Iterable[Sequence[Child]], class_: str | None = None) -> Element:
    """Return a table that scrolls sideways where it is too wide; the first cell of each row is its header."""
    body = [el('tr', el('th', row[0], scope='row'), [el('td', cell) for cell in row[1:]]) for row in rows]
    heads = el('tr', [el('th', cell, scope='col') for cell in head])
    return el('div', el('table', el('thead', heads), el('tbody', body), class_=class_), class_='scroll')


def figure(content: Element, *caption: Child, class_: str | None = None) -> Element:
    """Return a figure with its caption below."""
    return el('figure', content, el('figcaption', *caption), class_=class_)


def details(title: str, *children: Child) -> Element:
    """Return a part of the page that is closed at first."""
    return el('details', el('summary', title), *children)


def picture(image: Image.Image, alt: str, class_: str | None = None) -> Element:
    """Return an image element that holds the picture as PNG."""
    data = io.BytesIO()
    image.save(data, 'PNG', optimize=True)
    source = 'data:image/png;base64,' + base64.b64encode(data.getvalue()).decode('ascii')
    return el('img', src=source, alt=alt, width=image.width, height=image.height, class_=class_)


def document(title: str, style: str, body: Sequence[Element]) -> str:
    """Return an HTML document that loads nothing and runs no script; its policy makes browsers refuse both."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = el(
        'head',
        el('meta', charset='utf-8'),
        el('meta', http_equiv='Content-Security-Policy', content=policy),
        el('meta', name='viewport', content='width=device-width, initial-scale=1'),
        el('title', title),
    )
    sheet = el('style')
    sheet.text = style
    head.append(sheet)
    root = el('html', head, el('body', *body), lang='en')
    return '<!DOCTYPE html>\n' + ElementTree.tostring(root, encoding='unicode', method='html') + '\n'
