# SPDX-License-Identifier: Apache-2.0
"""HTML page about one run or several: reading of run folders, statistics of predictions, charts, sections."""
