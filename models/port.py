# SPDX-License-Identifier: Apache-2.0
"""Alias of models/weights/convert.py."""

from models.weights.convert import PortReport, port_state_dict, port_with_report

__all__ = ['PortReport', 'port_state_dict', 'port_with_report']
