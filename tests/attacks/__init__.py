# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged files against every door, with a table of numbers: `python -m tests.attacks`."""
