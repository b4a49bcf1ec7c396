# SPDX-License-Identifier: Apache-2.0
"""Models without their training: exported programs and predictions."""
