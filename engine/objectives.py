# SPDX-License-Identifier: Apache-2.0
"""All objectives by their names: the registry of engine/tasks.py after the modules that fill it. A new module goes here."""

from engine import contrastive, pretraining  # noqa: F401 (they register theirs)
from engine.tasks import TASKS  # noqa: F401
